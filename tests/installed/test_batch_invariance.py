"""What a request keeps and answers does not depend on what runs beside it."""

from __future__ import annotations

import random

import pytest
from engines import engine, generate, model_runner_of, recorded_selections
from oracle.checkpoints import make_checkpoint
from vllm import SamplingParams, TokensPrompt

VOCAB = 1024
LENGTHS = [10, 7000, 64, 1500, 300, 3000, 2048, 1100]
CONFIG = {"selection_layers": [2, 4, 6], "top_p": 0.9, "sink_tokens": 64, "recent_tokens": 128}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("llama"), "llama", seed=7)
    with engine(path, uniprefill=CONFIG, max_logprobs=5, max_num_batched_tokens=16_384) as llm:
        yield llm


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [rng.choices(range(VOCAB), k=n) for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(llm, prompts):
    """Each prompt by itself: outputs and kept sets."""
    with recorded_selections() as selections:
        outputs = [generate(llm, [prompt], max_tokens=8)[0] for prompt in prompts]
    return outputs, selections


def pruned(outputs) -> list[int]:
    return [i for i, o in enumerate(outputs) if o.uniprefill["outcome"] == "pruned"]


def assert_same(ours, our_selections, alone) -> None:
    outputs, selections = alone
    indices = pruned(outputs)
    assert indices == pruned(ours) == [i for i, n in enumerate(LENGTHS) if n >= 1024]
    expected = selections.of([outputs[i] for i in indices])
    found = our_selections.of([ours[i] for i in indices])
    differing = sum(
        len(set(a) ^ set(b))
        for one, other in zip(expected, found, strict=False)
        for a, b in zip(one, other, strict=False)
    )
    print(f"{differing} tokens of the kept sets differ")
    assert found == expected
    for one, other in zip(outputs, ours, strict=False):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.uniprefill == other.uniprefill


def test_same_in_a_batch_of_eight(llm, prompts, alone) -> None:
    with recorded_selections() as selections:
        together = generate(llm, prompts, max_tokens=8)
    assert_same(together, selections, alone)


def test_same_next_to_running_decodes(llm, prompts, alone) -> None:
    """Eight requests decode while each prompt is prefilled."""
    rng = random.Random(1)
    params = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    running = [
        llm.llm_engine.add_request(f"decode{i}", TokensPrompt(prompt_token_ids=rng.choices(range(VOCAB), k=n)), params)
        for i, n in enumerate([20, 1200, 700, 2000, 40, 1300, 90, 5])
    ]
    for _ in range(3):
        llm.llm_engine.step()
    outputs = []
    with recorded_selections() as selections:
        for i, prompt in enumerate(prompts):
            outputs.append(finish_one(llm, f"{i}", prompt))
    llm.llm_engine.abort_request(running, internal=True)
    assert_same(outputs, selections, alone)


def finish_one(llm, name: str, prompt: list[int]):
    """Run one request to its end among the engine's other ones."""
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, extra_args={"uniprefill_report": 1})
    llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), params)
    while True:
        for output in llm.llm_engine.step():
            if output.request_id == name and output.finished:
                return output


def test_mixed_step_holds_all_kinds_of_rows(llm, prompts) -> None:
    """One step prunes two prompts, prefills a dense one and decodes, and says so."""
    decode = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    engine_ = llm.llm_engine
    names = [engine_.add_request("d", TokensPrompt(prompt_token_ids=prompts[4]), decode)]
    engine_.step()
    batches = []
    state = model_runner_of(llm).model_state
    run_model = state.run_model

    def spy(model, inputs, batch):
        result = run_model(model, inputs, batch)
        batches.append((state.step_plan is not None, batch.num_scheduled_tokens.tolist()))
        return result

    state.run_model = spy
    try:
        for i in (1, 3, 2):
            names.append(engine_.add_request(f"p{i}", TokensPrompt(prompt_token_ids=prompts[i]), decode))
        engine_.step()
    finally:
        del state.run_model
        engine_.abort_request(names, internal=True)
    assert batches[-1][0]
    assert sorted(batches[-1][1]) == sorted([1, LENGTHS[1], LENGTHS[3], LENGTHS[2]])
