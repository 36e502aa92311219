"""worker-score-prompt-blocks.patch: what a layer shows is scored, and blocks are chosen alike on all ranks."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from vllm.config import UniPrefillConfig, VllmConfig, set_current_vllm_config
from vllm.config.uniprefill import SelectionLayer
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.uniprefill.policy import Decision
from vllm.v1.uniprefill.selection import SelectionSpec, block_mass_reference
from vllm.v1.worker.gpu.uniprefill import events, scoring, selector
from vllm.v1.worker.gpu.uniprefill.scoring import Scorer, attending, get_attention_layers
from vllm.v1.worker.gpu.uniprefill.selector import Scores, Selector

HEADS, KV_HEADS, DIM, SCALE, BLOCK = 4, 2, 32, 0.3, 8
NUM_LAYERS = 8

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def config(configure) -> VllmConfig:
    return configure({})


def make_layer(config: VllmConfig, index: int = 0, *, name: str = "attn", **kwargs) -> Attention:
    with set_current_vllm_config(config):
        return Attention(
            HEADS,
            DIM,
            SCALE,
            num_kv_heads=KV_HEADS,
            cache_config=config.cache_config,
            prefix=f"model.layers.{index}.self_attn.{name}",
            **kwargs,
        )


# --- the score -------------------------------------------------------------------------

SPECS = [SelectionSpec(2, 30, 1, 7, 0.9), SelectionSpec(36, 17, 0, 17, 0.9)]
QUERIES = torch.randn(24, HEADS, DIM, generator=torch.Generator().manual_seed(0))
KEYS = torch.randn(55, KV_HEADS, DIM, generator=torch.Generator().manual_seed(1))


def expected_mass(heads: list[int] | None = None, **kwargs) -> torch.Tensor:
    queries = QUERIES
    if heads is not None:
        queries, kwargs["kv_heads"] = QUERIES[:, heads], [head // (HEADS // KV_HEADS) for head in heads]
    return block_mass_reference(queries, KEYS, SPECS, block_size=BLOCK, scale=SCALE, **kwargs)


def make_scorer(layer: Attention, rules: UniPrefillConfig | None = None, **entry) -> Scorer:
    rules = rules or UniPrefillConfig(block_size=BLOCK)
    return Scorer(rules, SelectionLayer(layer=0, **entry), layer)


def score(layer: Attention, **entry) -> torch.Tensor:
    scorer = make_scorer(layer, **entry)
    queries = scorer.take_heads(QUERIES, QUERIES.dtype)
    scores = scorer.score(SPECS, queries, lambda rows: queries, KEYS, Selector(scorer.config))
    assert scores.hop is None
    return scores.mass


def test_scale_soft_cap_and_sinks_are_the_layers(config) -> None:
    assert torch.equal(score(make_layer(config)), expected_mass())
    sinks = torch.linspace(-1, 3, HEADS)
    layer = make_layer(config, 1, logits_soft_cap=1.5, sinks=sinks)
    mass = score(layer)
    assert torch.equal(mass, expected_mass(soft_cap=1.5, sinks=sinks))
    for part in ({}, {"soft_cap": 1.5}, {"sinks": sinks}):
        assert not torch.allclose(mass, expected_mass(**part), rtol=1e-3)


def test_only_the_listed_heads_score_each_with_its_keys_and_sink(config) -> None:
    sinks = torch.linspace(-1, 3, HEADS)
    layer = make_layer(config, sinks=sinks)
    heads = [0, 2, 3]
    alone = [
        block_mass_reference(
            QUERIES[:, [head]], KEYS[:, [head // 2]], SPECS, block_size=BLOCK, scale=SCALE, sinks=sinks[[head]]
        )
        for head in heads
    ]
    torch.testing.assert_close(score(layer, heads=heads), sum(alone))
    assert torch.equal(score(layer, heads=list(range(HEADS))), score(layer))


def test_a_scorer_keeps_nothing_on_the_device(config) -> None:
    """Sleep mode discards what was loaded with the model and is no parameter of it."""
    held = vars(make_scorer(make_layer(config), heads=[0, 2]))
    assert held["heads"] == [0, 2] and not any(isinstance(value, torch.Tensor) for value in held.values())


def test_only_quantised_queries_are_multiplied_by_their_scale(config) -> None:
    """And come out in the keys' type."""
    layer = make_layer(config)
    layer._q_scale.fill_(0.25)
    scorer = make_scorer(layer)
    assert scorer.take_heads(QUERIES, torch.bfloat16) is QUERIES
    quantised = (QUERIES / 0.25).to(torch.float8_e4m3fn)
    restored = scorer.take_heads(quantised, torch.bfloat16)
    assert torch.equal(restored, (quantised.float() * 0.25).bfloat16())
    torch.testing.assert_close(restored.float(), QUERIES, rtol=0.1, atol=0.01)


