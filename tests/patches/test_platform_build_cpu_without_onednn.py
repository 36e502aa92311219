"""platform-build-cpu-without-onednn.patch: the guard, and a library that loads without oneDNN."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "build/tree/csrc/cpu/torch_bindings.cpp"

cpu_build = pytest.mark.skipif("cpu" not in version("vllm"), reason="the package is not a CPU build")


def guarded(*flags: str) -> bool:
    """Whether g++ keeps the oneDNN operators of torch_bindings.cpp under these flags."""
    text = SOURCE.read_text()
    end = text.index("// Helper function to release oneDNN handlers")
    condition = text[text.rindex("#if", 0, end) : end]
    snippet = f"{condition}\nkept\n#endif\n"
    done = subprocess.run(
        ["g++", "-E", "-P", "-x", "c++", *flags, "-"], input=snippet, capture_output=True, text=True, check=True
    )
    return "kept" in done.stdout


@cpu_build
@pytest.mark.parametrize("isa", ["-mavx2", "-mavx512f"])
def test_the_switch_leaves_onednn_out_and_its_absence_keeps_it(isa):
    assert not guarded(isa, "-DVLLM_ONEDNN_DISABLED")
    assert guarded(isa)


def test_the_guard_covers_every_onednn_operator():
    text = SOURCE.read_text()
    start = text.index("#if !defined(VLLM_ONEDNN_DISABLED)")
    block = text[start : text.index("#endif", start)]
    outside = text[:start] + text[start + len(block) :]
    names = set(re.findall(r'ops\.(?:def|impl)\(\s*"(\w*(?:onednn|dnnl|scaled_int8)\w*)', block))
    assert {"onednn_mm", "onednn_scaled_mm", "create_onednn_mm_handler", "static_scaled_int8_quant"} <= names
    assert not re.findall(r'ops\.(?:def|impl)\(\s*"\w*(?:onednn|dnnl)\w*', outside)


@cpu_build
def test_the_library_loads_and_linear_layers_take_torchs_matmul():
    code = """
import json, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
import vllm._custom_ops as ops
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
layer = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
x = torch.randn(4, 64, dtype=torch.bfloat16)
got = layer.cpu_linear(x, layer.weight, None)
print(json.dumps({
    "loaded": hasattr(torch.ops._C, "rotary_embedding"),
    "onednn": hasattr(torch.ops._C, "onednn_mm") or ops._supports_onednn,
    "same": bool(torch.allclose(got.float(), torch.nn.functional.linear(x, layer.weight).float(), atol=.05)),
}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"loaded": True, "onednn": False, "same": True}
