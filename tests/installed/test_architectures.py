"""Layers of every kind compute behind a cut what Hugging Face's own compute on the rows that are left.

In float32, where nothing hides an error, but for Qwen3-Next: the release's CPU kernels of its recurrent
layers take bfloat16 only, so there the error may be what the same request's is without drops.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from engines import engine, generate, recorded_selections
from oracle.families import make_family_checkpoint
from oracle.forward import ForwardOracle
from oracle.selection import SelectionRule
from test_oracle_agreement import MASS_TOLERANCE, MAX_RELATIVE_ERROR, logits_of, random_prompt, relative_error
from test_random_traffic import assert_nothing_left
from torch import Tensor
from vllm import SamplingParams, TokensPrompt, _custom_ops
from vllm.model_executor.layers.mamba import mamba_mixer

NUM_PROMPT = 900
NUM_DECODE = 32
FORCED = {"sink_tokens": 16, "recent_tokens": 32}
CONFIG = {"min_prompt_tokens": 200, "block_size": 16, "num_queries": 16, "keep_ratio": 0.5} | FORCED
MAX_ERROR_IN_FLOAT32 = 1e-4
LANE = 256  # tokens a step
WHOLE = 1024
NEEDS_TORCHVISION = pytest.mark.skipif(find_spec("torchvision") is None, reason="vLLM's file imports torchvision")
BF16_ONLY = ("qwen3_next", "qwen3_5_text")


def open_engine(path, budget: int, dtype: str = "float32"):
    lengths = {"max_model_len": 1024, "max_num_batched_tokens": budget, "kv_cache_memory_bytes": 1 << 28}
    return engine(path, uniprefill=CONFIG, dtype=dtype, max_logprobs=-1, logprobs_mode="raw_logits", **lengths)


def mamba1(state: Tensor, x: Tensor, step: Tensor, decay, write: Tensor, read: Tensor, skip, gate: Tensor, bias):
    """A token's (state [..., D, N], output [..., D]): the release has Mamba 1's recurrence for GPUs only."""
    step = torch.nn.functional.softplus(step + bias)[..., None]
    state = state * torch.exp(step * decay) + step * write[..., None, :] * x[..., None]
    return state, ((state * read[..., None, :]).sum(-1) + skip * x) * torch.nn.functional.silu(gate)


def mamba1_prefill(
    x, step, decay, write, read, skip, gate, bias, softplus, starts, slots, goes_on, states, *others
) -> None:
    """In place of vLLM's `selective_scan_fwd`: fills `gate` [D, T] and the slots' `states` [slots, D, N]."""
    for slot, resumes, start, end in zip(slots, goes_on, starts, starts[1:], strict=False):
        state = states[slot] * resumes
        for t in range(start, end):
            token = (x[:, t], step[:, t], decay, write[0, :, t], read[0, :, t], skip, gate[:, t], bias)
            state, gate[:, t] = mamba1(state, *token)
        states[slot] = state


def mamba1_decode(
    states, x, step, decay, write, read, skip, bias, z, dt_softplus, state_batch_indices, dst_state_batch_indices, out
) -> None:
    """In place of vLLM's `selective_state_update`: fills `out` [B, D]."""
    token = (x, step, decay, write, read, skip, z, bias)
    states[dst_state_batch_indices], out[:] = mamba1(states[state_batch_indices], *token)


