"""platform-hide-unbuilt-cpu-kernels.patch: what the processor has and the library lacks is not chosen."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="the CPU build only")


@pytest.mark.parametrize("built", [False, True])
def test_amx_is_there_if_the_library_has_its_kernels(monkeypatch, built: bool) -> None:
    """On any processor: this one is made to have AMX."""
    operators = torch.library.Library("_C", "FRAGMENT")
    if built:
        if hasattr(torch.ops._C, "convert_weight_packed"):
            pytest.skip("this library has them")
        operators.define("convert_weight_packed(Tensor weight) -> Tensor")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    try:
        CpuPlatform.import_kernels()
        assert torch.cpu._is_amx_tile_supported() == built
    finally:
        operators._destroy()


def test_linear_layers_and_attention_run_on_this_processor() -> None:
    from vllm.model_executor.layers.utils import check_cpu_sgl_kernel
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    assert not check_cpu_sgl_kernel(64, 64, torch.bfloat16)
    assert _get_attn_isa(torch.bfloat16, 32, 64) == "vec"


def test_a_convolutions_weight_stays_as_it_is_where_its_kernel_was_not_built(monkeypatch) -> None:
    """On a processor with AVX512-BF16, for which the release packs it."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if hasattr(torch.ops._C, "causal_conv1d_weight_pack"):
        pytest.skip("this library has it")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.randn(32, 1, 4, dtype=torch.bfloat16), requires_grad=False)
    before = layer.weight.clone()
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    assert torch.equal(layer.weight, before)
