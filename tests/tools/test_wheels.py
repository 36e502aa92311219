"""Our wheel out of the release's: what is replaced, what stays, what is refused."""

import json
import subprocess
import sys
import zipfile

import pytest
from wheel.wheelfile import WheelFile

from scripts import build, environment, fetch_source, fork, make_tree, wheels

from .conftest import FIRST, KERNEL, RELEASE, VERSION_FILE, write_series

INFO = "vllm-9.9.0+uniprefill.3.dist-info/"


@pytest.fixture
def built(toy):
    fetch_source.ensure_source(toy, fork.read_upstream(toy.root / "UPSTREAM"), wheel=True)
    make_tree.make_tree(toy)
    return build.build_wheel("cuda", toy, 1)[0]


def test_is_a_valid_wheel_of_our_version(built):
    assert built.name == "vllm-9.9.0+uniprefill.3-cp38-abi3-linux_x86_64.whl"
    with WheelFile(built) as wheel:  # checks every member against RECORD as it reads
        names = wheel.namelist()
        for name in names:
            wheel.read(name)
    assert len(names) == len(set(names))
    with zipfile.ZipFile(built) as archive:
        assert archive.testzip() is None
        listed = set(wheels.read_record(archive, "9.9.0+uniprefill.3"))
        assert listed == set(names)
        assert not [n for n in names if n.startswith("vllm-9.9.0.dist-info")]


def test_replaces_patched_files_and_leaves_the_kernel_alone(built, toy):
    with zipfile.ZipFile(built) as ours, zipfile.ZipFile(next(toy.archives.glob("*.whl"))) as theirs:
        assert ours.read("vllm/core.py") == (toy.tree / "vllm/core.py").read_bytes()
        assert ours.read("vllm/helper.py").startswith(b"def help")
        assert ours.read("vllm/_C.abi3.so") == KERNEL
        ours_info, theirs_info = ours.getinfo("vllm/_C.abi3.so"), theirs.getinfo("vllm/_C.abi3.so")
        assert (ours_info.CRC, ours_info.compress_size) == (theirs_info.CRC, theirs_info.compress_size)


def test_pip_installs_it(built, tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target), str(built)]
    subprocess.run(pip, check=True)
    code = (
        "import vllm, vllm.helper, importlib.metadata as m; print(vllm.answer, vllm.helper.help(), m.version('vllm'))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(target)}
    )
    assert done.stdout.split() == ["42", "1", "9.9.0+uniprefill.3"], done.stderr


def test_metadata_version_and_provenance(built, toy):
    with zipfile.ZipFile(built) as archive:
        metadata = archive.read(INFO + "METADATA").decode()
        version = archive.read("vllm/_version.py").decode()
        provenance = json.loads(archive.read(INFO + "uniprefill.json"))
    assert "\nVersion: 9.9.0+uniprefill.3\n" in metadata and metadata.endswith("\nVersion: not a field\n")
    namespace: dict = {}
    exec(version, namespace)
    assert namespace["__version__"] == "9.9.0+uniprefill.3"
    assert namespace["version_tuple"] == (9, 9, 0, "uniprefill.3")
    assert namespace["commit_id"] == "gabc123def"
    assert provenance["series_sha256"] == fork.series_sha256(toy)
    assert provenance["upstream"] == {"tag": "v9.9.0", "commit": "abc123def"}
    assert provenance["edited"] == []


def test_the_same_input_makes_the_same_bytes(built, toy):
    first = built.read_bytes()
    (toy.state / "wheel-cuda").unlink()
    assert build.build_wheel("cuda", toy, 1)[0].read_bytes() == first


def test_a_second_build_does_not_touch_the_wheel_and_an_edit_does(built, toy):
    stamp = built.stat().st_mtime_ns
    assert build.build_wheel("cuda", toy, 1)[0].stat().st_mtime_ns == stamp
    (toy.tree / "vllm/helper.py").write_text("def help():\n    return 5\n")
    with zipfile.ZipFile(build.build_wheel("cuda", toy, 1)[0]) as archive:
        assert b"return 5" in archive.read("vllm/helper.py")
        assert json.loads(archive.read(INFO + "uniprefill.json"))["edited"] == ["vllm/helper.py"]


