"""What works beside UniPrefill gives pruned requests the answers they have without it."""

from __future__ import annotations

import random

import pytest
from engines import engine, generate, recorded_selections
from oracle.checkpoints import make_checkpoint
from safetensors.torch import load_file
from vllm import SamplingParams, TokensPrompt
from vllm.inputs import EmbedsPrompt

VOCAB = 1024
CONFIG = {
    "selection_layers": [1, 2],
    "block_size": 32,
    "num_queries": 32,
    "sink_tokens": 32,
    "recent_tokens": 64,
    "min_prompt_tokens": 200,
    "top_p": 0.6,
}
NEAR_TIE = 0.1  # verified drafts are computed together, which rounds otherwise


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    return make_checkpoint(path, "llama", layers=4, hidden=128, heads=4, head_dim=32, seed=21)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(2)
    phrase = rng.choices(range(VOCAB), k=25)
    return [phrase * 20, rng.choices(range(VOCAB), k=700), phrase * 4]


@pytest.fixture(scope="module")
def plain(model, prompts):
    """Greedy tokens without any other feature, and the gap of the best two at each."""
    with engine(model, uniprefill=CONFIG, max_model_len=2048, max_logprobs=2) as llm:
        outputs = generate(llm, prompts, max_tokens=40, logprobs=2)
    assert [o.uniprefill["outcome"] for o in outputs] == ["pruned", "pruned", "dense"]
    assert all(o.uniprefill["segments"][-1]["tokens_out"] < len(p) for o, p in zip(outputs[:2], prompts, strict=False))
    tokens = [list(o.outputs[0].token_ids) for o in outputs]
    gaps = []
    for output in outputs:
        ranked = [sorted(e.logprob for e in step.values()) for step in output.outputs[0].logprobs]
        gaps.append([r[-1] - r[-2] for r in ranked])
    return tokens, gaps


def assert_same_tokens(outputs, plain) -> None:
    for output, right, gaps in zip(outputs, *plain, strict=True):
        found = list(output.outputs[0].token_ids)
        assert len(found) == len(right)
        differing = [i for i, (a, b) in enumerate(zip(found, right, strict=False)) if a != b]
        assert not differing or gaps[differing[0]] < NEAR_TIE, (differing, gaps[differing[0]])


def test_ngram_speculation(model, prompts, plain) -> None:
    """Verify rows, several a request, are placed behind the compacted prompt."""
    spec = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with engine(model, uniprefill=CONFIG, max_model_len=2048, speculative_config=spec, disable_log_stats=False) as llm:
        outputs = generate(llm, prompts, max_tokens=40)
        accepted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens")
    assert accepted > 0, "no draft was accepted, so nothing was verified"
    assert outputs[0].uniprefill["outcome"] == "pruned"
    assert_same_tokens(outputs, plain)


def test_sampling_features(model, prompts) -> None:
    """n > 1, logprobs, seeds, structured output and stop strings run on pruned requests."""
    with engine(model, uniprefill=CONFIG, max_model_len=2048) as llm:
        params = SamplingParams(
            n=3, temperature=1.0, seed=3, max_tokens=6, logprobs=2, extra_args={"uniprefill_report": 1}
        )
        prompt = TokensPrompt(prompt_token_ids=prompts[1])
        [first] = llm.generate([prompt], params, use_tqdm=False)
        [second] = llm.generate([prompt], params, use_tqdm=False)
        assert len(first.outputs) == 3 and first.uniprefill["outcome"] == "pruned"
        assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
        assert len({tuple(o.token_ids) for o in first.outputs}) > 1
        assert all(len(o.logprobs) == 6 for o in first.outputs)


def test_chunked_dense_prompt_beside_pruned_one(model, prompts, plain) -> None:
    """A dense prompt that is prefilled in chunks and a pruned one share steps."""
    rng = random.Random(9)
    long_dense = rng.choices(range(VOCAB), k=1900)
    config = CONFIG | {"pool_tokens": 0}
    with engine(model, uniprefill=config, max_model_len=2048, max_num_seqs=4, max_num_batched_tokens=900) as llm:
        [alone] = generate(llm, [long_dense], max_tokens=40, logprobs=2)
        assert alone.uniprefill["reason"] == "prompt_exceeds_pool"
        together = generate(llm, [long_dense, *prompts], max_tokens=40)
    ranked = [sorted(e.logprob for e in step.values()) for step in alone.outputs[0].logprobs]
    gaps = [r[-1] - r[-2] for r in ranked]
    assert_same_tokens(together[:1], ([list(alone.outputs[0].token_ids)], [gaps]))
    assert_same_tokens(together[1:], plain)


@pytest.mark.parametrize("budget", [2048, 300])
def test_prompt_embeddings(model, budget: int) -> None:
    """A prompt given as embeddings is pruned like the tokens they embed, in one step or several."""
    table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    prompt = random.Random(5).choices(range(VOCAB), k=700)
    with (
        engine(
            model,
            uniprefill=CONFIG,
            max_model_len=2048,
            max_num_batched_tokens=budget,
            enable_prompt_embeds=True,
        ) as llm,
        recorded_selections() as selections,
    ):
        [from_tokens] = generate(llm, [prompt], max_tokens=10)
        params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, extra_args={"uniprefill_report": 1})
        [from_embeds] = llm.generate([EmbedsPrompt(prompt_embeds=table[prompt])], params, use_tqdm=False)
        first, second = selections.of([from_tokens, from_embeds])
    assert from_embeds.uniprefill["segments"] == from_tokens.uniprefill["segments"]
    assert (from_embeds.uniprefill["steps"] > 1) == (budget < 700)
    assert first == second and len(first[-1]) < 700
    assert from_embeds.outputs[0].token_ids == from_tokens.outputs[0].token_ids
