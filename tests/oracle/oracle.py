"""UniPrefill in plain fp32 torch on a Hugging Face model: the truth tests compare with.

Written from the text of the algorithm, for one request at a time. The modules
(projections, norms, MLP, rotary embedding) are Hugging Face's; the layer loop
and the attention are spelled out here, so that rows can be dropped.

    oracle = Oracle("path/to/checkpoint")
    result = oracle.run(prompt_ids, 5, selection_layers=[2, 4], top_p=0.9)

Shapes: T rows (tokens in this pass), H query heads, G KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .selection import Selection, SelectionRule, TwoHops, asking_blocks, block_masses, select_blocks

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "qwen3_moe", "mixtral")
QUERY_CHUNK = 256


@dataclass(frozen=True)
class Cut:
    """One selection layer. `alive` entered the layer, `kept` entered the next one:
    original positions of prompt tokens. `selection` is the choice by mass over
    `alive`; None where the drops were given without a rule. With given drops
    and a rule, it is what the rule would have chosen from the same `alive`."""

    layer: int
    alive: list[int]
    kept: list[int]
    selection: Selection | TwoHops | None

    def blocks_kept(self, kept: Sequence[int]) -> Tensor:
        """[blocks] bool: the blocks of `alive` that `kept` positions consist of;
        ValueError if they are not whole blocks."""
        assert self.selection is not None
        size = self.selection.rule.block_size
        index = {position: i for i, position in enumerate(self.alive)}
        mask = torch.zeros(len(self.selection.mass), dtype=torch.bool)
        mask[[index[position] // size for position in kept]] = True
        if list(kept) != _tokens_of(mask, self.alive, size):
            raise ValueError(f"layer {self.layer}: kept positions are not whole blocks")
        return mask


@dataclass(frozen=True)
class OracleResult:
    """cuts:           one per selection layer, empty when the request was dense.
    prefill_logits: [vocab] fp32, of the last prompt token.
    decode_logits:  [num_decode, vocab] fp32, row i after output token i was fed.
    tokens:         num_decode + 1 output tokens: given ones first, then greedy.
    """

    cuts: list[Cut]
    prefill_logits: Tensor
    decode_logits: Tensor
    tokens: list[int]

    @property
    def kept(self) -> list[list[int]]:
        """Per cut, the original positions of the prompt tokens kept."""
        return [cut.kept for cut in self.cuts]


@dataclass
class LayerCache:
    """Post-RoPE keys and values [G, T, D] fp32 of one layer, and their positions [T]."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], 1)
        self.values = torch.cat([self.values, values], 1)
        self.positions = torch.cat([self.positions, positions])


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [heads, T, D] by [T, R] tables; dimensions from R on pass."""
    turned, passed = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, passed], -1)


def attention_weights(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale) [H, queries, keys] fp32, causal by original position.

    `hidden` [queries, keys] bool: keys that a query does not see besides. queries [H, queries, D], keys [G, keys, D] with G dividing H, positions [T],
    sinks [H]: a logit per head that takes mass in the denominator only.
    """
    num_heads, num_queries, head_dim = queries.shape
    num_kv_heads, num_keys, _ = keys.shape
    grouped = queries.reshape(num_kv_heads, -1, head_dim)
    scores = (grouped @ keys.transpose(1, 2)).view(num_heads, num_queries, num_keys) * scale
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(key_positions[None, :] > query_positions[:, None], -torch.inf)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.view(num_heads, 1, 1).expand(num_heads, num_queries, 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def attend(
    queries: Tensor,
    cache: LayerCache,
    positions: Tensor,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """Attention output [T, H * D] of `queries` [H, T, D] at ascending `positions` [T].

    A window counts the tokens that the layer holds, whatever their positions.
    """
    ranks = torch.searchsorted(cache.positions, positions)
    outputs = []
    for start in range(0, len(positions), QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        # Positions ascend in the cache too: what is past the chunk's last one is masked.
        end = int((cache.positions <= positions[chunk][-1]).sum())
        hidden = None if window is None else torch.arange(end) <= ranks[chunk, None] - window
        weights = attention_weights(
            queries[:, chunk],
            cache.keys[:, :end],
            positions[chunk],
            cache.positions[:end],
            scale=scale,
            soft_cap=soft_cap,
            sinks=sinks,
            hidden=hidden,
        )
        num_heads, num_queries, _ = weights.shape
        values = cache.values[:, :end]
        grouped = weights.view(values.shape[0], -1, end) @ values
        outputs.append(grouped.view(num_heads, num_queries, -1).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


class Oracle:
    """A causal LM in fp32 (bf16 checkpoints are upcast exactly) that can drop tokens."""

    def __init__(self, path: str | Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        if model.config.model_type not in MODEL_TYPES:
            raise ValueError(f"model type {model.config.model_type!r} is not one of {MODEL_TYPES}")
        self._adopt(model, model.model)

    def _adopt(self, model: PreTrainedModel, decoder: nn.Module) -> None:
        """`decoder` is the part of `model` that has embed_tokens, layers, rotary_emb and norm."""
        self.model = model.eval()
        self.decoder = decoder
        config = decoder.config
        types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        if getattr(config, "sliding_window", None) is not None and set(types) == {"full_attention"}:
            raise ValueError("a sliding window needs layer_types that say where it is")
        self.windows = [config.sliding_window if kind == "sliding_attention" else None for kind in types]
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.layers: nn.ModuleList = decoder.layers

    @torch.inference_mode()
    def run(
        self,
        prompt_ids: list[int],
        num_decode: int,
        *,
        selection_layers: Sequence[int],
        top_p: float | None = None,
        keep_ratio: float | None = None,
        top_p_over: Literal["all", "middle"] = "all",
        block_size: int = 64,
        num_queries: int = 128,
        sink_tokens: int = 128,
        recent_tokens: int = 128,
        hops: Literal[1, 2] = 1,
        hop_blocks: int = 4,
        of_layer: Mapping[int, Mapping[str, Any]] | None = None,
        min_prompt_tokens: int = 0,
        forced_tokens: list[int] | None = None,
        kept_sets: list[list[int]] | None = None,
        num_resumed: int = 0,
    ) -> OracleResult:
        """Prefill `prompt_ids`, then `num_decode` decode steps.

        Tokens are dropped after each of `selection_layers` (0-based, ascending,
        not the last layer); none, or a prompt shorter than `min_prompt_tokens`,
        makes the request dense. `kept_sets` gives the positions kept at each
        cut instead of choosing them. Output token i is `forced_tokens[i]` as
        far as that list goes, else the greedy one. `of_layer` gives fields of the
        rule that a selection layer has otherwise, `heads` among them.

        `num_resumed`: a preempted request resumes. The first so many of
        `forced_tokens` were generated before and are prefilled together with
        the prompt; the result must equal that of an uninterrupted run.
        """
        given = list(forced_tokens or [])
        if not 0 <= num_resumed <= min(num_decode, len(given)):
            raise ValueError("num_resumed exceeds num_decode or the forced tokens")
        if len(prompt_ids) < min_prompt_tokens:
            selection_layers, kept_sets = [], None
        cut_layers = list(selection_layers)
        if cut_layers != sorted(set(cut_layers) & set(range(len(self.layers) - 1))):
            raise ValueError("selection layers must ascend, and the last layer is none")
        if kept_sets is not None and len(kept_sets) != len(cut_layers):
            raise ValueError("kept_sets needs one set per selection layer")
        rule: SelectionRule | None = None
        if cut_layers and (kept_sets is None or top_p is not None or keep_ratio is not None):
            rule = SelectionRule(
                top_p,
                keep_ratio,
                top_p_over,
                block_size,
                num_queries,
                sink_tokens,
                recent_tokens,
                hops=hops,
                hop_blocks=hop_blocks,
            )
        rules = {layer: rule and replace(rule, **(of_layer or {}).get(layer, {})) for layer in cut_layers}

        caches: list[LayerCache] = []
        cuts, logits = self._prefill(prompt_ids, given[:num_resumed], rules, kept_sets, caches)
        rows = list(logits)
        tokens: list[int] = []
        while True:
            step = len(tokens)
            tokens.append(given[step] if step < len(given) else int(rows[step].argmax()))
            if step == num_decode:
                break
            if step >= num_resumed:
                rows.append(self._decode(tokens[step], len(prompt_ids) + step, caches))
        decode_logits = torch.stack(rows[1:]) if num_decode else logits.new_empty(0, len(rows[0]))
        return OracleResult(cuts, rows[0], decode_logits, tokens)

    def _prefill(
        self,
        prompt_ids: list[int],
        resumed: list[int],
        rules: Mapping[int, SelectionRule | None],
        kept_sets: list[list[int]] | None,
        caches: list[LayerCache],
    ) -> tuple[list[Cut], Tensor]:
        """Fill `caches`, one per layer. Returns the cuts, and the logits
        [1 + resumed, vocab] of the last prompt token and of the resumed ones."""
        num_prompt = len(prompt_ids)
        ids = torch.tensor(prompt_ids + resumed)
        positions = torch.arange(len(ids))
        hidden = self._embed(ids, positions)
        cuts: list[Cut] = []
        for index in range(len(self.layers)):
            queries, keys, values = self._project(index, hidden, positions)
            caches.append(LayerCache(keys, values, positions))
            hidden = self._finish_layer(index, hidden, queries, caches[index], positions)
            if index in rules:
                given = None if kept_sets is None else kept_sets[len(cuts)]
                cut = self._cut(index, queries, keys, positions[positions < num_prompt], rules[index], given)
                cuts.append(cut)
                alive = torch.isin(positions, torch.tensor(cut.kept)) | (positions >= num_prompt)
                hidden, positions = hidden[alive], positions[alive]
        return cuts, self._logits(hidden[positions >= num_prompt - 1])

    def _decode(self, token: int, position: int, caches: list[LayerCache]) -> Tensor:
        """Feed one output token at its original position; logits [vocab]."""
        positions = torch.tensor([position])
        hidden = self._embed(torch.tensor([token]), positions)
        for index, cache in enumerate(caches):
            queries, keys, values = self._project(index, hidden, positions)
            cache.append(keys, values, positions)
            hidden = self._finish_layer(index, hidden, queries, cache, positions)
        return self._logits(hidden)[0]

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """[T] token ids at `positions` [T] -> [T, hidden]."""
        return self.decoder.embed_tokens(ids)

    def _rotary_positions(self, positions: Tensor) -> Tensor:
        """What the rotary embedding takes for tokens at `positions` [T]: [1, T]."""
        return positions[None]

    def _cut(
        self,
        index: int,
        queries: Tensor,
        keys: Tensor,
        alive: Tensor,
        rule: SelectionRule | None,
        given: list[int] | None,
    ) -> Cut:
        """Choose among the `alive` [n] prompt positions. Queries [H, T, D] and
        keys [G, T, D] start with the rows of those; output tokens' rows follow."""
        selection = None
        kept = given
        if rule is not None:
            selection = self._select(index, queries, keys, alive, rule)
            if kept is None:
                kept = _tokens_of(selection.kept, alive.tolist(), rule.block_size)
        assert kept is not None
        if kept != sorted(set(kept) & set(alive.tolist())) or int(alive[-1]) not in kept:
            raise ValueError(f"layer {index}: kept positions must ascend, be alive and hold the last one")
        return Cut(index, alive.tolist(), kept, selection)

    def _select(
        self, index: int, queries: Tensor, keys: Tensor, alive: Tensor, rule: SelectionRule
    ) -> Selection | TwoHops:
        """Choose blocks of the `alive` [n] tokens by the rule's hops."""
        size, token = rule.block_size, torch.arange(len(alive))
        weights = self._weights(index, queries, keys, alive, token[-rule.num_queries :], rule)
        first = select_blocks(block_masses(weights.sum((0, 1)), size), len(alive), rule)
        if rule.hops == 1:
            return first
        asking, margin = asking_blocks(first)
        if not asking:
            return first
        rows = token[torch.isin(token // size, torch.tensor(asking))]
        weights = self._weights(index, queries, keys, alive, rows, rule)
        own = token // size == (rows // size)[:, None]
        mass = block_masses(weights.masked_fill(own, 0).sum((0, 1)), size)
        second = select_blocks(mass, len(alive), replace(rule, top_p_over="middle"))
        return TwoHops(first, second, asking, margin)

    def _weights(
        self, index: int, queries: Tensor, keys: Tensor, alive: Tensor, rows: Tensor, rule: SelectionRule
    ) -> Tensor:
        """[heads, rows, n] fp32: what the queries of these alive tokens pay to each, by scoring head."""
        attention, end = self._attention(index), len(alive)
        heads = list(rule.heads or range(self.num_heads))
        if attention["sinks"] is not None:
            attention["sinks"] = attention["sinks"][heads]
        own_keys = keys[[head * self.num_kv_heads // self.num_heads for head in heads], :end]
        return attention_weights(queries[heads][:, rows], own_keys, alive[rows], alive, **attention)

    def _attention(self, index: int) -> dict:
        """The layer's own scale, soft cap and sinks."""
        module = self.layers[index].self_attn
        return {
            "scale": module.scaling,
            "soft_cap": getattr(module, "attn_logit_softcapping", None),
            "sinks": getattr(module, "sinks", None),
        }

    def _project(self, index: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Post-RoPE queries [H, T, D], keys and values [G, T, D] of `hidden` [T, hidden]."""
        layer = self.layers[index]
        module, normed = layer.self_attn, layer.input_layernorm(hidden)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        if hasattr(module, "qkv_proj"):
            fused = module.qkv_proj(normed)
            parts = fused.split([count * module.head_dim for count in heads], -1)
        else:
            parts = (module.q_proj(normed), module.k_proj(normed), module.v_proj(normed))
        queries, keys, values = (
            part.view(len(positions), count, module.head_dim) for part, count in zip(parts, heads, strict=True)
        )
        if hasattr(module, "q_norm"):
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        cos, sin = (table[0] for table in self.decoder.rotary_emb(normed, self._rotary_positions(positions)))
        queries, keys, values = (part.transpose(0, 1) for part in (queries, keys, values))
        return rotate(queries, cos, sin), rotate(keys, cos, sin), values

    def _finish_layer(
        self, index: int, hidden: Tensor, queries: Tensor, cache: LayerCache, positions: Tensor
    ) -> Tensor:
        """Attention, residuals and MLP: the layer's output [T, hidden]."""
        layer = self.layers[index]
        attended = attend(queries, cache, positions, **self._attention(index), window=self.windows[index])
        hidden = hidden + layer.self_attn.o_proj(attended)
        # A batch of one: mixtures of experts want three dimensions.
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)[None])[0]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[T, hidden] -> [T, vocab]."""
        return self.model.lm_head(self.decoder.norm(hidden))


def _tokens_of(blocks: Tensor, alive: list[int], block_size: int) -> list[int]:
    """Positions of `alive` whose block is set in `blocks` ([blocks] bool)."""
    chosen = blocks.tolist()
    return [position for i, position in enumerate(alive) if chosen[i // block_size]]