def test_a_wheel_of_another_release_is_refused(toy):
    upstream = fork.read_upstream(toy.root / "UPSTREAM")
    fetch_source.ensure_source(toy, upstream, wheel=True)
    make_tree.make_tree(toy)
    (toy.pristine / "vllm/core.py").write_text("other\n")
    with pytest.raises(fork.ForkError, match="vllm/core.py is not the sdist's"):
        build.build_wheel("cuda", toy, 1)


def test_the_cpu_variant_drops_gpu_requirements_and_pins_triton():
    text = wheels.rewrite_metadata(RELEASE["PKG-INFO"], "1+c", {"flash-infer"}, ["triton==3.7.1"])
    assert "flash_infer" not in text and "Requires-Dist: torch==1.0\n" in text
    assert 'Requires-Dist: pandas; extra == "bench"' in text
    assert text.index("triton==3.7.1") < text.index("Provides-Extra")


def test_an_unexpected_version_file_is_refused():
    with pytest.raises(fork.ForkError, match="_version.py"):
        wheels.version_file(VERSION_FILE, "9.9.1", "9.9.1+x")


def test_pack_base_is_a_valid_wheel(toy, tmp_path):
    fetch_source.ensure_source(toy, fork.read_upstream(toy.root / "UPSTREAM"))
    library = tmp_path / "_C_AVX2.abi3.so"
    library.write_bytes(KERNEL)
    library.chmod(0o755)
    target = tmp_path / "vllm-9.9.0-cp311-abi3-linux_x86_64.whl"
    wheels.pack_base(toy.pristine, library, "9.9.0", target)
    with WheelFile(target) as wheel:
        assert wheel.read("vllm/_C_AVX2.abi3.so") == KERNEL
        assert wheel.read("vllm-9.9.0.dist-info/entry_points.txt").startswith(b"[console_scripts]")
        assert wheel.getinfo("vllm/_C_AVX2.abi3.so").external_attr >> 16 & 0o111


class TestSync:
    """Bringing an installed wheel up to date without pip."""

    @pytest.fixture
    def site(self, built, tmp_path):
        site = tmp_path / "site"
        with zipfile.ZipFile(built) as archive:
            archive.extractall(site)
        record = site / INFO / "RECORD"
        record.write_text(record.read_text() + f"../../../bin/vllm,sha256=x,10\n{INFO}INSTALLER,,\n")
        (site / INFO / "INSTALLER").write_text("pip\n")
        return site

    def test_an_up_to_date_site_is_left_alone(self, built, site):
        before = {p: p.stat().st_mtime_ns for p in site.rglob("*.py")}
        assert environment.sync(built, site) == 0
        assert before == {p: p.stat().st_mtime_ns for p in site.rglob("*.py")}

    def test_writes_what_changed_and_removes_what_is_gone(self, built, site, toy):
        core = (site / "vllm/_C.abi3.so").stat().st_mtime_ns
        write_series(toy, [FIRST])
        make_tree.make_tree(toy)
        wheel = build.build_wheel("cuda", toy, 1)[0]
        assert environment.sync(wheel, site) == 3  # core.py, helper.py, uniprefill.json
        assert not (site / "vllm/helper.py").exists()
        assert (site / "vllm/core.py").read_bytes() == (toy.tree / "vllm/core.py").read_bytes()
        assert (site / "vllm/_C.abi3.so").stat().st_mtime_ns == core
        record = (site / INFO / "RECORD").read_text()
        assert "../../../bin/vllm" in record and "INSTALLER" in record and "helper" not in record

    def test_a_file_that_was_lost_comes_back(self, built, site):
        (site / "vllm/core.py").unlink()
        assert environment.sync(built, site) == 1
        assert (site / "vllm/core.py").is_file()

    def test_another_version_is_left_to_pip(self, built, site):
        (site / INFO).rename(site / "vllm-9.9.0.dist-info")
        assert environment.sync(built, site) is None

    def test_an_interrupted_sync_does_not_look_complete(self, built, site, toy, monkeypatch):
        (toy.tree / "vllm/helper.py").write_text("def help():\n    return 5\n")
        wheel = build.build_wheel("cuda", toy, 1)[0]
        real = zipfile.ZipFile.read

        def broken(self, name, *rest):
            if name == "vllm/helper.py":
                raise KeyboardInterrupt
            return real(self, name, *rest)

        monkeypatch.setattr(zipfile.ZipFile, "read", broken)
        with pytest.raises(KeyboardInterrupt):
            environment.sync(wheel, site)
        assert not (site / INFO / "RECORD").exists()
