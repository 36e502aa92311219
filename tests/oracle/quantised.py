"""A checkpoint of `checkpoints.make_checkpoint` in four bits (GPTQ), and the same numbers in bf16 for the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # input channels that share a scale
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def quantise_checkpoint(path: Path, quantised: Path, rounded: Path) -> None:
    """Write `path` as GPTQ to `quantised`, and what its weights stand for, in bf16, to `rounded`."""
    weights = load_file(path / "model.safetensors")
    packed: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name, weight in weights.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight" and prefix.rpartition(".")[2] in PROJECTIONS:
            parts, values[name] = pack(weight)
            packed |= {f"{prefix}.{part}": tensor for part, tensor in parts.items()}
        else:
            packed[name] = values[name] = weight
    for folder, tensors in ((quantised, packed), (rounded, values)):
        shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
    }
    (quantised / "config.json").write_text(json.dumps(config, indent=2))


def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """[out, in] -> GPTQ's tensors, and the values that they stand for, bf16 [out, in].

    A weight is (q - 8) * scale with q of 0..15; eight of them, from the low bits on, are in an int32. Scales are
    powers of two, so that the values are exact in bf16 and only the layer's arithmetic rounds.
    """
    groups = weight.float().T.reshape(-1, GROUP, len(weight))  # [groups, GROUP, out]
    scales = torch.exp2((groups.abs().amax(1).clamp(min=1e-6) / 7).log2().ceil())
    q = (groups / scales[:, None] + 8).round().clamp(0, 15)
    value = ((q - 8) * scales[:, None]).reshape(-1, len(weight)).T.to(torch.bfloat16)
    shifts = torch.arange(0, 32, 4)
    codes = q.long().reshape(-1, 8, len(weight))
    qweight = (codes << shifts[None, :, None]).sum(1)
    zeros = torch.full((len(scales), len(weight) // 8), 0x77777777)  # GPTQ stores the zero point minus one
    return {
        "qweight": (qweight - (qweight >= 1 << 31).long() * (1 << 32)).to(torch.int32),
        "qzeros": zeros.to(torch.int32),
        "scales": scales.to(torch.float16),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }, value.contiguous()
