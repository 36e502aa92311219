"""Two adapters and the base model in one pruned batch compute what merged weights compute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engines import engine, generate, recorded_selections
from oracle.checkpoints import CONSTANTS, make_checkpoint
from oracle.oracle import Oracle
from safetensors.torch import save_file
from test_oracle_agreement import (
    MASS_TOLERANCE,
    MAX_RELATIVE_ERROR,
    WHOLE,
    logits_of,
    random_prompt,
    relative_error,
)
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

LAYERS = [1, 2]
NUM_DECODE = 8
RANK = 8
ALPHA = 16
# Large enough that another adapter's answer could not pass for this one's.
STRENGTH = 0.08
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNIPREFILL = {"selection_layers": LAYERS, "block_size": 32, "top_p": 0.7}


def make_adapter(base: Path, path: Path, seed: int) -> dict[str, torch.Tensor]:
    """A random adapter in PEFT's format; what it adds to each weight, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in TARGETS:
            continue
        rows, columns = weight.shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = (
            torch.randn(rows, RANK, generator=generator)
            * float(weight.detach().norm())
            / rows**0.5
            * STRENGTH
            / RANK**0.5
        )
        if rows == model.config.hidden_size and module.endswith(("o_proj", "down_proj")):
            b[:CONSTANTS] = 0  # no layer writes to these channels
        a, b = a.bfloat16(), b.bfloat16()
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        deltas[name] = ALPHA / RANK * b.float() @ a.float()
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return deltas


def merge(base: Path, deltas: dict[str, torch.Tensor], path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_parameter(name).add_(delta)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "base"
    return make_checkpoint(path, "llama", layers=4, seed=31)


@pytest.fixture(scope="module")
def adapters(base) -> dict[str, tuple[LoRARequest | None, Oracle]]:
    """Name -> what a request sends, and the model it should be computed by."""
    found: dict[str, tuple[LoRARequest | None, Oracle]] = {"base": (None, Oracle(base))}
    for number, name in enumerate(("first", "second"), start=1):
        deltas = make_adapter(base, base.parent / name, seed=number)
        oracle = Oracle(merge(base, deltas, base.parent / f"{name}-merged"))
        found[name] = (LoRARequest(name, number, str(base.parent / name)), oracle)
    return found


@pytest.fixture(scope="module", params=[WHOLE, 600], ids=lambda budget: f"{budget} tokens a step")
def llm(request, base):
    settings = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 3, "max_num_batched_tokens": request.param}
    with engine(base, uniprefill=UNIPREFILL, max_logprobs=-1, logprobs_mode="raw_logits", **settings) as llm:
        yield llm


def test_adapters_in_one_batch(llm, adapters) -> None:
    """Each request's rows go on with its own adapter after every cut."""
    names = ["first", "base", "second", "first"]
    prompts = [random_prompt(length, seed) for seed, length in enumerate([1500, 1100, 1300, 1250])]
    requests = [adapters[name][0] for name in names]
    with recorded_selections() as selections:
        outputs = generate(llm, prompts, max_tokens=NUM_DECODE + 1, logprobs=-1, lora_request=requests)
        cuts = selections.of(outputs)
    for name, prompt, output, kept in zip(names, prompts, outputs, cuts, strict=True):
        assert output.uniprefill["outcome"] == "pruned"
        assert len(kept[-1]) < 0.9 * len(prompt)
        errors = {}
        for other, (_, oracle) in adapters.items():
            truth = oracle.run(
                prompt,
                NUM_DECODE,
                selection_layers=LAYERS,
                block_size=32,
                top_p=0.7,
                forced_tokens=list(output.outputs[0].token_ids),
                kept_sets=kept,
            )
            right = torch.cat([truth.prefill_logits[None], truth.decode_logits])
            errors[other] = max(relative_error(a, b) for a, b in zip(logits_of(output), right, strict=True))
            if other == name:
                for cut, ours in zip(truth.cuts, kept, strict=True):
                    differs = cut.blocks_kept(ours) != cut.selection.kept
                    assert not (differs & ~cut.selection.undecided(MASS_TOLERANCE)).any()
        assert errors.pop(name) <= MAX_RELATIVE_ERROR
        assert min(errors.values()) > 3 * MAX_RELATIVE_ERROR, "the adapters are too alike to tell them apart"


def test_dense_and_pruned_neighbours(llm, adapters) -> None:
    """A batch that mixes outcomes gives each request what it gets alone."""
    names = ["first", "second", "base"]
    prompts = [random_prompt(length, seed) for seed, length in enumerate([1200, 1100, 40], start=50)]
    requests = [adapters[name][0] for name in names]
    together = generate(llm, prompts, max_tokens=NUM_DECODE, logprobs=-1, lora_request=requests)
    assert [o.uniprefill["reason"] for o in together] == [None, None, "short_prompt"]
    for prompt, request, output in zip(prompts, requests, together, strict=True):
        [alone] = generate(llm, [prompt], max_tokens=NUM_DECODE, logprobs=-1, lora_request=[request])
        assert relative_error(logits_of(output), logits_of(alone)) <= MAX_RELATIVE_ERROR
