"""What can be benchmarked: a model's shape, its prompts, and what is asked of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from evals.bench.configs import GEMMA_3_12B_CONFIG, LLAMA_CONFIG, QWEN3_NEXT_CONFIG, TINY_CONFIG
from evals.needle.prompts import TOKEN_ID, encode, make_prompt

NEEDLE_MODEL = Path(__file__).resolve().parents[1] / "needle" / "model"
TASK = "multikey"  # its answer is one token, so the first token tells


@dataclass(frozen=True)
class Shape:
    """Defaults of one `--shape`.

    Attributes:
        efficiency_lengths: prompt lengths of the parts efficiency and breakdown.
        prune_by: what the TTFT part prunes by.
        traffic_length: prompt tokens of the part concurrency, and of the long prompts of poisson.
        kernel_lengths: prompt tokens of the part kernels.
        config: the model's Hugging Face config, for dummy weights; None: the needle model.

    """

    name: str
    lengths: tuple[int, ...]
    efficiency_lengths: tuple[int, ...]
    selection_layers: tuple[int, ...]
    keep_ratio: float
    prune_by: Literal["top_p", "keep_ratio"]
    traffic_length: int
    kernel_lengths: tuple[int, ...]
    config: dict[str, Any] | None = None


ON_A_GPU = {
    "lengths": (32768, 65536, 131072),
    "efficiency_lengths": (131072,),
    "keep_ratio": 0.3,
    "prune_by": "keep_ratio",
    "traffic_length": 16384,
    "kernel_lengths": (32768, 65536, 131072),
}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="needle",
            lengths=(2048, 4096, 8192, 16384, 32768),
            efficiency_lengths=(8192, 16384),
            selection_layers=(1, 3, 5),
            keep_ratio=0.2,
            prune_by="top_p",
            traffic_length=4096,
            kernel_lengths=(4096, 16384),
        ),
        Shape(name="llama-3.1-8b", selection_layers=(7,), config=LLAMA_CONFIG, **ON_A_GPU),
        # The published cuts; the engine refuses both models so far, the kernels do not.
        Shape(
            name="qwen3-next",
            selection_layers=tuple(range(7, 44, 4)),
            config=QWEN3_NEXT_CONFIG,
            **ON_A_GPU,
        ),
        Shape(name="gemma-3-12b", selection_layers=(29, 35, 41), config=GEMMA_3_12B_CONFIG, **ON_A_GPU),
        Shape(
            name="tiny",
            lengths=(1024, 2048),
            efficiency_lengths=(2048,),
            selection_layers=(1, 3),
            keep_ratio=0.3,
            prune_by="keep_ratio",
            traffic_length=1024,
            kernel_lengths=(1024,),
            config=TINY_CONFIG,
        ),
    )
}


@contextmanager
def model_folder(shape: Shape, given: Path | None) -> Iterator[tuple[Path, str]]:
    """The model to load, and vLLM's `load_format` for it."""
    if given is not None or shape.config is None:
        yield given or NEEDLE_MODEL, "auto"
        return
    with TemporaryDirectory(prefix="bench-model-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config))
        yield Path(folder), "dummy"


def speaks_needle(model: Path) -> bool:
    """Whether the model's vocabulary is the needle prompts' own."""
    file = model / "tokenizer.json"
    return file.is_file() and json.loads(file.read_text())["model"].get("vocab") == TOKEN_ID


@dataclass(frozen=True)
class Prompts:
    """Prompts of a model: needle questions where it knows the words, else random tokens."""

    needle: bool
    vocabulary: int

    @classmethod
    def of(cls, model: Path) -> Prompts:
        config = json.loads((model / "config.json").read_text())
        return cls(speaks_needle(model), config["vocab_size"])

    def ids(self, tokens: int, seed: int) -> list[int]:
        if self.needle:
            return encode(make_prompt(TASK, tokens, seed).text)
        return random.Random(f"{tokens}/{seed}").choices(range(self.vocabulary), k=tokens)

    def answered(self, tokens: int, seed: int, first_token: int) -> bool | None:
        """Whether the first token answers the prompt; None if it asks nothing."""
        if not self.needle:
            return None
        return first_token == TOKEN_ID[make_prompt(TASK, tokens, seed).answer]
