"""The patched files over an installed release: what is written, what stays, what is refused."""

import csv
import io
import subprocess
import sys
import zipfile

import pytest

from scripts import fetch_source, fork, make_tree, overlay_wheel, wheels
from scripts.build import build_wheel

from .conftest import KERNEL

OTHER_KERNEL = b"compiled for this image's CUDA"


@pytest.fixture
def image(toy):
    """(release wheel, our wheel, site-packages of an image that compiled its own kernel)."""
    upstream = fork.read_upstream(toy.root / "UPSTREAM")
    fetch_source.ensure_source(toy, upstream, wheel=True)
    make_tree.make_tree(toy)
    release, site = toy.archives / upstream.wheel, toy.root / "site-packages"
    with zipfile.ZipFile(release) as archive:
        archive.extractall(site)
        rows = wheels.read_record(archive, "9.9.0")
    (site / "vllm/_C.abi3.so").write_bytes(OTHER_KERNEL)
    rows["vllm/_C.abi3.so"] = (wheels.record_hash(OTHER_KERNEL), str(len(OTHER_KERNEL)))
    rows["../../bin/vllm"] = ("sha256=x", "7")
    (site / "vllm-9.9.0.dist-info/RECORD").write_bytes(wheels.format_record(rows))
    (site / "vllm-9.9.0.dist-info/INSTALLER").write_text("uv")
    return release, build_wheel("cuda", toy, 1)[0], site


def test_writes_the_patched_files_and_leaves_the_kernels(image):
    release, ours, site = image
    written = overlay_wheel.overlay(release, ours, site)
    with zipfile.ZipFile(ours) as archive:
        for name in ("vllm/core.py", "vllm/helper.py", "vllm/_version.py", "vllm/data.json"):
            assert (site / name).read_bytes() == archive.read(name)
        assert archive.read("vllm/_C.abi3.so") == KERNEL
    assert written == 3  # core.py, helper.py and _version.py
    assert (site / "vllm/_C.abi3.so").read_bytes() == OTHER_KERNEL
    code = "import importlib.metadata as m, vllm; print(m.version('vllm'), vllm.answer)"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=site, capture_output=True, text=True)
    assert done.stdout == "9.9.0+uniprefill.3 42\n", done.stderr


def test_record_lists_what_is_there(image):
    release, ours, site = image
    overlay_wheel.overlay(release, ours, site)
    assert [path.name for path in site.glob("vllm-*.dist-info")] == ["vllm-9.9.0+uniprefill.3.dist-info"]
    text = (site / "vllm-9.9.0+uniprefill.3.dist-info/RECORD").read_text()
    rows = {row[0]: row[1] for row in csv.reader(io.StringIO(text))}
    present = {p.relative_to(site).as_posix() for p in site.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert rows.keys() - {"../../bin/vllm"} == present
    for name in present:
        if not name.endswith("/RECORD"):
            assert rows[name] == wheels.record_hash((site / name).read_bytes()), name


@pytest.mark.parametrize("name", ["vllm/core.py", "vllm/helper.py"], ids=["edited", "unexpected"])
def test_a_file_that_is_not_the_releases_is_refused(image, name):
    release, ours, site = image
    (site / name).write_text("someone's own")
    with pytest.raises(fork.ForkError, match=rf"{name} is not as vLLM 9.9.0 has it: set VLLM_IMAGE"):
        overlay_wheel.overlay(release, ours, site)
    assert (site / "vllm-9.9.0.dist-info/RECORD").is_file() and not list(site.glob("*uniprefill*"))


def test_another_release_is_refused(image):
    release, ours, site = image
    (site / "vllm-9.9.0.dist-info").rename(site / "vllm-9.8.0.dist-info")
    with pytest.raises(
        fork.ForkError, match=r"has vllm-9.8.0.dist-info, and the patches are for 9.9.0: set VLLM_IMAGE"
    ):
        overlay_wheel.overlay(release, ours, site)