@pytest.mark.parametrize(
    ("family", "budget"),
    [
        ("nemotron_h", WHOLE),
        ("nemotron_h", LANE),
        ("qwen3_next", WHOLE),
        ("qwen3_next", LANE),
        ("falcon_h1", WHOLE),
        ("granitemoehybrid", LANE),
        ("jamba", WHOLE),
        ("jamba", LANE),
        ("gemma2", WHOLE),
        ("gemma3_text", LANE),
        ("lfm2", WHOLE),
        ("gpt_oss", LANE),
        ("deepseek_v2", WHOLE),
        ("deepseek_v3", WHOLE),
        pytest.param("qwen3_5_text", WHOLE, marks=NEEDS_TORCHVISION),
    ],
)
def test_agrees_with_oracle(family: str, budget: int, tmp_path, monkeypatch) -> None:
    if family == "jamba" and not torch.cuda.is_available():
        monkeypatch.setattr(_custom_ops, "selective_scan_fwd", mamba1_prefill)
        monkeypatch.setattr(mamba_mixer, "selective_state_update", mamba1_decode)
    path = make_family_checkpoint(tmp_path / "m", family)
    prompt = random_prompt(NUM_PROMPT, seed=1)
    ask = {"logprobs": -1}
    dtype = "bfloat16" if family in BF16_ONLY else "float32"
    with open_engine(path, budget, dtype) as llm, recorded_selections() as selections:
        rule = llm.llm_engine.vllm_config.uniprefill_config
        [dense] = generate(llm, [prompt], max_tokens=4, uniprefill=0, **ask)
        [whole] = generate(llm, [prompt], max_tokens=4, uniprefill_keep_ratio=1.0, **ask)
        [pruned] = generate(llm, [prompt], max_tokens=NUM_DECODE + 1, **ask)
        [kept] = selections.of([pruned])
        assert_nothing_left(llm)
    assert pruned.uniprefill["outcome"] == "pruned"
    assert (pruned.uniprefill["steps"] > 1) == (budget == LANE)
    assert len(kept[-1]) <= 0.55 * NUM_PROMPT
    if family.startswith("deepseek"):  # has blocks of 16 tokens
        _, *later = pruned.uniprefill["kv_blocks"]
        assert later and all(group["returned"] > 10 for group in later)
    if budget == WHOLE:
        assert torch.equal(logits_of(dense), logits_of(whole))

    oracle = ForwardOracle(path)
    layers = [entry.layer for entry in rule.selection_layers]
    of_rule = SelectionRule(None, 0.5, block_size=16, num_queries=16, sink_tokens=16, recent_tokens=rule.recent_tokens)
    drops = {"kept_sets": kept, "selection_layers": layers, "rule": of_rule}

    def errors(output, **drops) -> list[float]:
        cuts, truth = oracle.run(prompt, list(output.outputs[0].token_ids)[:-1], **drops)
        for cut, ours in zip(cuts, kept, strict=False):
            differs = cut.blocks_kept(ours) != cut.selection.kept
            assert not (differs & ~cut.selection.undecided(MASS_TOLERANCE)).any(), f"layer {cut.layer}"
        return [relative_error(ours, right) for ours, right in zip(logits_of(output), truth, strict=True)]

    unpruned, found = errors(dense), errors(pruned, **drops)
    other = min(errors(pruned))
    print(f"{family} {budget}: dense {max(unpruned):.1e}, pruned {max(found):.1e}, with no drops {other:.1e}")
    limit = MAX_ERROR_IN_FLOAT32 if dtype == "float32" else max(MAX_RELATIVE_ERROR, 1.5 * max(unpruned))
    assert max(found) <= limit
    assert other > 2 * limit, "dropping changes too little to be tested"


def test_recurrent_states_beside_others(tmp_path) -> None:
    """A step of old pruned decodes, a prompt in the lane, a chunked dense one and a new short one: each as alone."""
    path = make_family_checkpoint(tmp_path / "m", "nemotron_h")
    prompts = {"old": random_prompt(250, 2), "lane": random_prompt(900, 3), "dense": random_prompt(700, 4)}
    prompts["new"] = random_prompt(40, 5)
    extra = {name: {"uniprefill": int(name != "dense"), "uniprefill_report": 1} for name in prompts}

    def params(name: str) -> SamplingParams:
        return SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, extra_args=extra[name])

    with open_engine(path, LANE) as llm:
        alone = {
            name: llm.generate([TokensPrompt(prompt_token_ids=prompt)], params(name), use_tqdm=False)[0]
            for name, prompt in prompts.items()
        }
        together = {}
        for name, prompt in prompts.items():
            llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params(name))
            if name == "old":
                llm.llm_engine.step()
        while llm.llm_engine.has_unfinished_requests():
            together |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        assert_nothing_left(llm)
    assert together["lane"].uniprefill["steps"] > 4 and together["old"].uniprefill["outcome"] == "pruned"
    for name, output in together.items():
        assert output.outputs[0].token_ids == alone[name].outputs[0].token_ids, name
