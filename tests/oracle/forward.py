"""UniPrefill around a Hugging Face model's own forward: the truth for any architecture.

Its layers run as they are, in fp32, once over the prompt and the given output tokens;
hooks drop rows between them. Every layer then sees the compact sequence: rotary
positions are the original ones, masks and recurrent states know only the rows left.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from .oracle import Cut, attention_weights
from .selection import SelectionRule, block_masses, select_blocks

RECORDING = "recording"
# Layer index -> what its attention was called with: queries [H, T, D], keys [G, T, D], options.
_recorded: dict[int, tuple[Tensor, Tensor, dict[str, Any]]] = {}


def _record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any):
    _recorded[module.layer_idx] = query[0], key[0], options | {"sinks": getattr(module, "sinks", None)}
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(RECORDING, _record)
AttentionMaskInterface.register(RECORDING, eager_mask)


class ForwardOracle:
    """A causal LM of any family that transformers has, without tensor-parallel or cache."""

    def __init__(self, path: str | Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=RECORDING
        ).eval()
        self.layers: nn.ModuleList = self.model.get_decoder().layers

    @torch.inference_mode()
    def run(
        self,
        prompt_ids: list[int],
        output_ids: list[int],
        *,
        kept_sets: Sequence[list[int]] = (),
        selection_layers: Sequence[int] = (),
        rule: SelectionRule | None = None,
    ) -> tuple[list[Cut], Tensor]:
        """Drop all but `kept_sets` after each of `selection_layers`.

        Returns the cuts, each with what the rule would have chosen from the same
        rows, and the logits [1 + outputs, vocab] fp32 of the last prompt token and of
        the output tokens behind it.
        """
        num_prompt, num_tokens = len(prompt_ids), len(prompt_ids) + len(output_ids)
        rows = torch.arange(num_tokens)
        cuts: list[Cut] = []

        def enter(index: int, args: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            nonlocal rows
            hidden, *others = args or [options.pop("hidden_states")]
            if index - 1 in selection_layers:
                alive, kept = rows[rows < num_prompt], kept_sets[len(cuts)]
                cuts.append(Cut(index - 1, alive.tolist(), kept, _select(index - 1, alive, rule)))
                stay = torch.isin(rows, torch.tensor(kept)) | (rows >= num_prompt)
                rows, hidden = rows[stay], hidden[:, stay]
            options = {name: _of_rows(value, rows, num_tokens) for name, value in options.items()}
            return (hidden, *(_of_rows(value, rows, num_tokens) for value in others)), options

        hooks = [
            layer.register_forward_pre_hook(lambda _, args, options, i=i: enter(i, args, options), with_kwargs=True)
            for i, layer in enumerate(self.layers)
        ]
        try:
            logits = self.model(torch.tensor([prompt_ids + output_ids]), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
            _recorded.clear()
        return cuts, logits[-1 - len(output_ids) :]


def _select(layer: int, alive: Tensor, rule: SelectionRule | None):
    if rule is None:
        return None
    queries, keys, options = _recorded[layer]
    weights = attention_weights(
        queries[:, : len(alive)][:, -rule.num_queries :],
        keys[:, : len(alive)],
        alive[-rule.num_queries :],
        alive,
        scale=options["scaling"],
        soft_cap=options.get("softcap"),
        sinks=options["sinks"],
    )
    return select_blocks(block_masses(weights.sum((0, 1)), rule.block_size), len(alive), rule)


def _of_rows(value: Any, rows: Tensor, num_tokens: int) -> Any:
    """What a layer is given for all tokens, for these rows: masks know places, the rest positions."""
    if isinstance(value, tuple):
        return tuple(_of_rows(part, rows, num_tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 4 and value.shape[-2:] == (num_tokens, num_tokens):
        return value[..., : len(rows), : len(rows)]
    for dim, size in enumerate(value.shape):
        if size == num_tokens:
            return value.index_select(dim, rows)
    return value
