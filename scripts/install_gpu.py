"""Put the pieces of `make pack-gpu` together on a machine without a network.

    python3 scripts/install_gpu.py FOLDER [--into STORE]

FOLDER holds one piece and the manifest. It goes into STORE; once every piece is there, they are
joined, verified, unpacked and installed: STORE/site is the patched vLLM with its dependencies for
PYTHONPATH, STORE/stock the release itself, sharing every unpatched file. Needs Python's standard
library and pip; what was done is not done again. Exit status 0: kept or installed; 1: a problem.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

STORE = Path("/tmp/uniprefill")
MODULES = (
    "vllm",
    "vllm.config.uniprefill",
    "vllm.v1.uniprefill.selection",
    "vllm.v1.uniprefill.policy",
    "vllm.v1.uniprefill.plan",
    "vllm.v1.worker.gpu.uniprefill.runner",
    "vllm.v1.worker.gpu.uniprefill.state",
    "vllm.v1.engine.core",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.model_executor.models.llama",
    "vllm.entrypoints.llm",
)
WITH_A_GPU = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C", "vllm.v1.attention.backends.flash_attn")


class Problem(Exception):
    """One sentence for the user."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def receive(folder: Path, store: Path) -> dict[str, Any]:
    """Copy the folder's piece into the store, verified; the manifest."""
    if not (folder / "manifest.json").is_file():
        raise Problem(f"{folder} has no manifest.json; carry a numbered folder of `make pack-gpu`'s output.")
    text = (folder / "manifest.json").read_text()
    manifest = json.loads(text)
    store.mkdir(parents=True, exist_ok=True)
    known = store / "manifest.json"
    if known.is_file() and known.read_text() != text:
        shutil.rmtree(store)  # pieces of another packing
        store.mkdir(parents=True)
    known.write_text(text)
    piece = folder / "piece"
    digest = sha256(piece) if piece.is_file() else None
    for entry in manifest["pieces"]:
        if entry["sha256"] == digest:
            target = store / f"piece-{entry['number']}"
            shutil.copyfile(piece, target.with_suffix(".part"))
            target.with_suffix(".part").replace(target)
            return manifest
    raise Problem(f"{piece} is none of the manifest's pieces (missing or damaged); carry it again.")


def missing(manifest: dict[str, Any], store: Path) -> list[int]:
    return [entry["number"] for entry in manifest["pieces"] if not (store / f"piece-{entry['number']}").is_file()]


def join(manifest: dict[str, Any], store: Path) -> Path:
    archive = store / "archive.tar.xz"
    with archive.open("wb") as out:
        for entry in manifest["pieces"]:
            piece = store / f"piece-{entry['number']}"
            if sha256(piece) != entry["sha256"]:
                piece.unlink()
                raise Problem(f"Piece {entry['number']} is damaged; carry it again.")
            with piece.open("rb") as source:
                shutil.copyfileobj(source, out)
    if sha256(archive) != manifest["archive"]["sha256"]:
        raise Problem("The joined archive is not the packed one; pack again.")
    return archive


def check_python(manifest: dict[str, Any]) -> None:
    here = ".".join(map(str, sys.version_info[:2]))
    if here != manifest["python"]:
        raise Problem(f"The wheels are for Python {manifest['python']} and this is {here}; name another python3.")


def unpack(archive: Path, store: Path) -> None:
    work = store / "work"
    shutil.rmtree(work, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")


def install_wheels(store: Path) -> None:
    site = store / "site"
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--target", str(site)]
    found = sorted((store / "work" / "wheels").glob("*.whl"))
    done = subprocess.run([*command, *map(str, found)], capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"pip install failed:\n{done.stderr[-2000:]}")


def make_stock(store: Path) -> None:
    """The release beside the patched package: hard links, and its own text where they differ."""
    stock, site = store / "stock", store / "site"
    shutil.rmtree(stock, ignore_errors=True)
    own = json.loads((store / "work" / "stock.json").read_text())
    for source in sorted((site / "vllm").rglob("*")):
        name = source.relative_to(site).as_posix()
        if source.is_file() and name not in own:
            target = stock / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(source, target)
    for name, text in own.items():
        if text is not None:
            (stock / name).parent.mkdir(parents=True, exist_ok=True)
            (stock / name).write_text(text)


def import_problems(path: list[Path], modules: tuple[str, ...]) -> list[str]:
    """What does not import with these folders first on the path, with its error."""
    program = (
        "import importlib, sys\n"
        "bad = 0\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except Exception as error:\n"
        "        bad = 1\n"
        "        print(f'{name}: {type(error).__name__}: {error}')\n"
        "sys.exit(bad)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", program, *modules]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path[0])
    if done.returncode == 0:
        return []
    return done.stdout.splitlines() or [done.stderr.strip().splitlines()[-1]]


def check_torch(manifest: dict[str, Any]) -> bool:
    """Whether torch sees a GPU here."""
    program = "import torch; print(torch.__version__, torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise Problem(f"This Python has no torch; the pieces go over torch >= {manifest['torch']}.")
    version, gpu = done.stdout.split()
    have, want = (tuple(int(n) for n in v.partition("+")[0].split(".")[:2]) for v in (version, manifest["torch"]))
    if have < want:
        raise Problem(f"torch here is {version}, and the pieces go over torch >= {manifest['torch']}.")
    return gpu == "True"


def install(manifest: dict[str, Any], store: Path) -> None:
    stamp = store / "installed"
    if stamp.is_file() and stamp.read_text() == manifest["archive"]["sha256"]:
        print("installed before")
        return
    check_python(manifest)
    gpu = check_torch(manifest)
    unpack(join(manifest, store), store)
    install_wheels(store)
    make_stock(store)
    shutil.rmtree(store / "work")
    modules = MODULES + (WITH_A_GPU if gpu else ())
    if problems := import_problems([store / "site"], modules):
        raise Problem("Installed, but not everything imports:\n" + "\n".join(problems))
    if problems := import_problems([store / "stock", store / "site"], ("vllm",)):
        raise Problem("The release beside it does not import:\n" + "\n".join(problems))
    stamp.write_text(manifest["archive"]["sha256"])
    print(
        f"installed {manifest['package']} in {store}/site, the release in {store}/stock; {len(modules)} modules import"
    )
    if not gpu:
        print(f"no GPU here, so not tried: {', '.join(WITH_A_GPU)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="one numbered folder of `make pack-gpu`'s output")
    parser.add_argument("--into", type=Path, default=STORE, metavar="STORE", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        manifest = receive(args.folder, args.into)
        if lacks := missing(manifest, args.into):
            print(f"kept; still to come: piece {', '.join(map(str, lacks))} of {len(manifest['pieces'])}")
            return 0
        install(manifest, args.into)
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
