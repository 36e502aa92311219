"""With drops, vLLM selects and computes what an independent fp32 implementation does."""

from __future__ import annotations

import random

import pytest
import torch
from engines import engine, generate, recorded_selections
from oracle.checkpoints import make_checkpoint
from oracle.oracle import Oracle

VOCAB = 1024
# A block is contested where masses that differ by this factor could decide it otherwise:
# bf16 keeps 8 bits, and a block's mass is a sum over many rounded exponentials.
MASS_TOLERANCE = 0.02
MAX_RELATIVE_ERROR = 0.01
# Where the logits of the last expert chosen and the next one are as close as this, rounding may choose
# the other one, for this token and, with less effect, for the ones that it attends to.
ROUTER_TOLERANCE = 0.1
MAX_ERROR_WITH_EXPERTS = 0.015
MAX_SHARE_REROUTED = 0.05

MODELS = {
    "llama-gqa2-tied": {"family": "llama", "heads": 4, "kv_heads": 2, "tied": True},
    "llama-gqa4-untied": {"family": "llama", "heads": 4, "kv_heads": 1, "tied": False, "seed": 1},
    "qwen3-gqa2-untied": {"family": "qwen3", "heads": 4, "kv_heads": 2, "tied": False, "seed": 2},
    "qwen3-mha-tied": {"family": "qwen3", "heads": 4, "kv_heads": 4, "tied": True, "seed": 3},
    "qwen2-gqa2-tied": {"family": "qwen2", "heads": 4, "kv_heads": 2, "tied": True, "seed": 4},
    "mistral-gqa2-untied": {"family": "mistral", "heads": 4, "kv_heads": 2, "tied": False, "seed": 5},
    "qwen3_moe-gqa2-untied": {"family": "qwen3_moe", "heads": 4, "kv_heads": 2, "tied": False, "seed": 7},
    "mixtral-gqa2-tied": {"family": "mixtral", "heads": 4, "kv_heads": 2, "tied": True, "seed": 8},
    "phi3-gqa2-untied": {"family": "phi3", "heads": 4, "kv_heads": 2, "tied": False, "seed": 6},
}
WINDOW = 200  # before, between and behind the cuts
MODELS["llama-windows"] = {"family": "llama", "seed": 9, "window": WINDOW, "full": (2, 4, 6)}
WHOLE = 6144  # tokens a step: any prompt fits one
LAYERS = [2, 4, 6]
LAYER_COUNT = 8
# What is asked for, the prompt's tokens, outputs behind the first; the first case sends all of them.
REQUESTS = [
    ({"top_p": 0.9}, 3333, 32),
    ({"keep_ratio": 0.3}, 2500, 4),
    ({"top_p": 0.99}, 2000, 4),
    ({"top_p": 0.7}, 1500, 4),
    ({"top_p": 0.5}, 4096, 4),
]
COMMON = 2


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).norm() / truth.norm())


def logits_of(output) -> torch.Tensor:
    """[steps, vocab] fp32 raw logits of a request that asked for all of them."""
    rows = torch.empty(len(output.outputs[0].logprobs), VOCAB)
    for row, entries in zip(rows, output.outputs[0].logprobs, strict=False):
        row[list(entries)] = torch.tensor([entry.logprob for entry in entries.values()])
    return rows


def random_prompt(num_tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=num_tokens)


def router_margins(oracle: Oracle) -> list[float]:
    """A list that gets, from every layer that runs, by how much its last row's experts were chosen; if it has any."""
    margins: list[float] = []

    def record(gate: torch.nn.Module, inputs: tuple[torch.Tensor], _) -> None:
        logits = torch.nn.functional.linear(inputs[0].flatten(0, -2)[-1], gate.weight).sort(descending=True).values
        chosen = oracle.model.config.num_experts_per_tok
        margins.append(float(logits[chosen - 1] - logits[chosen]))

    for layer in oracle.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.gate.register_forward_hook(record)
    return margins


CASES = [
    *((model, "all", WHOLE) for model in MODELS),
    *((model, "middle", WHOLE) for model in ("llama-gqa2-tied", "qwen3-gqa2-untied")),
    # Few heads, unlike in each layer, and a second hop; whole, and in the lane.
    ("llama-gqa2-tied", "few heads", WHOLE),
    ("qwen3-mha-tied", "few heads", 1000),
    # Each prompt takes the lane; the last chunks cut through the queries that score.
    ("llama-gqa2-tied", "all", 1000),
    ("qwen3_moe-gqa2-untied", "all", 1000),
    ("llama-windows", "all", 1000),
]


