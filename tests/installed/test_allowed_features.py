"""Features that are allowed beside UniPrefill work on pruned requests, and what cannot be pruned says why."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import torch
from engines import engine, generate, recorded_selections
from oracle.checkpoints import make_checkpoint
from oracle.oracle import Oracle
from oracle.quantised import quantise_checkpoint
from test_oracle_agreement import MASS_TOLERANCE, MAX_RELATIVE_ERROR, logits_of, relative_error
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.engine.protocol import StreamingInput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from evals.live_server import NEEDLE_MODEL
from evals.needle.prompts import VALUES, is_correct, make_prompt

VOCAB = 1024
LAYERS = [1, 2]
CONFIG = {"selection_layers": LAYERS, "min_prompt_tokens": 300}
TOP_P = 0.8
NUM_DECODE = 8
FP8_MAX_RELATIVE_ERROR = 0.1  # e4m3 keeps 4 bits of each key and value


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


JSON_WORDS = ["{", "}", '"', ":", ",", "true", "false", "left", "right", "ok", "side", "<eos>"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights, and a tokenizer that has the words of JSON among its own."""
    path = tmp_path_factory.mktemp("models") / "llama"
    make_checkpoint(path, "llama", layers=4, seed=31)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    names = JSON_WORDS + [f"w{i}" for i in range(VOCAB - len(JSON_WORDS))]
    tokenizer["model"] |= {"vocab": {name: i for i, name in enumerate(names)}, "unk_token": names[-1]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<eos>"}))
    return path


def errors_of(llm, oracle: Oracle, prompt: list[int], top_p: float) -> list[float]:
    """Relative logit errors of the first output and `NUM_DECODE` more, computed with the same tokens kept.

    The blocks kept must be the oracle's own choice, contested ones aside.
    """
    with recorded_selections() as selections:
        [output] = generate(llm, [prompt], max_tokens=NUM_DECODE + 1, logprobs=-1, uniprefill_top_p=top_p)
    [kept] = selections.of([output])
    assert output.uniprefill["outcome"] == "pruned"
    truth = oracle.run(
        prompt,
        NUM_DECODE,
        selection_layers=LAYERS,
        top_p=top_p,
        forced_tokens=list(output.outputs[0].token_ids),
        kept_sets=kept,
    )
    if top_p < 1:
        assert len(kept[-1]) < 0.8 * len(prompt)
    for cut, ours in zip(truth.cuts, kept, strict=True):
        differs = cut.blocks_kept(ours) != cut.selection.kept
        assert not (differs & ~cut.selection.undecided(MASS_TOLERANCE)).any(), f"layer {cut.layer}"
    truths = [truth.prefill_logits, *truth.decode_logits]
    return [relative_error(ours, right) for ours, right in zip(logits_of(output), truths, strict=True)]


@pytest.mark.skipif(
    not hasattr(torch.ops._C, "cpu_gemm_wna16") and not torch.cuda.is_available(),
    reason="the CPU backend has int4 kernels on AVX-512 only",
)
def test_quantised_weights(model, tmp_path) -> None:
    """Four-bit weights: an fp32 model of the numbers that they stand for keeps and computes the same."""
    quantise_checkpoint(model, tmp_path / "gptq", tmp_path / "rounded")
    oracle = Oracle(tmp_path / "rounded")
    with engine(tmp_path / "gptq", uniprefill=CONFIG, max_logprobs=-1, logprobs_mode="raw_logits") as llm:
        for seed, length in enumerate((2000, 1500)):
            errors = errors_of(llm, oracle, random_prompt(length, seed), TOP_P)
            assert max(errors) <= MAX_RELATIVE_ERROR
    assert max(relative_error(*pair) for pair in differing_weights(model, tmp_path / "rounded")) > MAX_RELATIVE_ERROR


def differing_weights(path, other):
    from safetensors.torch import load_file

    one, two = load_file(path / "model.safetensors"), load_file(other / "model.safetensors")
    return [(one[name].float(), two[name].float()) for name in one]


@pytest.fixture(scope="module")
def fp8(model):
    if not torch.cuda.is_available() and not torch.cpu._is_avx512_supported():
        pytest.skip("the CPU backend has an fp8 cache on AVX-512 only")
    with engine(model, uniprefill=CONFIG, kv_cache_dtype="fp8", max_logprobs=-1, logprobs_mode="raw_logits") as llm:
        yield llm


def test_fp8_kv_cache(fp8, model) -> None:
    """With keys and values in 8 bits a pruned request is as near to fp32 as one that keeps everything."""
    oracle = Oracle(model)
    prompt = random_prompt(2000)
    everything = errors_of(fp8, oracle, prompt, 1.0)
    pruned = errors_of(fp8, oracle, prompt, TOP_P)
    print(f"fp8: keep-all {max(everything):.4f}, pruned {max(pruned):.4f}")
    assert max(everything) > MAX_RELATIVE_ERROR, "is the cache fp8?"
    assert max(everything) < FP8_MAX_RELATIVE_ERROR and max(pruned) < FP8_MAX_RELATIVE_ERROR


def test_json_after_a_pruned_prompt(fp8) -> None:
    """A JSON schema is followed by a model that would say anything else."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "side": {"enum": ["left", "right"]}},
        "required": ["ok", "side"],
        "additionalProperties": False,
    }
    params = [
        SamplingParams(
            temperature=1,
            seed=seed,
            max_tokens=40,
            structured_outputs=StructuredOutputsParams(json=schema),
            extra_args={"uniprefill_report": 1, "uniprefill_top_p": 0.5},
        )
        for seed in range(6)
    ]
    prompts = [TokensPrompt(prompt_token_ids=random_prompt(900, seed)) for seed in range(6)]
    outputs = fp8.generate(prompts, params, use_tqdm=False)
    found = [json.loads(output.outputs[0].text.replace(" ", "")) for output in outputs]
    assert all(value.keys() == {"ok", "side"} and value["side"] in ("left", "right") for value in found)
    assert len({json.dumps(value) for value in found}) > 1, "the model has no say"
    for output in outputs:
        assert output.uniprefill["segments"][-1]["tokens_out"] < 900


@pytest.fixture(scope="module")
def needle():
    lengths = {"max_model_len": 4096, "max_num_batched_tokens": 4096}
    with engine(NEEDLE_MODEL, uniprefill={"top_p": 0.99}, dtype="float32", **lengths) as llm:
        yield llm


def ask(llm, prompt, xargs: dict | None = None, **arguments) -> Any:
    params = SamplingParams(
        temperature=0, extra_args={"uniprefill_report": 1} | (xargs or {}), **({"max_tokens": 8} | arguments)
    )
    [output] = llm.generate([prompt.text], params, use_tqdm=False)
    return output


# The needle model's tokens are words without spaces, and so the grammars have none.
STRUCTURES = {
    "choice": ({"choice": list(VALUES[:40]) + ["thekey"]}, re.compile("|".join([*VALUES[:40], "thekey"]))),
    "regex": ({"regex": r"v[0-9]{1,3}andv[0-9]{1,3}"}, re.compile(r"v[0-9]+andv[0-9]+")),
    "grammar": ({"grammar": 'root ::= "k1" "is" ("v1" | "v2")'}, re.compile(r"k1isv[12]")),
}


@pytest.mark.parametrize("kind", STRUCTURES)
def test_structured_output(needle, kind) -> None:
    """The grammar is followed after a pruned prompt, beside a request without one."""
    structure, expected = STRUCTURES[kind]
    prompt, free = make_prompt("multikey", 2048, 3), make_prompt("multikey", 1500, 4)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=12,
            extra_args={"uniprefill_report": 1} | extra,
            structured_outputs=StructuredOutputsParams(**structure) if structured else None,
        )
        for structured, extra in ((True, {}), (False, {}), (True, {"uniprefill": 0}))
    ]
    pruned, beside, dense = needle.generate([prompt.text, free.text, prompt.text], params, use_tqdm=False)
    assert [o.uniprefill["outcome"] for o in (pruned, beside, dense)] == ["pruned", "pruned", "dense"]
    assert pruned.uniprefill["segments"][-1]["tokens_out"] < 1024
    for output in (pruned, dense):
        assert output.outputs[0].finish_reason == "stop"
        assert expected.fullmatch(output.outputs[0].text.replace(" ", "")), output.outputs[0].text
    assert is_correct(free, beside.outputs[0].text)


def test_structured_output_changes_the_answer(needle) -> None:
    """The choice must leave the right answer out, or following it would prove nothing."""
    prompt = make_prompt("multikey", 2048, 3)
    assert is_correct(prompt, ask(needle, prompt).outputs[0].text)
    assert prompt.answer not in STRUCTURES["choice"][0]["choice"]


def test_logprobs(needle) -> None:
    """A pruned request that keeps everything has dense's log probabilities; one that drops has its own, in order."""
    prompt = make_prompt("multikey", 2048, 5)

    def logprobs(xargs) -> list[dict[int, float]]:
        output = ask(needle, prompt, xargs, logprobs=5, ignore_eos=True)
        for token, step in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True):
            assert step[token].rank == 1 and step[token].logprob == max(e.logprob for e in step.values())
        return [{token: e.logprob for token, e in step.items()} for step in output.outputs[0].logprobs]

    dense = logprobs({"uniprefill": 0})
    assert logprobs({"uniprefill_top_p": 1.0}) == dense
    pruned = logprobs({})
    assert len(pruned) == 8 and all(len(step) == 5 for step in pruned)
    assert pruned != dense
    assert max(pruned[0], key=pruned[0].get) == max(dense[0], key=dense[0].get)


