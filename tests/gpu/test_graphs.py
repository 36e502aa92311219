"""Decode with FULL CUDA graphs: the same tokens as without, dense and after a pruned prefill.

The needle model answers questions, so that tokens do not hang on ties of random weights. Several requests of other
lengths decode together, dense and pruned ones in one batch.
"""

from __future__ import annotations

import os

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm import LLM, SamplingParams, TokensPrompt

from evals.bench.engine import DENSE, GPU_DEFAULTS, EngineSpec, Variant, engine, keep_ratio_variant
from evals.bench.hooks import captured_graphs
from evals.bench.shapes import NEEDLE_MODEL, Prompts

GPU = torch.cuda.is_available()
REHEARSED = "REHEARSE_GRAPHS" in os.environ  # without a GPU, so without graphs: both engines are eager
LENGTHS = (2048, 5000, 9000) if GPU else (2048, 3000)
NEW_TOKENS = 24
BUDGET = {"max_num_batched_tokens": 4096}  # longer prompts take the lane


def generate(llm: LLM) -> list[list[int]]:
    """The tokens of two batches, where the first one answers the question.

    Every length dense and pruned; then dense alone, where the segments share attention metadata.
    """
    pruned = keep_ratio_variant(0.3)
    mixed = [(tokens, variant) for tokens in LENGTHS for variant in (DENSE, pruned)]
    return batch(llm, mixed) + batch(llm, [(tokens, DENSE) for tokens in LENGTHS])


def batch(llm: LLM, jobs: list[tuple[int, Variant]]) -> list[list[int]]:
    prompts = Prompts.of(NEEDLE_MODEL)
    params = [
        SamplingParams(
            max_tokens=NEW_TOKENS,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=variant.extra_args | {"uniprefill_report": 1},
        )
        for _, variant in jobs
    ]
    given = [TokensPrompt(prompt_token_ids=prompts.ids(tokens, seed=tokens)) for tokens, _ in jobs]
    outputs = llm.generate(given, params, use_tqdm=False)
    made = [list(output.outputs[0].token_ids) for output in outputs]
    for (tokens, variant), output, ids in zip(jobs, outputs, made, strict=True):
        assert (output.uniprefill["outcome"] == "pruned") == variant.pruned, (tokens, variant.name)
        assert prompts.answered(tokens, tokens, ids[0]), (tokens, variant.name)
    return made


@pytest.mark.gpu
@pytest.mark.skipif(not GPU and not REHEARSED, reason="needs an NVIDIA GPU")
def test_full_graphs_decode_the_tokens_of_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    spec = EngineSpec((1, 3, 5), max(LENGTHS), NEW_TOKENS, seqs=2 * len(LENGTHS), resident=4)
    arguments = spec.arguments(NEEDLE_MODEL, "auto")
    config = {"selection_layers": list(spec.cuts), "min_prompt_tokens": min(LENGTHS)}
    arguments |= {"uniprefill_config": config, **BUDGET}
    with engine(arguments | {"enforce_eager": True}) as llm:
        eager = generate(llm)
        del llm
    graphs = GPU_DEFAULTS | BUDGET if GPU else {}
    with engine(arguments | {"enforce_eager": not GPU} | graphs) as llm:
        assert not GPU or captured_graphs(llm) > 0
        assert generate(llm) == eager
        del llm
