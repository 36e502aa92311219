"""The CUDA wheel, built and inspected on any machine; imported where it is what is installed."""

import json
import zipfile
from importlib.metadata import version

import pytest

from scripts import fork, tree, wheels

LAYOUT = fork.Layout()
VERSION = fork.read_version().package("cuda")
UPSTREAM = fork.read_upstream()


@pytest.fixture(scope="module")
def ours():
    path = LAYOUT.wheels / UPSTREAM.wheel.replace(f"-{UPSTREAM.version}-", f"-{VERSION}-")
    assert path.is_file(), "run `make wheel DEVICE=cuda` first (make test does)"
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def theirs():
    with zipfile.ZipFile(LAYOUT.archives / UPSTREAM.wheel) as archive:
        yield archive


def patched() -> dict[str, str | None]:
    return {p: t for p, t in tree.working_steps(LAYOUT).final.items() if p.startswith("vllm/")}


def test_every_member_but_the_patched_ones_is_the_releases(ours, theirs):
    old, new = f"vllm-{UPSTREAM.version}.dist-info/", f"vllm-{VERSION}.dist-info/"
    before = {i.filename: (i.CRC, i.file_size) for i in theirs.infolist() if not i.filename.startswith(old)}
    after = {i.filename: (i.CRC, i.file_size) for i in ours.infolist() if not i.filename.startswith(new)}
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= patched().keys() | {"vllm/_version.py"}
    kernels = [name for name in before if name.endswith(".so")]
    assert len(kernels) >= 10 and not changed & set(kernels)


def test_the_kernels_compressed_bytes_are_the_releases(ours, theirs):
    def raw(archive, name):
        info = archive.getinfo(name)
        archive.fp.seek(info.header_offset + 26)
        lengths = archive.fp.read(4)
        archive.fp.seek(int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"), 1)
        return archive.fp.read(info.compress_size)

    for name in ("vllm/cumem_allocator.abi3.so", "vllm/_moe_C_stable_libtorch.abi3.so"):
        assert raw(ours, name) == raw(theirs, name)


def test_the_patched_files_are_the_trees(ours):
    for path, text in patched().items():
        assert (ours.read(path).decode() if text is not None else None) == text, path


def test_record_lists_every_member_with_its_hash(ours):
    rows = wheels.read_record(ours, VERSION)
    assert set(rows) == set(ours.namelist())
    for name in ours.namelist():
        if name.endswith((".py", "METADATA", "uniprefill.json")):
            assert rows[name][0] == wheels.record_hash(ours.read(name)), name


def test_version_and_requirements(ours, theirs):
    metadata = ours.read(f"vllm-{VERSION}.dist-info/METADATA").decode()
    release = theirs.read(f"vllm-{UPSTREAM.version}.dist-info/METADATA").decode()
    assert metadata == release.replace(f"\nVersion: {UPSTREAM.version}\n", f"\nVersion: {VERSION}\n")
    assert f"__version__ = version = '{VERSION}'" in ours.read("vllm/_version.py").decode()


def test_provenance(ours):
    found = json.loads(ours.read(f"vllm-{VERSION}.dist-info/{wheels.PROVENANCE}"))
    assert found["device"] == "cuda" and found["series_sha256"] == fork.series_sha256(LAYOUT)


@pytest.mark.gpu
@pytest.mark.skipif(version("vllm").endswith(".cpu"), reason="needs an NVIDIA GPU and the CUDA build")
def test_it_is_imported_where_there_is_a_gpu():
    import torch
    import vllm
    from vllm.platforms import current_platform

    assert vllm.__version__ == VERSION and current_platform.is_cuda() and torch.cuda.is_available()
    current_platform.import_kernels()
    assert hasattr(torch.ops._C, "silu_and_mul")
