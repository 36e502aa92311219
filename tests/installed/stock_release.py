"""The pristine release, runnable on this machine, to compare the fork with.

On a CPU the release runs only with the platform section of the series; the core, worker and
serving patches are left out. Its compiled library is the one that the fork's build made, whose
sources those sections do not touch.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def stock_release(folder: Path) -> Path:
    """Write the release's package to `folder` and return it, ready for PYTHONPATH."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import tree
    from fork import Layout, read_series, read_version

    layout = Layout()
    platform = {name for name, area in read_series(layout.series) if area == "platform"}
    patches = [patch for patch in tree.load_series(layout) if patch.name in platform]
    shutil.copytree(layout.pristine / "vllm", folder / "vllm")
    for path, text in tree.apply_series(patches, layout.pristine).final.items():
        if path.startswith("vllm/"):
            tree.write_file(folder / path, text)
    for library in installed_package().glob("*.so"):
        shutil.copy(library, folder / "vllm")
    version = read_version().upstream + ("+cpu" if (folder / "vllm" / "_C.abi3.so").exists() else "")
    metadata = folder / f"vllm-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return folder


def installed_package() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
