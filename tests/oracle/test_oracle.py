"""The oracle against Hugging Face, against hand-computed selections and against itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .checkpoints import FAMILIES, make_checkpoint
from .oracle import Cut, LayerCache, Oracle, OracleResult, attend, attention_weights
from .selection import SelectionRule, block_masses, forced_blocks, select_blocks

SMALL = {"block_size": 16, "num_queries": 24, "sink_tokens": 20, "recent_tokens": 30}
CUTS = [1, 2]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> path of a four-layer checkpoint, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        path = root / family
        if not path.exists():
            make_checkpoint(path, family, layers=4, tied=family != "mistral")
        return path

    return get


@pytest.fixture(scope="session")
def llama(checkpoint: Callable[[str], Path]) -> Oracle:
    return Oracle(checkpoint("llama"))


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 1024, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference relative to the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def all_logits(result: OracleResult) -> Tensor:
    return torch.cat([result.prefill_logits[None], result.decode_logits])


@torch.inference_mode()
def masked_logits(oracle: Oracle, ids: list[int], num_prompt: int, cuts: list[Cut], *, early: bool = False) -> Tensor:
    """The second way: Hugging Face's own layers over every row, no row dropped and
    nothing cached, with a mask per layer that hides dropped tokens from it.
    [len(ids) - num_prompt + 1, vocab] from the last prompt token on.

    `early` hides tokens in the selection layer itself: wrong on purpose."""
    inner = oracle.decoder
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids))
    hidden = inner.embed_tokens(tokens)
    tables = inner.rotary_emb(hidden, positions[None])
    visible = torch.ones(len(ids), dtype=torch.bool)
    kept_after = {cut.layer: cut.kept for cut in cuts}
    for index, layer in enumerate(inner.layers):
        remaining = visible
        if index in kept_after:
            remaining = positions >= num_prompt
            remaining[kept_after[index]] = True
        current = remaining if early else visible
        allowed = (positions[:, None] >= positions[None, :]) & current[None, :]
        allowed |= torch.eye(len(ids), dtype=torch.bool)  # rows of dropped tokens: unused
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)
        hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=tables)
        visible = remaining
    return oracle.model.lm_head(inner.norm(hidden))[0, num_prompt - 1 :]


# --- against Hugging Face ---------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_equals_hugging_face(checkpoint: Callable[[str], Path], family: str) -> None:
    oracle = Oracle(checkpoint(family))
    ids = prompt(600)
    result = oracle.run(ids, 4, selection_layers=[])
    with torch.inference_mode():
        theirs = oracle.model(torch.tensor([ids + result.tokens[:4]])).logits[0, 599:]
    assert result.cuts == []
    assert relative(all_logits(result), theirs) < 1e-4
    assert result.tokens == theirs.argmax(-1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_masking(checkpoint: Callable[[str], Path], family: str) -> None:
    oracle = Oracle(checkpoint(family))
    ids = prompt(600)
    result = oracle.run(ids, 4, selection_layers=CUTS, top_p=0.8, **SMALL)
    assert 600 > len(result.kept[0]) > len(result.kept[1]) > 60
    theirs = masked_logits(oracle, ids + result.tokens[:4], 600, result.cuts)
    assert relative(all_logits(result), theirs) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_is_bf16_and_drops_matter(checkpoint: Callable[[str], Path], family: str) -> None:
    """bf16 rounding of the dense model is small, and the drops are well above it."""
    oracle, ids = Oracle(checkpoint(family)), prompt(1500)
    dense = oracle.run(ids, 0, selection_layers=[]).prefill_logits
    pruned = oracle.run(ids, 0, selection_layers=CUTS, top_p=0.8, **SMALL)
    rounded = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.bfloat16)
    with torch.inference_mode():
        theirs = rounded(torch.tensor([ids])).logits[0, -1].float()
    assert (theirs - dense).norm() / dense.norm() < 0.006
    assert (pruned.prefill_logits - dense).norm() / dense.norm() > 0.03
    assert 0.1 < len(pruned.kept[-1]) / len(ids) < 0.8


@pytest.mark.parametrize("folder", ["", "tokenizer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_round_trips(checkpoint: Callable[[str], Path], family: str, folder: str) -> None:
    if family == "qwen2" and not folder:
        pytest.skip("transformers puts its own tokenizer class in place of ours")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family) / folder)
    assert tokenizer("w5 w1023 w0").input_ids == [5, 1023, 0]
    assert tokenizer.decode([5, 1023, 0]) == "w5 w1023 w0"


# --- attention ----------------------------------------------------------------


def test_soft_cap_and_sinks_by_hand() -> None:
    queries = torch.tensor([[[2.0]], [[2.0]]])
    keys = torch.tensor([[[1.0], [3.0], [9.0]]])
    query_positions, key_positions = torch.tensor([7]), torch.tensor([2, 7, 8])
    weights = attention_weights(
        queries,
        keys,
        query_positions,
        key_positions,
        scale=0.5,
        soft_cap=2.0,
        sinks=torch.tensor([0.0, 1.0]),
    )
    first, second = (math.exp(2 * math.tanh(score / 2)) for score in (1, 3))
    for head, sink in enumerate((1, math.e)):
        total = first + second + sink
        expected = torch.tensor([first / total, second / total, 0])
        torch.testing.assert_close(weights[head, 0], expected)


def test_attention_over_chunks_equals_one_piece() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(4, 700, 8, generator=generator)
    keys, values = torch.randn(2, 2, 700, 8, generator=generator)
    positions = torch.arange(700) * 3
    ours = attend(
        queries,
        LayerCache(keys, values, positions),
        positions,
        scale=0.3,
        soft_cap=None,
        sinks=None,
    )
    theirs = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(ours, theirs.transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-5)


# --- selection by hand --------------------------------------------------------


def rule(**settings: object) -> SelectionRule:
    """Blocks of four tokens, nothing forced but the last token's block."""
    defaults = {"block_size": 4, "num_queries": 1, "sink_tokens": 0, "recent_tokens": 1}
    return SelectionRule(**defaults | settings)