def test_masses_of_tensor_parallel_ranks_are_summed(config, monkeypatch) -> None:
    others = torch.rand(7)
    monkeypatch.setattr(scoring, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(scoring, "tensor_model_parallel_all_reduce", lambda mass: mass + others)
    assert torch.equal(score(make_layer(config)), expected_mass() + others)


def test_each_rank_scores_with_the_heads_it_has(config, monkeypatch) -> None:
    """Rank 1 of 2 has heads 4 to 7 of 8; a rank without any adds nothing, but takes part."""
    layer = make_layer(config)
    monkeypatch.setattr(scoring, "get_tensor_model_parallel_rank", lambda: 1)
    monkeypatch.setattr(scoring, "get_tensor_model_parallel_world_size", lambda: 2)
    reduced: list[torch.Tensor] = []
    monkeypatch.setattr(scoring, "tensor_model_parallel_all_reduce", lambda mass: reduced.append(mass) or mass)
    mass = score(layer, heads=[1, 5, 7])
    assert torch.equal(mass, expected_mass(heads=[1, 3]))
    assert torch.equal(score(layer, heads=[1, 2]), torch.zeros(7))
    assert len(reduced) == 2


def test_the_observer_leaves_also_by_an_exception(config) -> None:
    layer = make_layer(config)

    def observe(query: torch.Tensor, key: torch.Tensor) -> None:
        raise AssertionError

    with attending(layer, observe):
        assert layer.on_query_key is observe
    assert layer.on_query_key is None
    with pytest.raises(RuntimeError), attending(layer, observe):
        raise RuntimeError
    assert layer.on_query_key is None


# --- the choice ------------------------------------------------------------------------

RULES = UniPrefillConfig(block_size=4, num_queries=6, sink_tokens=4, recent_tokens=6)


def test_a_spec_has_the_requests_rule_and_no_more_queries_than_tokens(config) -> None:
    """Or the layer's, or else the general one."""
    by_ratio, as_configured = Decision(20, None, keep_ratio=0.5, hops=2), Decision(20, None)
    layer = make_layer(config)
    scorer = make_scorer(layer, RULES)
    assert scorer.spec(by_ratio, 3, 20, 1) == SelectionSpec(3, 20, 1, 6, keep_ratio=0.5, hops=2)
    assert scorer.spec(as_configured, 0, 5, 0) == SelectionSpec(0, 5, 0, 5, top_p=0.99)
    scorer = make_scorer(layer, RULES, num_queries=4, keep_ratio=0.2)
    assert scorer.spec(as_configured, 0, 20, 0) == SelectionSpec(0, 20, 0, 4, keep_ratio=0.2)
    assert scorer.spec(Decision(20, None, top_p=0.9), 0, 20, 0).top_p == 0.9


@pytest.mark.parametrize(
    ("budget", "kept"),
    [({"keep_ratio": 0.6}, [0, 1, 2, 3, *range(8, 12), *range(16, 24)]), ({"top_p": 1.0}, list(range(24)))],
    ids=str,
)
def test_forced_blocks_and_the_heaviest_stay(budget: dict, kept: list[int]) -> None:
    """Of blocks 0 to 5 the first and the last two are forced; other rows than the prompt's stay."""
    spec = SelectionSpec(2, 24, 1, 6, **budget)
    rows, counts = Selector(RULES).choose(Scores(torch.tensor([0, 1.0, 9, 2, 0, 0])), [spec], 30)
    assert rows.tolist() == [0, 1, *(2 + token for token in kept), 26, 27, 28, 29] and counts == [len(kept)]


def test_every_rank_takes_the_first_ones_choice(monkeypatch) -> None:
    """Whatever its own masses were."""
    first = torch.tensor([True, False, False, True, True, True])
    asked: list[int] = []

    def broadcast(keep: torch.Tensor, src: int) -> torch.Tensor:
        asked.append(src)
        return first.to(keep.dtype)

    group = SimpleNamespace(world_size=2, broadcast=broadcast)
    monkeypatch.setattr(selector, "get_tp_group", lambda: group)
    spec = SelectionSpec(0, 24, 0, 6, keep_ratio=0.6)
    rows, counts = Selector(RULES).choose(Scores(torch.tensor([0, 1.0, 9, 2, 0, 0])), [spec], 24)
    assert asked == [0] and counts == [16]
    assert rows.tolist() == [*range(4), *range(12, 24)]


def test_every_rank_asks_again_from_the_first_ones_blocks(monkeypatch) -> None:
    group = SimpleNamespace(world_size=2, broadcast=lambda blocks, src: torch.full_like(blocks, 3))
    monkeypatch.setattr(selector, "get_tp_group", lambda: group)
    rules = UniPrefillConfig(block_size=4, num_queries=6, sink_tokens=4, recent_tokens=6, hops=2, hop_blocks=1)
    spec = SelectionSpec(5, 24, 0, 6, keep_ratio=0.6, hops=2)
    hop = Selector(rules).second_hop(torch.tensor([0, 1.0, 9, 2, 0, 0]), [spec])
    assert hop.positions.tolist() == [12, 13, 14, 15] and hop.rows.tolist() == [17, 18, 19, 20]


# --- looking in ------------------------------------------------------------------------


def test_observers_see_spans_and_events_while_they_look() -> None:
    seen: list[object] = []

    class Observer:
        @contextmanager
        def span(self, name: str):
            seen.append(f"<{name}")
            yield
            seen.append(f"{name}>")

        def selected(self, event: events.Selected) -> None:
            seen.append(event)

    event = events.Selected("r", 0, *torch.zeros(3, 2))
    assert not events.observed()
    with events.observed_by(Observer()):
        assert events.observed()
        with events.span("outer"), events.span("inner"):
            events.selected(event)
    with events.span("unseen"):
        events.selected(event)
    assert seen == ["<outer", "<inner", event, "inner>", "outer>"] and not events.observed()


# --- which layers can be scored --------------------------------------------------------


def test_layers_are_found_by_the_index_in_their_names(config) -> None:
    made = {i: make_layer(config, i) for i in (3, 1, 7, 0, 2, 6, 4, 5)}
    assert get_attention_layers(config) == made


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"per_layer_sliding_window": 64}, "other windows than their config says (model.layers.5.self_attn"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention"),
        (
            {"kv_sharing_target_layer_name": "model.layers.0.self_attn.attn"},
            "layers that share a KV cache",
        ),
        ({"alibi_slopes": [0.5] * HEADS}, "ALiBi"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_that_cannot_be_compacted_are_refused(config, kwargs, named: str) -> None:
    for i in range(NUM_LAYERS):
        make_layer(config, i, **(kwargs if i == 5 else {}))
    with pytest.raises(ValueError, match="--uniprefill-config does not work") as error:
        get_attention_layers(config)
    assert named in str(error.value)


def test_every_layer_has_one_attention(config) -> None:
    for i in range(NUM_LAYERS - 1):
        make_layer(config, i)
    with pytest.raises(ValueError, match="decoder layers without attention"):
        get_attention_layers(config)
    make_layer(config, NUM_LAYERS - 1)
    assert len(get_attention_layers(config)) == NUM_LAYERS
    make_layer(config, 3, name="cross")
    with pytest.raises(ValueError, match="several attention modules in layer 3"):
        get_attention_layers(config)
