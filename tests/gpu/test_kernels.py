"""Every Triton kernel of ours against plain torch, on random inputs between guard bands.

On a GPU: bf16 and fp16, heads of 64, 128, 256 and 576, 1 to 16 query heads a KV head, packed batches, lengths up to 128K;
also that no length compiles a kernel anew. Everywhere a few small cases, in Triton's interpreter where there is no GPU.
KERNEL_SEED draws other cases.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from guards import GuardedAllocations, Guards
from vllm.v1.uniprefill.selection import SelectionSpec, mass_triton, select_blocks
from vllm.v1.uniprefill.selection.mass_triton import block_mass_triton
from vllm.v1.worker.gpu.uniprefill.state import GroupSegments, SegmentState

SEED = int(os.environ.get("KERNEL_SEED", "1"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-3  # relative, of norms: 16-bit products are exact in fp32, sums are not
BLOCK_SIZE, SINK, RECENT = 64, 128, 128
LONG = 131072
PAD = -1


@dataclass(frozen=True)
class MassCase:
    """Packed prompts, each of (tokens, queries), in one shape."""

    dtype: torch.dtype
    head_dim: int
    group: int
    kv_heads: int
    prompts: tuple[tuple[int, int], ...]
    soft_cap: float = 0.0
    sinks: bool = False
    heads: tuple[int, ...] | None = None
    second_hop: bool = False

    @property
    def name(self) -> str:
        extra = (", soft cap" if self.soft_cap else "") + (", sinks" if self.sinks else "")
        extra += f", heads {self.heads}" if self.heads else ""
        extra += ", second hop" if self.second_hop else ""
        prompts = " + ".join(f"{tokens}" for tokens, _ in self.prompts)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, {self.group * self.kv_heads}/{self.kv_heads} heads of {self.head_dim}, {prompts}{extra}"


def mass_cases(small: bool, on_gpu: bool = DEVICE == "cuda", seed: int = SEED) -> list[MassCase]:
    """Every dtype, head size and group, with a packed batch and, at full size, a 128K prompt each."""
    source = random.Random(seed)
    # The interpreter multiplies the bit patterns of bf16.
    dtypes = [torch.bfloat16, torch.float16] if on_gpu else [torch.float16]
    dims, groups = ([64, 256], [1, 4]) if small else ([64, 128, 256], [1, 2, 4, 8, 16])
    cases = []
    for dtype, dim, group in itertools.product(dtypes, dims, groups):
        kv_heads = 1 if small else max(1, min(8, 32 // group))
        longest = 400 if small else 20_000
        packed = tuple((source.randrange(129, longest), source.choice((1, 7, 64, 127, 128))) for _ in range(3))
        soft_cap, sinks = source.choice(((0.0, False), (0.0, True), (30.0, False)))
        cases.append(MassCase(dtype, dim, group, kv_heads, packed, soft_cap, sinks))
        heads = tuple(sorted(source.sample(range(group * kv_heads), source.randint(1, group * kv_heads))))
        cases.append(MassCase(dtype, dim, group, kv_heads, packed, soft_cap, sinks, heads, second_hop=True))
        if not small:
            cases.append(MassCase(dtype, dim, group, kv_heads, ((LONG - source.randrange(64), 128),)))
        cases += [MassCase(dtype, 576, 4 if small else 16, 1, packed)]  # MLA's latent and RoPE part
    source.shuffle(cases)
    return cases


def expected_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    specs: Sequence[SelectionSpec],
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,
    kv_heads: Sequence[int],
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """The definition in float64, one head after the other."""
    masses, start = [], 0
    for spec in specs:
        rows = slice(spec.row_start, spec.row_start + spec.num_prompt)
        token = torch.arange(spec.num_prompt, device=key.device)
        position = token[-spec.num_queries :] if positions is None else positions[start : start + spec.num_queries]
        seen = token <= position[:, None]
        own = token // BLOCK_SIZE == position[:, None] // BLOCK_SIZE
        mass = torch.zeros(spec.num_prompt, dtype=torch.float64, device=key.device)
        for head in range(query.shape[1]):
            q = query[start : start + spec.num_queries, head].double()
            logits = q @ key[rows, kv_heads[head]].double().T * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().expand(spec.num_queries, 1)], 1)
            weights = logits.softmax(1)[:, : spec.num_prompt]
            mass += (weights if positions is None else weights.masked_fill(own, 0)).sum(0)
        masses += [part.sum() for part in mass.split(BLOCK_SIZE)]
        start += spec.num_queries
    return torch.stack(masses)


def check_mass(case: MassCase, device: str = DEVICE) -> None:
    """The error of the masses, the blocks chosen otherwise, and the bands."""
    generator = torch.Generator(device).manual_seed(SEED)
    guards = Guards(device)
    specs, row = [], 5
    for tokens, queries in case.prompts:
        specs.append(SelectionSpec(row, tokens, 2, queries, top_p=0.9))
        row += tokens + 2 + 5
    heads = case.group * case.kv_heads
    # Rows that are no keys hold NaN: reading one into a sum shows.
    key = guards.empty(row, case.kv_heads, case.head_dim, dtype=case.dtype)
    for spec in specs:
        keys = torch.randn(spec.num_prompt, case.kv_heads, case.head_dim, generator=generator, device=device)
        key[spec.row_start : spec.row_start + spec.num_prompt] = keys.to(case.dtype)
    count = sum(spec.num_queries for spec in specs)
    sharpness = torch.linspace(0.5, 3, heads, device=device)[:, None]
    values = torch.randn(count, heads, case.head_dim, generator=generator, device=device) * sharpness
    chosen = list(case.heads or range(heads))
    kv_heads = [head // case.group for head in chosen]
    query = guards.holding(values[:, chosen].to(case.dtype))
    sinks = torch.linspace(-5, 9, heads, device=device)[chosen] if case.sinks else None
    positions = None
    if case.second_hop:
        places = [torch.randperm(spec.num_prompt, generator=generator, device=device) for spec in specs]
        places = [place[: spec.num_queries].sort().values for place, spec in zip(places, specs, strict=True)]
        positions = guards.holding(torch.cat(places))
    scale = case.head_dim**-0.5
    mass = block_mass_triton(
        GuardedAllocations.of(query, guards),
        key,
        specs,
        block_size=BLOCK_SIZE,
        scale=scale,
        soft_cap=case.soft_cap,
        sinks=sinks,
        kv_heads=kv_heads if case.heads else None,
        positions=positions,
    )
    expected = expected_mass(query, key, specs, scale, case.soft_cap, sinks, kv_heads, positions)
    error = float((mass.double() - expected).norm() / expected.norm())
    differing = blocks_chosen_otherwise(mass, expected, specs)
    assert error <= TOLERANCE, f"seed {SEED}"  # NaN agrees with nothing
    assert differing == 0, f"blocks chosen otherwise, seed {SEED}"
    assert guards.broken() == 0, f"a buffer was written beside, seed {SEED}"


def blocks_chosen_otherwise(mass: torch.Tensor, expected: torch.Tensor, specs: Sequence[SelectionSpec]) -> int:
    """Blocks that one keeps and the other drops, but for those whose mass ties with the last one kept."""
    forced = {"block_size": BLOCK_SIZE, "sink_tokens": SINK, "recent_tokens": RECENT, "top_p_over": "all"}
    ours, theirs = (select_blocks(values, specs, **forced) for values in (mass, expected.float()))
    count, start = 0, 0
    for spec in specs:
        blocks = slice(start, start := start + -(-spec.num_prompt // BLOCK_SIZE))
        differ = ours[blocks] != theirs[blocks]
        if not bool(differ.any()):
            continue
        values = expected[blocks]
        order = values.sort(descending=True).values
        before = order.cumsum(0) - order
        last = order[before < spec.top_p * order.sum()][-1]
        count += int((differ & ((values - last).abs() > 3 * TOLERANCE * last)).sum())
    return count


def state_case(small: bool, seed: int) -> dict[str, Any]:
    """Arguments of `check_state`: a prefill among decodes."""
    source = random.Random(seed)
    longest = 600 if small else LONG
    new = [source.choice((1, 1, source.randrange(2, 90))) for _ in range(source.randrange(1, 4 if small else 33))]
    new[0] = source.randrange(1, longest)
    return {"new": new, "segments": source.randrange(2, 6), "seed": seed, "longest": longest}


def check_state(new: list[int], segments: int, seed: int, longest: int, device: str = DEVICE) -> None:
    """The kernel that derives lengths and slots of each segment, against plain torch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=generator)

    block_size, max_reqs, padding = 16, len(new) + 3, 7
    rows = sum(new)
    dropped = draw(0, longest // 2, segments, max_reqs).sort(0).values.int()
    dropped[0] = 0
    seq_lens = torch.tensor(new, dtype=torch.int32) + longest // 2 + draw(0, longest // 2, len(new)).int()
    most_blocks = -(-int(seq_lens.max()) // block_size)
    block_table = torch.randperm(max_reqs * most_blocks, generator=generator).view(max_reqs, most_blocks).int()
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    slots = draw(0, 1 << 20, rows + padding)
    slots[rows:] = PAD
    slots[draw(0, rows, max(1, rows // 50))] = PAD
    guards = Guards(device)
    request_slots = torch.randperm(max_reqs, generator=generator)[: len(new)]
    inputs = [request_slots, starts, torch.nn.functional.pad(seq_lens, (0, 2)), slots]
    given = [guards.holding(tensor.to(device)) for tensor in inputs]
    table = guards.holding(block_table.to(device))
    middle = max(1, segments // 2)  # the second group returns the blocks of what its first segment dropped
    groups = [
        GroupSegments(0, block_size, tuple(range(middle)), table, 0),
        GroupSegments(1, block_size, tuple(range(middle, segments)), table, middle),
    ]
    found = []
    for way in ("triton", "reference"):
        state = SegmentState(segments, max_reqs, rows + padding, groups, torch.device(device))
        state.dropped.copy_(dropped)
        state.seq_lens = guards.holding(state.seq_lens)
        state.slot_mappings = guards.holding(state.slot_mappings)
        shifted = guards.holding(torch.zeros_like(table))
        for group in groups:
            start, end = group.rows(range(1, segments))
            if start < end:
                getattr(state, f"update_{way}")(group, start, end, *given)
        getattr(state, f"shift_{way}")(groups[1], given[0], shifted)
        found.append((state.seq_lens, state.slot_mappings, shifted))
    ours, theirs = found
    assert all(map(torch.equal, ours, theirs))
    assert guards.broken() == 0, "a buffer was written beside"


def on_gpu(function):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")(function))


@pytest.mark.parametrize("seed", range(SEED, SEED + 4))
def test_small_lengths_and_slots(seed: int) -> None:
    check_state(**state_case(True, seed))


@on_gpu
@pytest.mark.parametrize("seed", range(SEED, SEED + 24))
def test_lengths_and_slots(seed: int) -> None:
    check_state(**state_case(False, seed))


@pytest.mark.parametrize("case", mass_cases(small=True), ids=lambda case: case.name)
def test_small_masses(case: MassCase) -> None:
    check_mass(case)


@on_gpu
def test_no_length_batch_or_query_count_compiles_a_kernel_anew() -> None:
    def variants() -> int:
        kernels = ("_block_lse_kernel", "_row_lse_kernel", "_mass_kernel")
        caches = [getattr(mass_triton, name).device_caches.values() for name in kernels]
        return sum(len(cache[0]) for found in caches for cache in found)

    counts = []
    for number, tokens in enumerate((3000, 40_000, 9001, LONG)):
        prompts, queries = 1 + number % 2, 128 - 3 * number
        specs = [SelectionSpec(i * tokens, tokens, 0, queries, 0.9) for i in range(prompts)]
        key = torch.randn(prompts * tokens, 8, 128, dtype=torch.float16, device=DEVICE)
        query = torch.randn(prompts * queries, 32, 128, dtype=torch.float16, device=DEVICE)
        block_mass_triton(query, key, specs, block_size=BLOCK_SIZE, scale=0.1)
        counts.append(variants())
    assert len(set(counts)) == 1


@on_gpu
@pytest.mark.parametrize("case", mass_cases(small=False), ids=lambda case: case.name)
def test_masses(case: MassCase) -> None:
    check_mass(case)


# --- what the checks catch


def unwritten(mass: torch.Tensor) -> torch.Tensor:
    mass[2] = float("nan")
    return mass


def beside(mass: torch.Tensor) -> torch.Tensor:
    torch.as_strided(mass, (1,), (1,), mass.storage_offset() + len(mass)).fill_(0)
    return mass


def before(mass: torch.Tensor) -> torch.Tensor:
    torch.as_strided(mass, (1,), (1,), mass.storage_offset() - 1).fill_(0)
    return mass


def shifted(mass: torch.Tensor) -> torch.Tensor:
    return mass.roll(1)


def imprecise(mass: torch.Tensor) -> torch.Tensor:
    return mass * 1.002


@pytest.mark.parametrize("fault", [unwritten, beside, before, shifted, imprecise])
def test_a_faulty_kernel_does_not_pass(fault, monkeypatch: pytest.MonkeyPatch) -> None:
    made = block_mass_triton
    monkeypatch.setitem(globals(), "block_mass_triton", lambda *args, **more: fault(made(*args, **more)))
    with pytest.raises(AssertionError):
        check_mass(MassCase(torch.float16, 64, 2, 1, ((200, 40), (129, 1)), sinks=True))


def test_a_fault_in_lengths_and_slots_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    update = SegmentState.update_triton

    def off_by_one(self, *args) -> None:
        update(self, *args)
        self.slot_mappings[-1, 0] += 1

    monkeypatch.setattr(SegmentState, "update_triton", off_by_one)
    with pytest.raises(AssertionError):
        check_state(**state_case(True, 7))


def test_the_cases_on_a_gpu_cover_what_is_promised() -> None:
    cases = mass_cases(small=False, on_gpu=True, seed=11)
    assert {case.dtype for case in cases} == {torch.bfloat16, torch.float16}
    assert {case.head_dim for case in cases} == {64, 128, 256, 576}
    assert {case.group for case in cases} == {1, 2, 4, 8, 16}
    longest = [max(tokens for tokens, _ in case.prompts) for case in cases]
    assert max(longest) > 131_000 and any(len(case.prompts) == 3 for case in cases)


def test_blocks_that_tie_may_be_chosen_otherwise_and_others_not() -> None:
    spec = SelectionSpec(0, 64 * 40, 0, 1, top_p=0.5)
    expected = torch.linspace(2, 1, 40).double()
    ours = expected.float().clone()
    assert blocks_chosen_otherwise(ours, expected, [spec]) == 0
    ours[[5, 30]] = ours[[30, 5]]
    assert blocks_chosen_otherwise(ours, expected, [spec]) == 2
    flat = torch.ones(40).double()
    nearly = (1 + 1e-6 * torch.arange(40)).float()
    assert blocks_chosen_otherwise(nearly, flat, [spec]) == 0
