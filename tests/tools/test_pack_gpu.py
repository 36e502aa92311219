"""What carries the benchmark to a GPU box: packing, joining, installing, on toy wheels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts import fork, wheels
from scripts import install_gpu as install
from scripts import pack_gpu as pack

VERSION, RELEASE = "9.9.9+uniprefill.1", "9.9.9"
FA2 = "vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so"


def write_wheel(folder: Path, name: str, version: str, members: dict[str, bytes], tags: str = "py3-none-any") -> Path:
    info = f"{name}-{version}.dist-info/"
    members = members | {
        info + "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        info + "WHEEL": f"Wheel-Version: 1.0\nGenerator: toy\nRoot-Is-Purelib: true\nTag: {tags}\n".encode(),
    }
    rows = {member: (wheels.record_hash(data), str(len(data))) for member, data in members.items()}
    rows[info + "RECORD"] = ("", "")
    path = folder / f"{name}-{version}-{tags}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for member, data in (members | {info + "RECORD": wheels.format_record(rows)}).items():
            out.writestr(member, data)
    return path


@pytest.fixture
def toys(tmp_path: Path) -> tuple[Path, Path, Path]:
    """(ours, the release, a dependency) as wheels."""
    common = {
        "vllm/engine.py": b"import needed\nNAME = 'engine'\n",
        "vllm/_C_stable_libtorch.abi3.so": b"kernels" * 3000,
        FA2: b"not needed" * 3000,
        "vllm/vllm-rs": b"a program",
    }
    ours = {"vllm/__init__.py": b"from vllm import engine, fresh\n", "vllm/fresh.py": b"\n"}
    theirs = {"vllm/__init__.py": b"from vllm import engine\nSTOCK = True\n", "vllm/gone.py": b"OLD = 1\n"}
    return (
        write_wheel(tmp_path, "vllm", VERSION, common | ours),
        write_wheel(tmp_path, "vllm", RELEASE, common | theirs),
        write_wheel(tmp_path, "needed", "1.0", {"needed.py": b"\n"}),
    )


@pytest.fixture
def packed(toys: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A packing of the toys in several pieces."""
    ours, release, dependency = toys
    monkeypatch.setattr(pack, "cuda_wheel", lambda layout: (ours, release))
    monkeypatch.setattr(pack, "resolve", lambda *_: [("needed", "1.0")])
    monkeypatch.setattr(pack, "download", lambda *_: [dependency])
    layout = fork.Layout(tmp_path / "checkout")
    (layout.pristine / "requirements").mkdir(parents=True)
    (layout.pristine / "requirements" / "common.txt").write_text("needed\n")
    image = json.loads(pack.IMAGE.read_text()) | {"python": ".".join(map(str, sys.version_info[:2]))}
    pack.pack(tmp_path / "out", image, 0.001, layout)
    return tmp_path / "out"


def pieces(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))


def receive_all(folder: Path, store: Path) -> dict:
    return [install.receive(piece, store) for piece in pieces(folder)][-1]


def test_the_archive_holds_what_the_run_needs_and_no_more(packed: Path) -> None:
    with tarfile.open(packed / "archive.tar.xz") as archive:
        names = archive.getnames()
        assert sum(name.startswith("wheels/vllm-") for name in names) == 1 and "stock.json" in names
        (kernels,) = [name for name in names if name.startswith("wheels/vllm_kernels-")]
        with zipfile.ZipFile(archive.extractfile(kernels)) as wheel:
            members = wheel.namelist()
    assert "vllm/_C_stable_libtorch.abi3.so" in members and FA2 not in members
    manifest = json.loads((packed / "1" / "manifest.json").read_text())
    told = {item["pattern"]: item for item in manifest["dropped"] if item["members"]}
    assert set(told) == {FA2, "vllm/vllm-rs"} and all(item["reason"] and item["bytes"] for item in told.values())


def test_pieces_keep_their_size_and_are_not_written_twice(packed: Path) -> None:
    manifest = json.loads((packed / "1" / "manifest.json").read_text())
    assert len(manifest["pieces"]) == len(pieces(packed)) > 1
    assert all(piece["bytes"] <= 0.001 * 2**20 for piece in manifest["pieces"])
    assert sum(piece["bytes"] for piece in manifest["pieces"]) == manifest["archive"]["bytes"]
    before = [(path / "piece").stat().st_mtime_ns for path in pieces(packed)]
    again = pack.split(packed / "archive.tar.xz", packed, manifest["pieces"][0]["bytes"])
    assert again == manifest["pieces"]
    assert [(path / "piece").stat().st_mtime_ns for path in pieces(packed)] == before


def test_members_are_compressed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pack.compressed("a", b"x" * 5000, tmp_path)
    monkeypatch.setattr(pack.lzma, "compress", None)
    assert pack.compressed("a", b"x" * 5000, tmp_path) == first
    with pytest.raises(TypeError):
        pack.compressed("a", b"y" * 5000, tmp_path)


def test_the_plan_names_a_call_a_piece_and_runs_in_the_last(packed: Path) -> None:
    lines = (packed / "plan.txt").read_text().splitlines()
    assert len(lines) == 1 + len(pieces(packed))
    assert lines[-1].endswith("&& make bench-gpu") and "bench-gpu" not in "".join(lines[:-1])


def test_a_piece_leaves_room_for_the_working_tree() -> None:
    assert pack.piece_mib(None, 20 << 20) == 43
    assert pack.piece_mib(None, 0) == pack.PIECE_MIB
    with pytest.raises(fork.ForkError, match="--piece-mib"):
        pack.piece_mib(61, 0)