FEW_HEADS = {2: {"heads": [3], "num_queries": 8}, 4: {"heads": [0, 2, 3], "keep_ratio": 0.6}, 6: {"num_queries": 32}}


@pytest.mark.parametrize(("model", "variant", "budget"), CASES)
def test_agrees_with_oracle(model: str, variant: str, budget: int, tmp_path) -> None:
    """Kept sets are the oracle's but for contested blocks, logits within 1 %."""
    few_heads = variant == "few heads"
    rule = {"hops": 2, "hop_blocks": 3} if few_heads else {"top_p_over": variant}
    if model == "llama-windows":
        rule["recent_tokens"] = WINDOW  # as the engine raises it by itself
    layers = [{"layer": layer} | FEW_HEADS[layer] for layer in LAYERS] if few_heads else LAYERS
    path = make_checkpoint(tmp_path / "model", **MODELS[model])
    oracle = Oracle(path)
    margins = router_margins(oracle)
    contested = worst = dropped = rerouted = others_asked = 0
    requests = REQUESTS if (model, variant, budget) == CASES[0] else REQUESTS[:COMMON]
    with (
        engine(
            path,
            uniprefill={"selection_layers": layers} | {k: v for k, v in rule.items() if k != "recent_tokens"},
            max_num_batched_tokens=budget,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        ) as llm,
        recorded_selections() as selections,
    ):
        for setting, num_tokens, num_decode in requests:
            prompt = random_prompt(num_tokens, seed=num_tokens)
            [output] = generate(
                llm,
                [prompt],
                max_tokens=num_decode + 1,
                logprobs=-1,
                **{f"uniprefill_{key}": value for key, value in setting.items()},
            )
            assert output.uniprefill["outcome"] == "pruned"
            assert (output.uniprefill["steps"] > 1) == (budget != WHOLE)
            [kept] = selections.of([output])
            tokens = list(output.outputs[0].token_ids)
            margins.clear()
            # A request's own budget goes before a layer's.
            of_layer = {
                layer: {name: value for name, value in scorer.items() if name != "keep_ratio"}
                for layer, scorer in FEW_HEADS.items()
            }
            truth = oracle.run(
                prompt,
                num_decode,
                selection_layers=LAYERS,
                of_layer=of_layer if few_heads else None,
                forced_tokens=tokens,
                kept_sets=kept,
                **rule,
                **setting,
            )
            for cut, ours in zip(truth.cuts, kept, strict=True):
                if getattr(cut.selection, "asking_margin", 1) < MASS_TOLERANCE:
                    others_asked += 1
                    continue
                differs = cut.blocks_kept(ours) != cut.selection.kept
                undecided = cut.selection.undecided(MASS_TOLERANCE)
                assert not (differs & ~undecided).any(), f"{setting}: layer {cut.layer}"
                contested += int(differs.sum())
                dropped += len(cut.alive) - len(ours)
            reported = [segment["tokens_out"] for segment in output.uniprefill["segments"]]
            assert reported == [len(cut) for cut in kept] + [len(kept[-1])]
            ours = logits_of(output)
            for step, logits in enumerate([truth.prefill_logits, *truth.decode_logits]):
                error = relative_error(ours[step], logits)
                if margins and min(margins[step * LAYER_COUNT : (step + 1) * LAYER_COUNT]) < ROUTER_TOLERANCE:
                    rerouted += error > MAX_RELATIVE_ERROR
                    continue
                worst = max(worst, error)
                assert error <= (MAX_ERROR_WITH_EXPERTS if margins else MAX_RELATIVE_ERROR), f"{setting}: output {step}"
    assert others_asked <= len(requests), "most of the cuts are to be compared"
    assert dropped > 0, "nothing was dropped, so nothing was tested"
    assert rerouted <= MAX_SHARE_REROUTED * sum(num_decode + 1 for _, _, num_decode in requests)
    print(
        f"{model} {variant} {budget}: {others_asked} cuts by other blocks, {contested} contested, worst error {worst:.4f}, {rerouted} rerouted"
    )
