"""worker-show-queries-and-keys.patch: an observer meets queries and keys where a layer attends."""

from __future__ import annotations

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_attention_with_output


@pytest.mark.usefixtures("one_rank")
def test_the_observer_sees_query_and_key_before_the_layer_attends(configure, monkeypatch) -> None:
    """Of its own layer only; a new layer has none."""
    config = configure(None)
    with set_current_vllm_config(config):
        layer, other = (Attention(4, 32, 0.3, num_kv_heads=2, prefix=f"model.layers.{i}.attn") for i in range(2))
    calls: list[tuple] = []
    for each in (layer, other):
        assert each.on_query_key is None
        monkeypatch.setattr(each.impl, "forward", lambda *args, **_: calls.append(args[0]))
    query, key = torch.randn(5, 4, 32), torch.randn(5, 2, 32)

    def attend(layer: Attention) -> None:
        with set_forward_context(None, config, num_tokens=len(query), slot_mapping={}):
            unified_attention_with_output(query, key, torch.zeros_like(key), torch.empty_like(query), layer.layer_name)

    attend(layer)
    assert calls == [layer]  # no observer, and it attends
    calls.clear()
    layer.on_query_key = lambda q, k: calls.append((q, k))
    attend(other)
    attend(layer)
    assert calls[0] is other and calls[2] is layer
    assert calls[1][0] is query and calls[1][1] is key