def test_an_old_packings_spare_pieces_do_not_stay(packed: Path) -> None:
    pack.split(packed / "archive.tar.xz", packed, 1 << 30)
    assert [path.name for path in pieces(packed)] == ["1"]


def test_what_the_image_has_is_not_carried() -> None:
    image = {"versions": {"torch": "2.11.0"}, "packages": ["Already_There"]}
    report = {
        "install": [
            {"metadata": {"name": name, "version": "1"}}
            for name in ("torch", "already-there", "nvidia-cublas", "sentry-sdk", "Lacks.It")
        ]
    }
    assert pack.choose(report, image) == [("lacks-it", "1")]


def test_requirements_lose_comments_options_and_what_is_left_out() -> None:
    text = "-r other.txt\nregex # why\n\nnumba == 0.65.0\nmsgspec>=1; python_version > '3.1'\n"
    assert pack.requirements(text) == ["regex", "msgspec>=1; python_version > '3.1'"]


def test_the_real_wheels_left_out_members_are_named_by_a_pattern_that_matches() -> None:
    """A renamed library would travel again, or be missed."""
    layout, upstream = fork.Layout(), fork.read_upstream()
    with zipfile.ZipFile(layout.archives / upstream.wheel) as archive:
        names = archive.namelist()
    matched = {pack.dropped_by(name) for name in names}
    assert set(pack.DROPPED) <= matched
    kept = [name for name in names if pack.is_kernel(name) and not pack.dropped_by(name)]
    assert {"vllm/_C_stable_libtorch.abi3.so", "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"} <= set(kept)


# --- on the box


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with torch and no GPU, where vLLM is the toy."""
    monkeypatch.setattr(install, "check_torch", lambda manifest: False)
    monkeypatch.setattr(install, "MODULES", ("vllm", "vllm.fresh"))


def test_install_joins_the_pieces_and_puts_the_release_beside(packed: Path, tmp_path: Path, box: None, capsys) -> None:
    store = tmp_path / "store"
    manifest = install.receive(pieces(packed)[0], store)
    assert install.missing(manifest, store) == list(range(2, len(manifest["pieces"]) + 1))
    manifest = receive_all(packed, store)
    assert install.missing(manifest, store) == []
    install.install(manifest, store)
    assert "not tried" in capsys.readouterr().out

    def run(path: list[Path], program: str) -> str:
        environment = {"PYTHONPATH": ":".join(map(str, path)), "PATH": ""}
        done = subprocess.run([sys.executable, "-S", "-c", program], env=environment, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    site, stock = store / "site", store / "stock"
    assert run([site], "import vllm; print(vllm.engine.NAME, hasattr(vllm, 'STOCK'))") == "engine False"
    assert run([stock, site], "import vllm; print(vllm.engine.NAME, vllm.STOCK)") == "engine True"
    version = "from importlib.metadata import version; print(version('vllm'))"
    assert run([site], version) == VERSION and run([stock, site], version) == RELEASE
    assert (stock / "vllm" / "gone.py").is_file() and not (stock / "vllm" / "fresh.py").exists()
    assert (site / "vllm" / "__init__.py").read_bytes() == b"from vllm import engine, fresh\n", "hard links stay apart"
    shared = (stock / "vllm" / "_C_stable_libtorch.abi3.so").stat()
    assert shared.st_nlink == 2 and not (site / FA2).exists()

    install.install(manifest, store)
    assert "installed before" in capsys.readouterr().out


def test_a_damaged_piece_is_refused_when_it_comes_and_when_it_lies(packed: Path, tmp_path: Path) -> None:
    store, carried = tmp_path / "store", tmp_path / "carried"
    shutil.copytree(pieces(packed)[0], carried)
    (carried / "piece").write_bytes(b"cut short")
    with pytest.raises(install.Problem, match="carry it again"):
        install.receive(carried, store)
    manifest = receive_all(packed, store)
    (store / "piece-2").write_bytes(b"rotten")
    with pytest.raises(install.Problem, match="Piece 2 is damaged"):
        install.join(manifest, store)
    assert install.missing(manifest, store) == [2], "so that it can be carried again"


def test_pieces_of_two_packings_do_not_mix(packed: Path, tmp_path: Path) -> None:
    store, other = tmp_path / "store", tmp_path / "other"
    install.receive(pieces(packed)[0], store)
    shutil.copytree(pieces(packed)[1], other)
    manifest = json.loads((other / "manifest.json").read_text()) | {"package": "another"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    install.receive(other, store)
    assert 1 in install.missing(manifest, store) and 2 not in install.missing(manifest, store)


def test_another_python_and_an_old_torch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(install.Problem, match="name another python3"):
        install.check_python({"python": "3.9"})
    answer = subprocess.CompletedProcess([], 0, "2.10.1+cu130 True\n", "")
    monkeypatch.setattr(install.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(install.Problem, match="torch here is 2.10.1"):
        install.check_torch({"torch": "2.11.0"})
    answer.stdout = "2.12.0+cu130 True\n"
    assert install.check_torch({"torch": "2.11.0"}) is True


def test_what_does_not_import_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import surely_not_there\n")
    assert install.import_problems([tmp_path], ("json",)) == []
    (line,) = install.import_problems([tmp_path], ("json", "broken"))
    assert line.startswith("broken: ModuleNotFoundError") and "surely_not_there" in line


def test_the_installer_runs_by_itself_without_the_repository(tmp_path: Path) -> None:
    """Python's library alone: no import of ours, no third-party one."""
    copy = tmp_path / "install.py"
    shutil.copy(install.__file__, copy)
    done = subprocess.run([sys.executable, "-I", "-S", str(copy), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "manifest.json" in done.stderr