def test_sleep_when_drained(needle) -> None:
    """Sleeping pauses the scheduler and empties the prefix cache (a CPU frees no memory); pruning goes on after it."""
    prompt = make_prompt("multikey", 2048, 6)
    before = ask(needle, prompt)
    dense = ask(needle, prompt, {"uniprefill": 0})
    for level in (0, 1):
        needle.sleep(level=level)
        assert needle.llm_engine.is_sleeping()
        needle.wake_up()
        assert not needle.llm_engine.is_sleeping()
        after = ask(needle, prompt)
        assert after.uniprefill == before.uniprefill
        assert after.outputs[0].token_ids == before.outputs[0].token_ids
        assert ask(needle, prompt, {"uniprefill": 0}).outputs[0].token_ids == dense.outputs[0].token_ids


def test_requests_that_are_dense_say_why(model, monkeypatch) -> None:
    """Each is computed as if it asked for no pruning, next to one that is pruned."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    prompt = random_prompt(400)
    cases: dict[str | None, tuple[list[int], dict[str, Any]]] = {
        None: (prompt, {"extra_args": {"uniprefill_keep_ratio": 0.5}}),
        "short_prompt": (prompt[:299], {}),
        "disabled": (prompt, {"extra_args": {"uniprefill": 0}}),
        "prompt_logprobs": (prompt, {"prompt_logprobs": 1}),
        "prompt_exceeds_pool": (random_prompt(600), {}),
    }

    async def collect(llm: AsyncLLM, name: str, inputs: Any, extra: dict[str, Any]) -> tuple[list[int], dict]:
        arguments = {"temperature": 0, "max_tokens": 4, "ignore_eos": True} | extra
        arguments["extra_args"] = {"uniprefill_report": 1} | extra.get("extra_args", {})
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **arguments)
        tokens: list[int] = []
        report, scored = None, 0
        async for output in llm.generate(inputs, params, name):
            tokens += output.outputs[0].token_ids
            report = report or output.uniprefill
            scored += len(output.prompt_logprobs or [])
        assert scored == (len(inputs["prompt_token_ids"]) if "prompt_logprobs" in extra else 0)
        return tokens, report

    async def stream() -> AsyncGenerator[StreamingInput, None]:
        yield StreamingInput(TokensPrompt(prompt_token_ids=prompt))
        await asyncio.sleep(0.5)
        yield StreamingInput(TokensPrompt(prompt_token_ids=prompt[:20]))

    async def run() -> None:
        arguments = AsyncEngineArgs(
            model=str(model),
            uniprefill_config=CONFIG | {"pool_tokens": 500},
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=1 << 27,
        )
        llm = AsyncLLM.from_engine_args(arguments)
        try:
            wanted = [
                collect(llm, str(reason), TokensPrompt(prompt_token_ids=ids), extra)
                for reason, (ids, extra) in cases.items()
            ]
            results = dict(zip(cases, await asyncio.gather(*wanted), strict=True))
            tokens, report = await collect(llm, "stream", stream(), {})
        finally:
            llm.shutdown()
        for reason, (_, found) in results.items():
            assert (found["outcome"], found["reason"]) == ("dense" if reason else "pruned", reason), json.dumps(found)
            kept = found["segments"][-1]["tokens_out"]
            assert (kept < found["prompt_tokens"]) == (reason is None)
        assert report["outcome"] == "dense" and report["reason"] == "streaming_input"
        assert len(tokens) == 8, "both parts of the stream are answered"
        # The first part of the stream is what the same prompt gives when it asks for no pruning.
        assert tokens[:4] == results["disabled"][0] == results["prompt_logprobs"][0]

    asyncio.run(run())
