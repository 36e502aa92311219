"""Dense requests hit the prefix cache as in stock vLLM; a compacted block is never in it."""

from __future__ import annotations

import random

import pytest
from engines import SMALL_CUTS, engine, generate, scheduler_of
from oracle.checkpoints import make_checkpoint
from vllm import SamplingParams, TokensPrompt

VOCAB = 1024
CONFIG = SMALL_CUTS | {"keep_ratio": 0.3}
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return make_checkpoint(path, "llama", layers=4, hidden=128, heads=4, head_dim=32, seed=61)


def open_engine(model, uniprefill):
    return engine(model, uniprefill=uniprefill, max_model_len=1024, enable_prefix_caching=True, block_size=32)


def shared_prefixes() -> list[list[int]]:
    """Prompts that share prefixes of several lengths, whole blocks and parts of them."""
    rng = random.Random(3)
    trunk = rng.choices(range(VOCAB), k=700)
    prompts = [trunk[:cut] + rng.choices(range(VOCAB), k=40) for cut in (96, 300, 300, 511, 660, 660, 64)]
    return [*prompts, prompts[3], trunk]


def cached_blocks(llm) -> int:
    return len(scheduler_of(llm).kv_cache_manager.block_pool.cached_block_hash_to_block)


def dense(llm, prompt: list[int], **arguments):
    [output] = generate(llm, [prompt], max_tokens=NUM_TOKENS, **arguments)
    return output


@pytest.fixture(scope="module")
def stock(model) -> list[tuple[int, list[int]]]:
    """Without the flag: how many tokens of each prompt were cached, and the continuation."""
    with open_engine(model, None) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        found = []
        for prompt in shared_prefixes():
            [output] = llm.generate([TokensPrompt(prompt_token_ids=prompt)], params, use_tqdm=False)
            found.append((output.num_cached_tokens, list(output.outputs[0].token_ids)))
    assert sum(tokens > 0 for tokens, _ in found) >= 6, "the prompts share too little"
    return found


@pytest.fixture(scope="module")
def llm(model, stock):  # one engine at a time in a process
    with open_engine(model, CONFIG) as llm:
        yield llm


def test_pruned_requests_cache_nothing_and_read_nothing(llm) -> None:
    assert scheduler_of(llm).kv_cache_manager.reset_prefix_cache()
    before = cached_blocks(llm)
    for _ in range(2):
        [output] = generate(llm, [shared_prefixes()[-1]], max_tokens=40)  # its outputs fill a block
        assert output.uniprefill["outcome"] == "pruned" and output.num_cached_tokens == 0
        assert cached_blocks(llm) == before


def test_hit_rates_beside_pruned_requests_are_stocks(llm, stock) -> None:
    """Each dense prompt after a pruned request of the same prompt: same hits, same tokens."""
    assert scheduler_of(llm).kv_cache_manager.reset_prefix_cache()
    for prompt, (num_cached, tokens) in zip(shared_prefixes(), stock, strict=True):
        if len(prompt) >= CONFIG["min_prompt_tokens"]:
            [pruned] = generate(llm, [prompt], max_tokens=NUM_TOKENS)
            assert pruned.uniprefill["outcome"] == "pruned" and pruned.num_cached_tokens == 0
            assert pruned.uniprefill["segments"][-1]["tokens_out"] < len(prompt)
        output = dense(llm, prompt, uniprefill=0)
        assert output.num_cached_tokens == num_cached
        assert list(output.outputs[0].token_ids) == tokens


def test_in_flight_together(llm, stock) -> None:
    """The same prompt pruned and dense in one batch, and again while the cache is warm."""
    assert scheduler_of(llm).kv_cache_manager.reset_prefix_cache()
    prompt = shared_prefixes()[-1]
    _, tokens = stock[-1]
    core = llm.llm_engine
    alone = generate(llm, [prompt], max_tokens=NUM_TOKENS)[0]
    for expected in (0, len(prompt) // 32 * 32):
        for name, wanted in (("pruned", 1), ("dense", 0), ("pruned-too", 1)):
            extra = {"uniprefill": wanted, "uniprefill_report": 1}
            params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, extra_args=extra)
            core.add_request(f"{name}-{expected}", TokensPrompt(prompt_token_ids=prompt), params)
        outputs = {}
        while core.has_unfinished_requests():
            outputs |= {o.request_id.rsplit("-", 1)[0]: o for o in core.step() if o.finished}
        assert outputs["dense"].num_cached_tokens == expected
        assert list(outputs["dense"].outputs[0].token_ids) == tokens
        for name in ("pruned", "pruned-too"):
            assert outputs[name].num_cached_tokens == 0
            assert outputs[name].outputs[0].token_ids == alone.outputs[0].token_ids
