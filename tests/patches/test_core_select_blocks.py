# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""UniPrefill's selection: block mass, choice of blocks, surviving rows.

Without a GPU the Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1).
"""

import math
import os
from fractions import Fraction

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vllm.v1.uniprefill.selection import (  # noqa: E402
    SelectionSpec,
    block_mass,
    block_mass_reference,
    heaviest_blocks,
    kept_rows,
    known_kept_tokens,
    second_hop,
    select_blocks,
)
from vllm.v1.uniprefill.selection import mass as mass_module  # noqa: E402
from vllm.v1.uniprefill.selection.mass_triton import block_mass_triton  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
IMPLEMENTATIONS = [block_mass_reference, block_mass_triton]
GPU_ONLY = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
# vLLM's capped logits take exp of large numbers and rely on it saturating.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


@pytest.fixture(autouse=True)
def interpret_bf16_dot(monkeypatch):
    """Triton's interpreter multiplies the bit patterns of bf16; give it numbers."""
    if HAS_GPU:
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    create_dot = InterpreterBuilder.create_dot

    def numbers(x):
        if x.dtype != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *args):
        return create_dot(self, numbers(a), numbers(b), *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


# --- block mass ----------------------------------------------------------------


def naive_block_mass(
    query, key, specs, *, block_size, scale, soft_cap=0.0, sinks=None, kv_heads=None, positions=None
):
    """float64, everything in memory, one loop per request."""
    query, key = query.double(), key.double()
    if kv_heads is None:
        kv_heads = [head * key.shape[1] // query.shape[1] for head in range(query.shape[1])]
    masses, start = [], 0
    for spec in specs:
        n, m = spec.num_prompt, spec.num_queries
        q = query[start : start + m]
        k = key[spec.row_start : spec.row_start + n, kv_heads]
        logits = torch.einsum("qhd,khd->hqk", q, k) * scale
        if soft_cap > 0:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        token = torch.arange(n, device=k.device)
        position = token[n - m :] if positions is None else positions[start : start + m]
        seen = token <= position[:, None]
        logits = logits.masked_fill(~seen, -math.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, m, 1)
            logits = torch.cat([logits, column], dim=2)
        weights = logits.softmax(2)[:, :, :n]
        if positions is not None:
            weights = weights.masked_fill(token // block_size == position[:, None] // block_size, 0)
        token_mass = weights.sum((0, 1))
        masses += [part.sum() for part in token_mass.split(block_size)]
        start += m
    return torch.stack(masses)


def make_batch(prompts, heads, kv_heads, dim, dtype, seed=0, num_output=3, gap=5):
    """Random packed requests of `(num_prompt, num_queries)`.

    Rows that are no keys (before, behind and between the prompts) hold NaN, so
    that touching one shows.
    """
    generator = torch.Generator().manual_seed(seed)
    specs, row = [], gap
    for num_prompt, num_queries in prompts:
        specs.append(SelectionSpec(row, num_prompt, num_output, num_queries, 0.9))
        row += num_prompt + num_output + gap
    key = torch.full((row, kv_heads, dim), math.nan)
    for spec in specs:
        shape = (spec.num_prompt, kv_heads, dim)
        rows = slice(spec.row_start, spec.row_start + spec.num_prompt)
        key[rows] = torch.randn(shape, generator=generator)
    num_queries = sum(spec.num_queries for spec in specs)
    query = torch.randn(num_queries, heads, dim, generator=generator)
    # Heads of different sharpness: mixing up two of them shows.
    query *= torch.linspace(0.5, 3, heads)[:, None]
    return query.to(DEVICE, dtype), key.to(DEVICE, dtype), specs


def check_mass(implementation, batch, **kwargs):
    query, key, specs = batch
    kwargs = dict(block_size=64, scale=query.shape[2] ** -0.5) | kwargs
    mass = implementation(query, key, specs, **kwargs)
    assert mass.dtype == torch.float32
    expected = naive_block_mass(query, key, specs, **kwargs)
    rtol = 1e-4 if HAS_GPU else 2e-5  # tensor cores round less carefully
    torch.testing.assert_close(mass.double(), expected, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [(2, 2, 64), (4, 2, 80), (4, 1, 128), (8, 1, 96), (16, 1, 64), (3, 1, 256)],
)
def test_mass_matches_naive(implementation, dtype, heads, kv_heads, dim):
    batch = make_batch([(333, 40), (130, 128), (192, 1)], heads, kv_heads, dim, dtype)
    check_mass(implementation, batch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("soft_cap", [0.0, 2.0, 50.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_mass_with_soft_cap_and_sinks(implementation, soft_cap, with_sinks):
    batch = make_batch([(200, 33), (140, 7)], 6, 2, 64, torch.bfloat16)
    # From negligible to more than all the keys together.
    sinks = torch.linspace(-5, 9, 6, device=DEVICE) if with_sinks else None
    check_mass(implementation, batch, soft_cap=soft_cap, sinks=sinks, scale=0.3)


HEAD_CHOICES = [[0], [5], [1, 2, 3], [0, 4, 5], [2, 4], list(range(6))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", HEAD_CHOICES, ids=str)
def test_mass_of_some_heads(implementation, heads):
    """Each with its own sink; a KV head that none of them reads may hold anything."""
    query, key, specs = make_batch([(333, 40), (130, 128)], 6, 3, 64, torch.bfloat16)
    sinks = torch.linspace(-5, 9, 6, device=DEVICE)[heads]
    kv_heads = [head // 2 for head in heads]
    unread = [head for head in range(3) if head not in kv_heads]
    key[:, unread] = math.nan
    check_mass(implementation, (query[:, heads], key, specs), sinks=sinks, kv_heads=kv_heads, soft_cap=20.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_heads_listed_are_all_heads(implementation):
    query, key, specs = make_batch([(700, 128), (130, 9)], 6, 2, 64, torch.bfloat16)
    kwargs = dict(block_size=64, scale=0.125)
    listed = implementation(query, key, specs, kv_heads=[0, 0, 0, 1, 1, 1], **kwargs)
    assert torch.equal(listed, implementation(query, key, specs, **kwargs))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [1, 2], [3]], ids=str)
def test_mass_of_queries_anywhere(implementation, heads):
    """What a query pays to its own block is in its denominator and in no mass."""
    generator = torch.Generator().manual_seed(7)
    query, key, specs = make_batch([(1100, 128), (333, 64), (64, 3)], 4, 2, 64, torch.bfloat16)
    positions = [torch.randperm(s.num_prompt, generator=generator)[: s.num_queries].sort().values for s in specs]
    check_mass(
        implementation,
        (query[:, heads], key, specs),
        positions=torch.cat(positions).to(DEVICE),
        kv_heads=[head // 2 for head in heads],
        sinks=torch.linspace(-5, 3, 4, device=DEVICE)[heads],
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 16, 48, 128, 150])
def test_mass_with_any_block_size(implementation, block_size):
    batch = make_batch([(259, 20), (150, 9)], 2, 1, 64, torch.bfloat16)
    check_mass(implementation, batch, block_size=block_size)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_of_long_prompts(implementation):
    """Several chunks of keys, whole and partial last blocks, all tile edges."""
    batch = make_batch([(3000, 128), (2048, 128), (1025, 65)], 4, 2, 64, torch.bfloat16)
    check_mass(implementation, batch)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_queries", [1, 2, 63, 64, 65, 128])
def test_mass_is_causal(implementation, num_queries):
    """All keys alike: query j gives each of the tokens up to it an equal share."""
    num_prompt = 193
    query = torch.randn(num_queries, 2, 64, device=DEVICE)
    key = torch.ones(num_prompt, 1, 64, device=DEVICE)
    spec = SelectionSpec(0, num_prompt, 0, num_queries, 0.9)
    mass = implementation(query, key, [spec], block_size=64, scale=0.1)
    expected = torch.zeros(num_prompt)
    for j in range(num_queries):
        seen = num_prompt - num_queries + j + 1
        expected[:seen] += 2 / seen
    expected = torch.stack([part.sum() for part in expected.split(64)])
    torch.testing.assert_close(mass.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_survives_extreme_logits(implementation):
    """Logits of thousands, most weights exactly zero: no NaN, nothing lost."""
    query, key, specs = make_batch([(400, 100)], 4, 2, 64, torch.bfloat16)
    kwargs = dict(block_size=64, scale=100.0)
    for sink, total in ((None, 400.0), (-1e5, 400.0), (1e6, 0.0)):
        sinks = None if sink is None else torch.full((4,), sink, device=DEVICE)
        mass = implementation(query, key, specs, sinks=sinks, **kwargs)
        assert mass.isfinite().all()
        torch.testing.assert_close(mass.sum().item(), total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_takes_views_of_packed_qkv(implementation):
    """As attention layers hand them over: slices of one projection."""
    heads, kv_heads, dim = 4, 2, 64
    qkv = torch.randn(300, (heads + 2 * kv_heads) * dim, device=DEVICE)
    q, k, _ = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    query, key = q.view(300, heads, dim)[-50:], k.view(300, kv_heads, dim)
    assert not key.is_contiguous()
    check_mass(implementation, (query, key, [SelectionSpec(0, 300, 0, 50, 0.9)]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("second_hop", [False, True])
def test_mass_is_batch_invariant(implementation, dtype, second_hop):
    """Alone or among others, at whatever rows: the same bits."""
    prompts = [(1100, 64), (333, 128), (150, 17)]
    query, key, specs = make_batch(prompts, 4, 2, 80, dtype)
    sinks = torch.randn(4, device=DEVICE)
    kwargs = dict(block_size=64, scale=0.2, sinks=sinks)
    everyones = [torch.arange(s.num_queries, device=DEVICE) + 20 for s in specs]

    def positions(*places):
        return {"positions": torch.cat([everyones[i] for i in places])} if second_hop else {}

    together = implementation(query, key, specs, **kwargs, **positions(0, 1, 2))
    queries = query.split([spec.num_queries for spec in specs])
    masses = together.split([math.ceil(spec.num_prompt / 64) for spec in specs])
    for place, (spec, q, mass) in enumerate(zip(specs, queries, masses, strict=True)):
        k = key[spec.row_start : spec.row_start + spec.num_prompt].clone()
        alone = SelectionSpec(0, spec.num_prompt, 0, spec.num_queries, 0.9)
        assert torch.equal(implementation(q.clone(), k, [alone], **kwargs, **positions(place)), mass)
    for row in range(1, 4):  # keys at any alignment
        k = torch.cat([key[:row], key[specs[1].row_start :][: specs[1].num_prompt]])
        moved = SelectionSpec(row, specs[1].num_prompt, 0, specs[1].num_queries, 0.9)
        assert torch.equal(implementation(queries[1], k, [moved], **kwargs, **positions(1)), masses[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mass_of_nothing(implementation):
    query, key = torch.empty(0, 4, 64), torch.randn(10, 2, 64)
    mass = implementation(query, key, [], block_size=64, scale=1.0)
    assert mass.shape == (0,) and mass.dtype == torch.float32


def test_reference_holds_little_memory(monkeypatch):
    """The chunking must not show in the result, only in the memory."""
    query, key, specs = make_batch([(700, 60)], 4, 2, 64, torch.float32)
    kwargs = dict(block_size=64, scale=0.125)
    expected = block_mass_reference(query, key, specs, **kwargs)
    monkeypatch.setattr(mass_module, "SCORES_PER_CHUNK", 64 * 16 * 2)
    monkeypatch.setattr(mass_module, "ROWS_PER_TILE", 16)
    small = block_mass_reference(query, key, specs, **kwargs)
    torch.testing.assert_close(small, expected, rtol=1e-5, atol=1e-6)


def test_dispatch_and_shape_errors():
    query, key, specs = make_batch([(130, 8)], 4, 2, 64, torch.bfloat16)
    kwargs = dict(block_size=64, scale=0.125)
    serving = block_mass_triton if HAS_GPU else block_mass_reference
    mass = block_mass(query, key, specs, **kwargs)
    assert torch.equal(mass, serving(query, key, specs, **kwargs))
    for bad_query, bad_key, sinks in [
        (query[:, :3], key, None),
        (query[..., :32], key, None),
        (query[1:], key, None),
        (query, key[: specs[0].row_start + 129], None),
        (query, key, torch.zeros(2, device=DEVICE)),
    ]:
        with pytest.raises(ValueError):
            block_mass(bad_query, bad_key, specs, sinks=sinks, **kwargs)
    for kv_heads in ([0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 2]):
        with pytest.raises(ValueError, match="kv_heads"):
            block_mass(query, key, specs, kv_heads=kv_heads, **kwargs)
    with pytest.raises(ValueError, match="positions"):
        block_mass(query, key, specs, positions=torch.arange(7), **kwargs)
    for num_queries in (0, 11):
        with pytest.raises(ValueError, match="num_queries"):
            SelectionSpec(0, 10, 0, num_queries, 0.9)
    for top_p, keep_ratio in ((None, None), (0.9, 0.5)):
        with pytest.raises(ValueError, match="exactly one"):
            SelectionSpec(0, 10, 0, 1, top_p, keep_ratio)


@GPU_ONLY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "prompts, heads, kv_heads, dim",
    [
        ([(131072, 128)], 32, 8, 128),
        ([(131072, 128)], 8, 1, 256),
        ([(100_001, 128), (1030, 128), (16384, 128)], 16, 2, 64),
        ([(32768, 128)] * 3, 64, 8, 64),
        ([(8192, 1), (5000, 128)], 40, 8, 80),
    ],
)
def test_kernels_at_full_length(prompts, heads, kv_heads, dim, dtype):
    seed = torch.seed() % 2**31
    query, key, specs = make_batch(prompts, heads, kv_heads, dim, dtype, seed)
    sinks = torch.randn(heads, device=DEVICE)
    kwargs = dict(block_size=64, scale=dim**-0.5, soft_cap=30.0, sinks=sinks)
    mass = block_mass(query, key, specs, **kwargs)
    expected = block_mass_reference(query, key, specs, **kwargs)
    torch.testing.assert_close(mass, expected, rtol=1e-4, atol=1e-6, msg=f"{seed=}")
    assert torch.equal(mass, block_mass(query, key, specs, **kwargs))


# --- choice of blocks ----------------------------------------------------------


def examples(count):
    """Settings that a busy machine does not fail."""
    slow = [HealthCheck.too_slow]
    return settings(max_examples=count, deadline=None, suppress_health_check=slow)


P_OR_RATIO = st.one_of(
    st.sampled_from([0.0, 0.07, 0.25, 0.3, 0.5, 0.75, 0.99, 1.0, 1.5]),
    st.integers(0, 10**6).map(lambda i: i / 10**6),
)
# Small integers make ties and zeros; powers of two, masses that vanish beside others.
MASSES = st.one_of(
    st.integers(0, 4).map(float),
    st.integers(-140, 20).map(lambda e: 2.0**e),
    st.floats(0, 16384, width=32),
)


@st.composite
def requests(draw):
    """Specs, one mass per block, and the settings of select_blocks."""
    block_size = draw(st.sampled_from([1, 4, 64]))
    specs, mass, row = [], [], draw(st.integers(0, 3))
    for _ in range(draw(st.integers(1, 3))):
        num_blocks = draw(st.integers(1, 25))
        num_prompt = num_blocks * block_size - draw(st.integers(0, block_size - 1))
        num_output = draw(st.integers(0, 3))
        share, by_ratio = draw(P_OR_RATIO), draw(st.booleans())
        p, ratio = (None, share) if by_ratio else (share, None)
        specs.append(SelectionSpec(row, num_prompt, num_output, 1, p, ratio))
        row += num_prompt + num_output + draw(st.integers(0, 3))
        mass += draw(st.lists(MASSES, min_size=num_blocks, max_size=num_blocks))
    options = dict(
        block_size=block_size,
        sink_tokens=draw(st.just(0) | st.integers(0, 3 * block_size)),
        recent_tokens=draw(st.just(0) | st.integers(0, 3 * block_size)),
        top_p_over=draw(st.sampled_from(["all", "middle"])),
    )
    return specs, torch.tensor(mass, device=DEVICE), row, options


def per_request(values, specs, block_size):
    counts = [math.ceil(spec.num_prompt / block_size) for spec in specs]
    return [part.tolist() for part in values.split(counts)]


def forced_blocks(spec, block_size, sink_tokens, recent_tokens, **_):
    """Token by token, as the design words it."""
    n = spec.num_prompt
    tokens = [t for t in range(n) if t < sink_tokens or t >= n - recent_tokens]
    return {t // block_size for t in tokens}


def by_weight(blocks, mass):
    return sorted(blocks, key=lambda b: (-mass[b], b))


@examples(300)
@given(requests())
def test_selection_properties(case):
    specs, mass, _, options = case
    keep = select_blocks(mass, specs, **options)
    assert keep.dtype == torch.bool and keep.shape == mass.shape
    size = options["block_size"]
    kept_of = per_request(keep, specs, size)
    for spec, m, kept in zip(specs, per_request(mass, specs, size), kept_of, strict=False):
        forced = forced_blocks(spec, **options)
        kept = {b for b, is_kept in enumerate(kept) if is_kept}
        everything = set(range(len(m)))
        assert forced <= kept
        chosen = kept - forced
        # The heaviest, at equal mass the earliest.
        order = by_weight(everything - forced, m)
        assert chosen == set(order[: len(chosen)])
        if spec.keep_ratio is not None:
            share = Fraction(spec.keep_ratio).limit_denominator(10**6)
            count = min(math.ceil(share * len(m)), len(m))
            assert len(kept) == max(len(forced), count)
            continue
        if spec.top_p >= 1:
            assert kept == everything
            continue
        pool = everything if options["top_p_over"] == "all" else everything - forced
        weight = {b: Fraction(m[b]) for b in pool}
        if sum(weight.values()) == 0:
            weight = {b: Fraction(1) for b in pool}
        total, tolerance = sum(weight.values()), Fraction(1, 10**13)
        target = Fraction(spec.top_p) * total
        # Blocks in order of weight up to the last one chosen, forced ones between
        # included: they must reach the target, and not without that last one.
        # What comes next would have been superfluous.
        ranking = by_weight(pool, {b: weight[b] for b in pool})
        before = Fraction(0)
        for b in ranking:
            if b not in forced:
                slack = (1 if b in chosen else -1) * tolerance * total
                assert (before < target + slack) == (b in chosen) or abs(before - target) <= tolerance * total
            before += weight[b]
        assert sum(weight[b] for b in pool & kept) >= target - tolerance * total


@examples(100)
@given(requests(), P_OR_RATIO, P_OR_RATIO, st.booleans())
def test_more_share_keeps_more(case, low, high, by_ratio):
    specs, mass, _, options = case
    low, high = sorted((low, high))

    def select(share):
        p, ratio = (None, share) if by_ratio else (share, None)
        these = [SelectionSpec(s.row_start, s.num_prompt, s.num_output, 1, p, ratio) for s in specs]
        return select_blocks(mass, these, **options)

    assert (select(low) <= select(high)).all()


@examples(50)
@given(requests())
def test_selection_is_batch_invariant(case):
    specs, mass, _, options = case
    size = options["block_size"]
    keep = per_request(select_blocks(mass, specs, **options), specs, size)
    masses = mass.split([len(k) for k in keep])
    for spec, m, kept in zip(specs, masses, keep, strict=False):
        assert select_blocks(m.clone(), [spec], **options).tolist() == kept


def select_one(mass, share, by_ratio=False, over="all", sink=0, recent=0, short=0):
    """Blocks of 4 tokens, the last one `short` of some."""
    p, ratio = (None, share) if by_ratio else (share, None)
    spec = SelectionSpec(0, 4 * len(mass) - short, 0, 1, p, ratio)
    keep = select_blocks(
        torch.tensor(mass, dtype=torch.float32, device=DEVICE),
        [spec],
        block_size=4,
        sink_tokens=sink,
        recent_tokens=recent,
        top_p_over=over,
    )
    return keep.nonzero().flatten().tolist()


def test_crossing_block_is_kept():
    assert select_one([1, 5, 2, 8], 0.5) == [3]  # exactly reached
    assert select_one([1, 5, 2, 8], 0.51) == [1, 3]
    assert select_one([1, 5, 2, 8], 13 / 16) == [1, 3]
    assert select_one([1, 5, 2, 8], 0.82) == [1, 2, 3]


def test_ties_go_to_the_earlier_block():
    assert select_one([1, 2, 2, 1, 2, 2], 0.5) == [1, 2, 4]
    assert select_one([1] * 100, 0.25) == list(range(25))
    assert select_one([1, 2, 1, 2, 1], 0.8, by_ratio=True) == [0, 1, 2, 3]


def test_forced_blocks_can_spend_the_budget():
    """Why `top_p_over` exists: the needle at 3 is first among the rest."""
    mass = [50, 1, 1, 6, 1, 1, 45]
    assert select_one(mass, 0.9, sink=1, recent=1) == [0, 6]
    assert select_one(mass, 0.5, over="middle", sink=1, recent=1) == [0, 3, 6]


def test_forced_blocks_are_whole():
    mass = [0, 0, 0, 0, 0, 9]
    assert select_one(mass, 0.0, sink=4) == [0]
    assert select_one(mass, 0.0, sink=5) == [0, 1]
    assert select_one(mass, 0.0, recent=4) == [5]
    assert select_one(mass, 0.0, recent=5) == [4, 5]
    assert select_one(mass, 0.0, recent=4, short=1) == [4, 5]
    assert select_one(mass, 0.0, recent=3, short=1) == [5]
    assert select_one(mass, 0.0, short=1) == []


def test_top_p_one_keeps_even_the_lightest():
    mass = [2.0**-149, 0.0, 16384.0, 2.0**-30] * 600
    for over in ("all", "middle"):
        assert len(select_one(mass, 1.0, over=over, sink=4, recent=4)) == 2400


def test_top_p_near_one_is_exact():
    """fp32 sums of thousands of blocks would be off by many of them."""
    mass = [1.0] * 4096
    for kept in (4095, 4000, 2049):
        assert select_one(mass, kept / 4096) == list(range(kept))
        assert select_one(mass, (kept + 1e-6) / 4096) == list(range(kept + 1))
    mass = [float(i * 37 % 1009 + 1) for i in range(1000)]
    for kept in (1, 300, 700, 990):
        reached = sum(sorted(mass, reverse=True)[:kept])
        assert len(select_one(mass, (reached - 1e-4) / sum(mass))) == kept
        assert len(select_one(mass, (reached + 1e-4) / sum(mass))) == kept + 1


@pytest.mark.parametrize("empty", [0.0, math.nan])
def test_no_mass_keeps_by_order(empty):
    middle = [empty] * 8
    for over in ("all", "middle"):
        assert select_one(middle, 0.5, over=over) == [0, 1, 2, 3]
    kept = select_one([7.0] + middle + [7.0], 0.5, over="middle", sink=1, recent=1)
    assert kept == [0, 1, 2, 3, 4, 9]
    assert select_one([0.0] * 8, 0.5, by_ratio=True) == [0, 1, 2, 3]


def test_keep_ratio_is_not_rounded_up_by_float_noise():
    for num_blocks in (10, 100, 700, 1000):
        for percent in range(1, 101):
            count = -(-percent * num_blocks // 100)
            mass = [1.0] * num_blocks
            assert len(select_one(mass, percent / 100, by_ratio=True)) == count


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_selection_ignores_the_default_dtype(default):
    """Since vLLM sets it to the model's."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert len(select_one([1.0] * 1000, 0.9375)) == 938
        assert select_one([0.0] * 8, 0.5) == [0, 1, 2, 3]
    finally:
        torch.set_default_dtype(previous)


# --- the second hop ------------------------------------------------------------

HOP_SIZES = dict(block_size=4, sink_tokens=4, recent_tokens=4)


def test_the_heaviest_middle_blocks_ask_in_their_order():
    """At equal mass the earlier one; requests with one hop or that keep all ask nothing."""
    two_hops = SelectionSpec(3, 24, 0, 2, 0.9, hops=2)
    one_hop, all_kept = SelectionSpec(30, 24, 0, 2, 0.9), SelectionSpec(60, 24, 0, 2, 1.0, hops=2)
    specs = [one_hop, two_hops, all_kept]
    mass = torch.tensor([9.0] * 6 + [50, 1, 3, 2, 3, 70] + [9] * 6, device=DEVICE)
    blocks = heaviest_blocks(mass, specs, **HOP_SIZES, hop_blocks=2)
    assert blocks.tolist() == [2, 4]
    hop = second_hop(blocks, specs, **HOP_SIZES, hop_blocks=2)
    assert hop.of == [1] and [spec.num_queries for spec in hop.specs] == [8]
    assert hop.positions.tolist() == [8, 9, 10, 11, 16, 17, 18, 19]
    assert hop.rows.tolist() == [3 + token for token in hop.positions.tolist()]
    assert heaviest_blocks(mass, specs, **HOP_SIZES, hop_blocks=9).tolist() == [1, 2, 3, 4]
    assert heaviest_blocks(mass, [one_hop], **HOP_SIZES, hop_blocks=2).tolist() == []
    assert second_hop(blocks[:0], [one_hop], **HOP_SIZES, hop_blocks=2) is None


@pytest.mark.parametrize("share", [{"top_p": 0.8}, {"keep_ratio": 0.5}], ids=str)
def test_either_hops_blocks_stay(share):
    """The second one's by the same share of the middle, whatever `top_p_over` says."""
    specs = [SelectionSpec(0, 24, 0, 2, **share), SelectionSpec(24, 24, 0, 2, **share, hops=2)]
    mass = torch.tensor([40.0, 9, 1, 0, 0, 50] * 2, device=DEVICE)
    hop = second_hop(heaviest_blocks(mass, specs, **HOP_SIZES, hop_blocks=1), specs, **HOP_SIZES, hop_blocks=1)
    hop_mass = torch.tensor([90.0, 0, 0, 1, 9, 0], device=DEVICE)
    first = select_blocks(mass, specs, **HOP_SIZES, top_p_over="all").view(2, 6)
    both = select_blocks(mass, specs, **HOP_SIZES, top_p_over="all", hop=hop, hop_mass=hop_mass).view(2, 6)
    assert torch.equal(both[0], first[0])
    assert both[1].tolist() == [kept or block == 4 for block, kept in enumerate(first[1].tolist())]
    assert known_kept_tokens(specs[1], **HOP_SIZES) is None


# --- surviving rows ------------------------------------------------------------


@examples(200)
@given(requests(), st.integers(0, 3))
def test_kept_rows_match_a_loop(case, tail):
    specs, mass, num_rows, options = case
    num_rows += tail
    size = options["block_size"]
    keep = select_blocks(mass, specs, **options)
    expected, counts = set(range(num_rows)), []
    for spec, kept in zip(specs, per_request(keep, specs, size), strict=False):
        dropped = {spec.row_start + t for t in range(spec.num_prompt) if not kept[t // size]}
        expected -= dropped
        counts.append(spec.num_prompt - len(dropped))

    forcing = {k: options[k] for k in ("block_size", "sink_tokens", "recent_tokens")}
    known = [known_kept_tokens(spec, **forcing) for spec in specs]
    for spec, known_count, count in zip(specs, known, counts, strict=False):
        assert known_count in (None, count)
        if known_count is None and spec.keep_ratio is not None:
            assert options["recent_tokens"] == 0 and spec.num_prompt % size
    for keep_counts in (None, known, counts):
        rows, found = kept_rows(keep, specs, num_rows, block_size=size, keep_counts=keep_counts)
        assert rows.dtype == torch.int64
        assert rows.tolist() == sorted(expected)
        assert found == counts and all(type(count) is int for count in found)


def test_without_specs_all_rows_stay():
    keep = torch.ones(0, dtype=torch.bool, device=DEVICE)
    rows, counts = kept_rows(keep, [], 5, block_size=64)
    assert rows.tolist() == [0, 1, 2, 3, 4] and counts == []


@GPU_ONLY
def test_syncs():
    """Nothing waits for the device, but for the counts under top-p, once."""
    query, key, specs = make_batch([(4096, 128), (2000, 128)], 8, 2, 64, torch.bfloat16)
    forcing = dict(block_size=64, sink_tokens=128, recent_tokens=128)

    def run(specs):
        mass = block_mass(query, key, specs, block_size=64, scale=0.125)
        keep = select_blocks(mass, specs, top_p_over="all", **forcing)
        known = [known_kept_tokens(spec, **forcing) for spec in specs]
        return kept_rows(keep, specs, len(key), block_size=64, keep_counts=known)

    by_ratio = [SelectionSpec(s.row_start, s.num_prompt, 0, s.num_queries, None, 0.3) for s in specs]
    run(specs), run(by_ratio)  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(by_ratio)
        with pytest.raises(RuntimeError, match="synchroniz"):
            run(specs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