def kept_blocks(mass: list[float], num_tokens: int, **settings: object) -> list[int]:
    selection = select_blocks(torch.tensor(mass), num_tokens, rule(**settings))
    return torch.nonzero(selection.kept).flatten().tolist()


def test_block_masses_with_a_partial_last_block() -> None:
    assert block_masses(torch.arange(10.0), 4).tolist() == [6, 22, 17]


@pytest.mark.parametrize(
    ("tokens", "sink", "recent", "expected"),
    [
        (12, 0, 1, [2]),
        (12, 4, 4, [0, 2]),
        (12, 5, 4, [0, 1, 2]),
        (16, 1, 5, [0, 2, 3]),
        (13, 0, 1, [3]),
        (13, 0, 2, [2, 3]),
        (13, 99, 1, [0, 1, 2, 3]),
        (3, 0, 99, [0]),
    ],
)
def test_forced_blocks_are_kept_whole(tokens: int, sink: int, recent: int, expected: list[int]) -> None:
    forced = forced_blocks(tokens, rule(top_p=0.5, sink_tokens=sink, recent_tokens=recent))
    assert torch.nonzero(forced).flatten().tolist() == expected


# Five blocks of four tokens; block 4 is forced. Masses sum to 16.
MASSES = [1.0, 6.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # all: 6 | 4 | 3 | 2 | 1 of 16, the forced block among them
        ({"top_p": 0.01}, [1, 4]),
        ({"top_p": 6 / 16}, [1, 4]),  # reached exactly by block 1: no other is needed
        ({"top_p": 0.376}, [1, 4]),  # crossing block 4 is forced anyway
        ({"top_p": 10 / 16}, [1, 4]),
        ({"top_p": 0.63}, [1, 3, 4]),
        ({"top_p": 0.82}, [1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        # middle: 6 | 3 | 2 | 1 of 12
        ({"top_p": 0.5, "top_p_over": "middle"}, [1, 4]),
        ({"top_p": 0.51, "top_p_over": "middle"}, [1, 3, 4]),
        ({"top_p": 0.76, "top_p_over": "middle"}, [1, 2, 3, 4]),
        ({"top_p": 0.92, "top_p_over": "middle"}, [0, 1, 2, 3, 4]),
        # keep_ratio: a share of five blocks, rounded up, the forced one included
        ({"keep_ratio": 0.01}, [4]),
        ({"keep_ratio": 0.2}, [4]),
        ({"keep_ratio": 0.21}, [1, 4]),
        ({"keep_ratio": 0.6}, [1, 3, 4]),
        ({"keep_ratio": 0.61}, [1, 2, 3, 4]),
        ({"keep_ratio": 1.0}, [0, 1, 2, 3, 4]),
        # more forced blocks than the ratio asks for
        ({"keep_ratio": 0.4, "sink_tokens": 8}, [0, 1, 4]),
    ],
)
def test_kept_blocks_by_hand(settings: dict, expected: list[int]) -> None:
    assert kept_blocks(MASSES, 20, **settings) == expected


def test_ties_go_to_the_lower_index() -> None:
    assert kept_blocks([2, 2, 2, 2], 16, top_p=0.5) == [0, 1, 3]
    assert kept_blocks([2, 2, 2, 2], 16, keep_ratio=0.5) == [0, 3]


def test_no_block_but_forced_ones() -> None:
    assert kept_blocks([1, 2], 8, top_p=0.5, top_p_over="middle", recent_tokens=8) == [0, 1]


def test_margins_by_hand() -> None:
    over_all = select_blocks(torch.tensor(MASSES), 20, rule(top_p=0.63))
    assert over_all.threshold_margin == pytest.approx(0.63 - 10 / 16)
    assert over_all.rank_margin == pytest.approx(1 / 16)  # block 3 inside, block 2 outside
    middle = select_blocks(torch.tensor(MASSES), 20, rule(top_p=0.7, top_p_over="middle"))
    assert middle.threshold_margin == pytest.approx(0.75 - 0.7)
    assert middle.rank_margin == pytest.approx(1 / 12)
    ratio = select_blocks(torch.tensor(MASSES), 20, rule(keep_ratio=0.4))
    assert ratio.threshold_margin == math.inf
    assert ratio.rank_margin == pytest.approx((6 - 3) / 12)


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 0.6}, {"top_p": 0.9, "top_p_over": "middle"}, {"keep_ratio": 0.4}],
)
def test_undecided_covers_every_change_of_the_masses(settings: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    size, tolerance, changed = 60, 0.05, 0
    for _ in range(20):
        mass = torch.rand(size, generator=generator, dtype=torch.float64)
        selection = select_blocks(mass, size * 4, rule(**settings))
        assert not selection.undecided(0.0).any()
        assert selection.undecided(tolerance).sum() < size / 2
        for _ in range(20):
            noise = torch.rand(size, generator=generator, dtype=torch.float64) * 2 - 1
            other = select_blocks(mass * (1 + tolerance * noise), size * 4, rule(**settings))
            assert selection.disputed(other.kept, tolerance) == []
            changed += len(selection.disputed(other.kept, 0.0))
    assert changed > 0


# --- the run ------------------------------------------------------------------


def test_drop_happens_at_the_end_of_the_selection_layer(llama: Oracle) -> None:
    """Hiding the dropped tokens one layer earlier gives other logits."""
    ids = prompt(600)
    result = llama.run(ids, 2, selection_layers=CUTS, top_p=0.6, **SMALL)
    fed = ids + result.tokens[:2]
    right = masked_logits(llama, fed, 600, result.cuts)
    wrong = masked_logits(llama, fed, 600, result.cuts, early=True)
    assert relative(all_logits(result), right) < 1e-4
    assert relative(all_logits(result), wrong) > 1e-2


def test_mass_is_hugging_face_attention(llama: Oracle) -> None:
    """Token masses of the first cut, from the attention weights that HF reports."""
    ids = prompt(500)
    result = llama.run(ids, 0, selection_layers=[1], top_p=0.8, **SMALL)
    llama.model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = llama.model(torch.tensor([ids]), output_attentions=True).attentions[1][0]
    mass = block_masses(weights[:, -24:].sum((0, 1)), 16)
    assert result.cuts[0].selection is not None
    torch.testing.assert_close(result.cuts[0].selection.mass, mass / mass.sum(), rtol=1e-4, atol=0)


def test_blocks_are_counted_anew_among_the_alive(llama: Oracle) -> None:
    ids = prompt(610)
    result = llama.run(ids, 0, selection_layers=CUTS, top_p=0.6, **SMALL)
    first, second = result.cuts
    assert first.alive == list(range(610))
    assert second.alive == first.kept
    assert second.selection is not None
    assert len(second.selection.mass) == math.ceil(len(first.kept) / 16)
    blocks = second.blocks_kept(second.kept)
    assert torch.equal(blocks, second.selection.kept)
    assert second.kept == [p for i, p in enumerate(second.alive) if blocks[i // 16]]
    assert second.kept[:20] == list(range(20))
    assert second.kept[-30:] == list(range(580, 610))
    with pytest.raises(ValueError, match="whole blocks"):
        second.blocks_kept(second.kept[1:])


def test_decode_sees_each_segments_kept_tokens(llama: Oracle) -> None:
    """Given drops, decode equals a mask-based pass from scratch at every length."""
    ids, kept = prompt(300), [list(range(0, 300, 2)) + [299], list(range(0, 300, 6)) + [299]]
    result = llama.run(ids, 5, selection_layers=CUTS, kept_sets=kept)
    assert result.kept == kept
    assert all(cut.selection is None for cut in result.cuts)
    for step in range(6):
        theirs = masked_logits(llama, ids + result.tokens[:step], 300, result.cuts)
        assert relative(all_logits(result)[step], theirs[-1]) < 1e-4


@pytest.mark.parametrize("settings", [{"top_p": 0.7}, {"keep_ratio": 0.5}])
@pytest.mark.parametrize("num_resumed", [1, 40])
def test_resumed_equals_uninterrupted(llama: Oracle, settings: dict, num_resumed: int) -> None:
    ids = prompt(500)
    whole = llama.run(ids, 42, selection_layers=CUTS, **settings, **SMALL)
    resumed = llama.run(
        ids,
        42,
        selection_layers=CUTS,
        forced_tokens=whole.tokens[:num_resumed],
        num_resumed=num_resumed,
        **settings,
        **SMALL,
    )
    assert resumed.kept == whole.kept
    assert resumed.tokens == whole.tokens
    assert relative(all_logits(resumed), all_logits(whole)) < 1e-4


def test_given_drops_still_report_the_rules_choice(llama: Oracle) -> None:
    ids = prompt(500)
    free = llama.run(ids, 0, selection_layers=CUTS, top_p=0.7, **SMALL)
    given = llama.run(ids, 0, selection_layers=CUTS, top_p=0.7, kept_sets=[free.kept[0], [0, 499]], **SMALL)
    assert given.kept == [free.kept[0], [0, 499]]
    for ours, theirs in zip(given.cuts, free.cuts, strict=True):
        assert ours.selection is not None and theirs.selection is not None
        assert torch.equal(ours.selection.kept, theirs.selection.kept)


def test_keep_all_and_short_prompts_are_dense(llama: Oracle) -> None:
    ids = prompt(400)
    dense = llama.run(ids, 3, selection_layers=[])
    everything = llama.run(ids, 3, selection_layers=CUTS, top_p=1.0, **SMALL)
    short = llama.run(ids, 3, selection_layers=CUTS, top_p=0.1, min_prompt_tokens=401, **SMALL)
    assert everything.kept == [list(range(400))] * 2
    assert short.cuts == []
    assert torch.equal(all_logits(everything), all_logits(dense))
    assert torch.equal(all_logits(short), all_logits(dense))


def test_forced_tokens_come_first(llama: Oracle) -> None:
    result = llama.run(prompt(50), 3, selection_layers=[], forced_tokens=[7, 8])
    assert result.tokens[:2] == [7, 8]
    assert result.tokens[2:] == result.decode_logits[1:].argmax(-1).tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection_layers": [2, 1], "top_p": 0.5}, "ascend"),
        ({"selection_layers": [3], "top_p": 0.5}, "last layer"),
        ({"selection_layers": [1]}, "exactly one"),
        ({"selection_layers": [1], "top_p": 0.5, "keep_ratio": 0.5}, "exactly one"),
        ({"selection_layers": [1], "kept_sets": []}, "one set per"),
        ({"selection_layers": [1], "kept_sets": [[0, 1]]}, "hold the last"),
        ({"selection_layers": [1, 2], "kept_sets": [[0, 49], [1, 49]]}, "be alive"),
        ({"selection_layers": [], "num_resumed": 1}, "num_resumed"),
    ],
)
def test_refusals(llama: Oracle, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama.run(prompt(50), 1, **settings)
