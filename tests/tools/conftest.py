"""A toy fork: a tiny release with its archive, wheel and pins, and two patches on it."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from scripts import fork, lock, wheels

VERSION_FILE = """\
__version__ = version = '9.9.0'
__version_tuple__ = version_tuple = (9, 9, 0)

__commit_id__ = commit_id = 'gabc123def'
"""
RELEASE = {
    "vllm/__init__.py": "from .core import answer\n",
    "vllm/core.py": "".join(f"# line {n}\n" for n in range(1, 9)) + "answer = 41\n",
    "vllm/empty/__init__.py": "",
    "vllm/_version.py": VERSION_FILE,
    "vllm/data.json": "{}\n",
    "csrc/op.cpp": "int op() { return 1; }\n",
    "pyproject.toml": '[tool.ruff.lint]\nselect = ["E", "F", "I"]\n',
    "requirements/common.txt": "regex\n",
    "LICENSE": "free\n",
    "PKG-INFO": (
        "Metadata-Version: 2.4\nName: vllm\nVersion: 9.9.0\nRequires-Dist: regex\n"
        "Requires-Dist: torch==1.0\nRequires-Dist: flash_infer==2.0\nProvides-Extra: bench\n"
        'Requires-Dist: pandas; extra == "bench"\n\nA toy.\nVersion: not a field\n'
    ),
    "vllm.egg-info/entry_points.txt": "[console_scripts]\nvllm = vllm:main\n",
    "vllm.egg-info/top_level.txt": "vllm\n",
}
KERNEL = bytes(range(256)) * 4000

HEADER = """\
Description: {title}
 Because the toy wants it; a plugin cannot, and never could.
Origin: fork
Forwarded: no
Remove-when: never
Test: {test}
Last-Update: 2026-01-02

"""
FIRST, SECOND = "core-raise-answer.patch", "worker-add-helper.patch"
BODIES = {
    FIRST: (
        "Raise the answer",
        "--- a/vllm/core.py\n+++ b/vllm/core.py\n@@ -6,4 +6,4 @@\n # line 6\n # line 7\n # line 8\n"
        "-answer = 41\n+answer = 42\n",
    ),
    SECOND: (
        "Add a helper",
        "--- a/vllm/core.py\n+++ b/vllm/core.py\n@@ -1,3 +1,4 @@\n+# first\n # line 1\n # line 2\n # line 3\n"
        "--- /dev/null\n+++ b/vllm/helper.py\n@@ -0,0 +1,2 @@\n+def help():\n+    return 1\n",
    ),
}


def mirror(name: str) -> str:
    return f"tests/patches/test_{name.removesuffix('.patch').replace('-', '_')}.py"


def patch_text(name: str) -> str:
    title, body = BODIES[name]
    return HEADER.format(title=title, test=mirror(name)) + body


def make_sdist(path: Path, files: dict[str, str], folder: str = "vllm-9.9.0") -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            data = text.encode()
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))


def make_wheel(path: Path) -> None:
    """A release wheel: the package's files and a compiled kernel."""
    info = "vllm-9.9.0.dist-info/"
    members = {n: t.encode() for n, t in RELEASE.items() if n.startswith("vllm/")}
    members["vllm/_C.abi3.so"] = KERNEL
    members[info + "METADATA"] = RELEASE["PKG-INFO"].encode()
    members[info + "WHEEL"] = b"Wheel-Version: 1.0\nTag: cp38-abi3-linux_x86_64\n"
    rows = {n: (wheels.record_hash(d), str(len(d))) for n, d in members.items()}
    rows[info + "RECORD"] = ("", "")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in members.items():
            out.writestr(name, data)
        out.writestr(info + "RECORD", wheels.format_record(rows))


def write_series(layout: fork.Layout, names: list[str]) -> None:
    lines = []
    for name in names:
        area = name.split("-")[0]
        if f"# {area}: toys" not in lines:
            lines.append(f"# {area}: toys")
        lines.append(name)
    layout.series.write_text("\n".join(lines) + "\n")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The toy fork's layout; its archive is in build/archives, its cache in tmp_path/cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    layout = fork.Layout(tmp_path / "fork")
    layout.archives.mkdir(parents=True)
    sdist, wheel = layout.archives / "vllm-9.9.0.tar.gz", layout.archives / "vllm-9.9.0-cp38-abi3-linux_x86_64.whl"
    make_sdist(sdist, RELEASE)
    make_wheel(wheel)
    sums = [hashlib.sha256(p.read_bytes()).hexdigest() for p in (sdist, wheel)]
    (layout.root / "UPSTREAM").write_text(
        f'# the toy\ntag = "v9.9.0"\ncommit = "abc123def"\nsdist = "{sdist.name}"\nsdist-sha256 = "{sums[0]}"\n'
        f'wheel = "{wheel.name}"\nwheel-sha256 = "{sums[1]}"\n'
    )
    (layout.root / "VERSION").write_text("9.9.0-3\n")
    layout.patches.mkdir()
    for name in BODIES:
        (layout.patches / name).write_text(patch_text(name))
        test = layout.root / mirror(name)
        test.parent.mkdir(parents=True, exist_ok=True)
        test.write_text("")
    write_series(layout, [FIRST, SECOND])
    (layout.root / "scripts").mkdir()
    for device in lock.DEVICES:
        requirements = layout.root / "scripts" / f"requirements-{device}.txt"
        requirements.write_text("-r ../build/tree/requirements/common.txt\n")
        lock.path_of(device, layout.root).write_text(lock.HEAD.format(device=device, digest=lock.digest(["regex"])))
    return layout
