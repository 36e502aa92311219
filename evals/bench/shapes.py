"""What can be benchmarked: a model's shape, its prompts, and what is asked of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from evals.needle.prompts import TOKEN_ID, encode, make_prompt

NEEDLE_MODEL = Path(__file__).resolve().parents[1] / "needle" / "model"
TASK = "multikey"  # its answer is one token, so the first token tells

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Shape:
    """Defaults of one `--shape`.

    Attributes:
        efficiency_lengths: prompt lengths of the parts efficiency and breakdown.
        prune_by: what the TTFT part prunes by.

    """

    name: str
    lengths: tuple[int, ...]
    efficiency_lengths: tuple[int, ...]
    selection_layers: tuple[int, ...]
    keep_ratio: float
    prune_by: Literal["top_p", "keep_ratio"]


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
        ),
        Shape(
            name="llama-3.1-8b",
            lengths=(32768, 65536, 131072),
            efficiency_lengths=(131072,),
            selection_layers=(7,),
            keep_ratio=0.3,
            prune_by="keep_ratio",
        ),
    )
}


@contextmanager
def model_folder(shape: Shape, given: Path | None) -> Iterator[tuple[Path, str]]:
    """The model to load, and vLLM's `load_format` for it."""
    if given is not None or shape.name == "needle":
        yield given or NEEDLE_MODEL, "auto"
        return
    with TemporaryDirectory(prefix="bench-model-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_CONFIG))
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
