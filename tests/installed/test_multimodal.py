"""M-RoPE and images: with drops, vLLM selects and computes what an fp32 Hugging Face model does.

Gemma 3 does with text what its text model does.
"""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
from engines import engine, recorded_selections
from oracle.vision import (
    FAMILIES,
    GEMMA_SPECIAL,
    NUM_WORDS,
    TOKEN_ID,
    VOCAB,
    VisionOracle,
    make_gemma3_checkpoints,
    make_image,
    make_vision_checkpoint,
)
from test_oracle_agreement import MASS_TOLERANCE, MAX_RELATIVE_ERROR, WHOLE, logits_of, relative_error
from vllm import SamplingParams

# vLLM's Qwen-VL modules import it, and the package index has none that imports beside a CPU torch.
pytestmark = pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
LAYERS = [2, 4, 6]
NUM_DECODE = 16


def words(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(NUM_WORDS), k=count)


IMAGE = [TOKEN_ID[word] for word in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")]


# 800 tokens a step cut through the first image.
@pytest.mark.parametrize("budget", [WHOLE, 800])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_oracle(family: str, budget: int, tmp_path) -> None:
    path = make_vision_checkpoint(tmp_path / "m", family, seed=11)
    oracle = VisionOracle(path)
    pictures = [make_image(448, 308, 1), make_image(196, 252, 2)]
    # The second image is among the recent tokens, which are kept.
    cases = {
        "text": (words(1800, 0), []),
        "images": (words(700, 1) + IMAGE + words(760, 2) + IMAGE + words(40, 3), pictures),
    }
    with (
        engine(
            path,
            uniprefill={"selection_layers": LAYERS, "top_p": 0.8},
            tokenizer=str(path / "tokenizer"),
            limit_mm_per_prompt={"image": 2, "video": 0},
            max_model_len=4096,
            max_num_batched_tokens=budget,
            max_logprobs=-1,
            logprobs_mode="raw_logits",
        ) as llm,
        recorded_selections() as selections,
    ):
        params = SamplingParams(
            temperature=0,
            max_tokens=NUM_DECODE + 1,
            ignore_eos=True,
            logprobs=-1,
            extra_args={"uniprefill_report": 1},
        )
        prompts = [
            {"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {})
            for ids, images in cases.values()
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for (name, (_, images)), output, kept in zip(cases.items(), outputs, selections.of(outputs), strict=True):
            ids = list(output.prompt_token_ids)
            num_image_tokens = ids.count(IMAGE[1])
            assert num_image_tokens == (16 * 11 + 7 * 9 if images else 0)
            assert output.uniprefill["outcome"] == "pruned"
            assert (output.uniprefill["steps"] > 1) == (budget != WHOLE)
            assert len(kept[-1]) < len(ids) - 500, f"{name}: next to nothing was dropped"
            if images:
                dropped_images = num_image_tokens - sum(ids[position] == IMAGE[1] for position in kept[-1])
                assert 0 < dropped_images < num_image_tokens, "images should be dropped in part"
            oracle.show(ids, images)
            truth = oracle.run(
                ids,
                NUM_DECODE,
                selection_layers=LAYERS,
                top_p=0.8,
                forced_tokens=list(output.outputs[0].token_ids),
                kept_sets=kept,
            )
            for cut, ours in zip(truth.cuts, kept, strict=True):
                differs = cut.blocks_kept(ours) != cut.selection.kept
                assert not (differs & ~cut.selection.undecided(MASS_TOLERANCE)).any(), f"{name}: layer {cut.layer}"
            truths = [truth.prefill_logits, *truth.decode_logits]
            errors = [relative_error(mine, right) for mine, right in zip(logits_of(output), truths, strict=True)]
            print(f"{family} {name}: kept {len(kept[-1])} of {len(ids)}, worst error {max(errors):.4f}")
            assert max(errors) <= MAX_RELATIVE_ERROR, name


def test_gemma3_prunes_prompts_of_text(tmp_path) -> None:
    """To what its text model makes of them, which test_architectures.py checks; one with an image is dense."""
    text, whole = make_gemma3_checkpoints(tmp_path)
    prompt = words(1800, 0)
    found = []
    for path in (text, whole):
        with (
            engine(
                path, uniprefill={"top_p": 0.8}, dtype="float32", max_model_len=4096, max_num_batched_tokens=700
            ) as llm,
            recorded_selections() as selections,
        ):
            params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args={"uniprefill_report": 1})
            [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
            assert output.uniprefill["outcome"] == "pruned" and output.uniprefill["steps"] > 1
            found.append((output.outputs[0].token_ids, selections.of([output])))
            if path == whole:
                start = VOCAB - len(GEMMA_SPECIAL)
                image = {"image": [make_image(56, 56, 1)]}
                ask = {"prompt_token_ids": [*prompt, start, *words(20, 1)], "multi_modal_data": image}
                [output] = llm.generate([ask], params, use_tqdm=False)
                report = output.uniprefill
                assert (report["outcome"], report["reason"]) == ("dense", "multimodal_input")
                assert len(output.prompt_token_ids) > 1800 + 20 + 4
    assert found[0] == found[1]
