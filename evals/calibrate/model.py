"""A Hugging Face model whose attention tells what each head looks at, and that can drop tokens by a profile's settings.

All of it happens in one attention function, so it works for every architecture that takes its attention from
transformers' registry. A dropped token stays in the computation, but no later layer sees its key: what the others get
is the same as without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from evals.bench.shapes import speaks_needle
from scripts.fork import ForkError
from tests.oracle.oracle import attention_weights
from tests.oracle.selection import SelectionRule, block_masses, forced_blocks, select_blocks

NAME = "uniprefill_calibration"
BLOCK = SelectionRule(top_p=1).block_size
WINDOWS = (8, 16, 32, 64, 128)
ROWS = 256  # whose attention is held at once
HOP_BLOCKS = 4


def text_config(model: Path) -> Any:
    """The config of the decoder.

    Raises:
        ForkError: if the model has no attention whose heads could be scored.

    """
    config = AutoConfig.from_pretrained(model).get_text_config()
    if getattr(config, "kv_lora_rank", None):
        raise ForkError(
            f"{model} uses MLA, whose keys are compressed for all heads together, so no head can be scored; choose a "
            "model with multi-head or grouped-query attention."
        )
    if not getattr(config, "num_attention_heads", None) or not full_layers(config):
        raise ForkError(f"{model} has no full-attention layer that could score a prompt; choose a model that has some.")
    return config


def full_layers(config: Any) -> list[int]:
    """Full-attention layers; the last layer is none, since nothing comes after it."""
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding" if getattr(config, "sliding_window", None) else "full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(types[:-1]) if kind in ("full_attention", "attention")]


def identity(config: Any) -> dict[str, Any]:
    """What tells the model that a profile is for."""
    heads = config.num_attention_heads
    return {
        "architecture": (config.architectures or ["unknown"])[0],
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
    }


def amount_rule(entry: Mapping[str, Any]) -> SelectionRule:
    """The oracle's rule for one of a profile's `selection_layers`."""
    return SelectionRule(
        entry.get("top_p"), entry.get("keep_ratio"), top_p_over="middle", num_queries=entry["num_queries"]
    )


def hop_blocks(mass: Tensor, middle: Tensor) -> Tensor:
    """Indices of the heaviest middle blocks, whose tokens ask once more. mass [blocks], middle [blocks] bool."""
    best = mass.masked_fill(~middle, -1.0).topk(min(HOP_BLOCKS, len(mass))).indices
    return best[mass[best].gt(0) & middle[best]]


@dataclass
class Watch:
    """What the attention function does in the forward passes of one prompt.

    Attributes:
        layers: those whose masses are recorded.
        with_hops: whether every block's attention is recorded too, not only the last queries'.
        cuts: `selection_layers` of a profile, by layer; tokens are dropped there.
        mass: by layer [heads, windows, blocks] fp32, the attention mass of each block from the last queries.
        hops: by layer [heads, asking blocks, blocks] fp32, without what a block says of itself.
        kept: alive prompt tokens after each cut.
        alive: [tokens] bool, None while all are.

    """

    layers: Sequence[int] = ()
    with_hops: bool = False
    cuts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    hops_asked: int = 1
    mass: dict[int, Tensor] = field(default_factory=dict)
    hops: dict[int, Tensor] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    alive: Tensor | None = None

    def attend(
        self, module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The model's attention over the keys alive, for a batch of one: query [1, heads, rows, head_dim], …"""
        rows, keys = query.shape[2], key.shape[2]
        if self.alive is not None:
            if rows == 1:  # an output token
                self.alive = F.pad(self.alive, (0, max(0, keys - len(self.alive))), value=True)
            mask = self._without_dropped(mask, rows, keys, query.device)
        out = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        layer = module.layer_idx
        if rows > 1 and (layer in self.layers or layer in self.cuts):
            terms = {"scale": kwargs["scaling"], "soft_cap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
            queries, all_keys = query[0].float(), key[0].float()
            if layer in self.layers:
                self._record(layer, queries, all_keys, terms)
            if layer in self.cuts:
                self._cut(self.cuts[layer], queries, all_keys, terms)
        return out

    def _without_dropped(self, mask: Tensor | None, rows: int, keys: int, device: torch.device) -> Tensor:
        assert self.alive is not None
        seen = self.alive[-keys:].to(device)
        if mask is None:
            mask = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
        # Every row sees itself: one without any key would be NaN, and spread.
        itself = torch.eye(rows, keys, dtype=torch.bool, device=device) if rows > 1 else torch.tensor(False)
        return mask & (seen | itself.to(device))

    def _record(self, layer: int, queries: Tensor, keys: Tensor, terms: dict[str, Any]) -> None:
        positions = torch.arange(keys.shape[1], device=keys.device)
        last = positions[-WINDOWS[-1] :]
        weights = _by_block(attention_weights(queries[:, last], keys, last, positions, **terms))
        self.mass[layer] = torch.stack([weights[:, -window:].sum(1) for window in WINDOWS], 1).cpu()
        if self.with_hops:
            asked = []
            for start in range(0, len(positions), ROWS):
                rows = positions[start : start + ROWS]
                end = int(rows[-1]) + 1
                part = _by_block(attention_weights(queries[:, rows], keys[:, :end], rows, positions[:end], **terms))
                part = F.pad(part, (0, -(-len(positions) // BLOCK) - part.shape[-1], 0, -part.shape[1] % BLOCK))
                asked.append(part.unflatten(1, (-1, BLOCK)).sum(2))
            self.hops[layer] = without_own(torch.cat(asked, 1)).cpu()

    def _cut(self, cut: Mapping[str, Any], queries: Tensor, keys: Tensor, terms: dict[str, Any]) -> None:
        total = keys.shape[1]
        if self.alive is None:
            self.alive = torch.ones(total, dtype=torch.bool)
        alive = self.alive.nonzero()[:, 0].to(keys.device)
        rule = amount_rule(cut)
        heads = torch.tensor(cut.get("heads") or range(queries.shape[0]), device=keys.device)

        def seen_from(rows: Tensor) -> Tensor:
            """[heads, rows, alive] of rows given among those alive."""
            asking = queries[:, alive[rows]]
            return attention_weights(asking, keys[:, alive], alive[rows], alive, **terms)[heads].cpu()

        tail = torch.arange(len(alive))[-rule.num_queries :].to(keys.device)
        mass = block_masses(seen_from(tail).sum((0, 1)), BLOCK)
        kept = select_blocks(mass, len(alive), rule).kept
        if self.hops_asked == 2:
            middle = ~forced_blocks(len(alive), rule)
            block_of = torch.arange(len(alive)) // BLOCK
            rows = torch.isin(block_of, hop_blocks(mass, middle)).nonzero()[:, 0]
            if len(rows):
                weights = seen_from(rows.to(keys.device)).sum(0)
                weights = weights.masked_fill(block_of[None] == block_of[rows][:, None], 0.0)
                kept |= select_blocks(block_masses(weights.sum(0), BLOCK), len(alive), rule).kept
        stays = kept.repeat_interleave(BLOCK)[: len(alive)]
        self.alive = torch.zeros(total, dtype=torch.bool)
        self.alive[alive[stays.to(alive.device)].cpu()] = True
        self.kept.append(int(stays.sum()))


def without_own(hops: Tensor) -> Tensor:
    """[heads, blocks, blocks] with nothing on the diagonal: a block says nothing of itself."""
    return hops.masked_fill(torch.eye(hops.shape[-1], dtype=torch.bool, device=hops.device), 0.0)


def _by_block(weights: Tensor) -> Tensor:
    """[..., keys] -> [..., blocks]."""
    return F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)


class WatchedModel:
    """A checkpoint in transformers, one prompt at a time.

    On a CPU in float32, since many CPUs multiply bf16 many times slower; on a GPU in the checkpoint's own type.
    """

    def __init__(self, path: Path) -> None:
        self.config = text_config(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if not self.tokenizer.is_fast:
            raise ForkError(f"{path} has no tokenizer.json, without which no token's place in a text is known; add it.")
        self.speaks_needle = speaks_needle(path)
        self.layers = full_layers(self.config)
        AttentionInterface.register(NAME, lambda *args, **kwargs: self._watch.attend(*args, **kwargs))
        AttentionMaskInterface.register(NAME, sdpa_mask)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "auto" if self.device == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=NAME)
        self.model = model.to(self.device).eval()

    @torch.inference_mode()
    def answer(self, ids: Sequence[int], max_new_tokens: int, watch: Watch) -> str:
        """The greedy completion; `watch` sees the prefill."""
        self._watch = watch
        tokens = torch.tensor([ids], device=self.device)
        out = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
