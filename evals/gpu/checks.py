"""Every Triton kernel of ours against plain torch, on fresh random inputs between guard bands.

    python -m evals.gpu.checks --output FILE [--small] [--seconds N]

On a GPU: bf16 and fp16, heads of 64, 128 and 256, 1 to 16 query heads a KV head, packed batches,
lengths up to 128K; also that no length compiles a kernel anew. Without one, or with --small, a few
small cases, in Triton's interpreter where there is no GPU. The cases are in random order, and FILE
is written after each, so a run that ends early has checked a sample. Exit status 0: all agree.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.v1.uniprefill import selection_kernels
from vllm.v1.uniprefill.selection import SelectionSpec, select_blocks
from vllm.v1.uniprefill.selection_kernels import block_mass_triton
from vllm.v1.worker.gpu.uniprefill.state import SegmentState

from evals.gpu.guards import GuardedAllocations, Guards
from scripts.fork import run_main, say

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

    @property
    def name(self) -> str:
        extra = (", soft cap" if self.soft_cap else "") + (", sinks" if self.sinks else "")
        prompts = " + ".join(f"{tokens}" for tokens, _ in self.prompts)
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, {self.group * self.kv_heads}/{self.kv_heads} heads of {self.head_dim}, {prompts}{extra}"


def mass_cases(small: bool, on_gpu: bool, seed: int) -> list[MassCase]:
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
        if not small:
            cases.append(MassCase(dtype, dim, group, kv_heads, ((LONG - source.randrange(64), 128),)))
    source.shuffle(cases)
    return cases


def expected_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    specs: Sequence[SelectionSpec],
    scale: float,
    soft_cap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The definition in float64, one head after the other."""
    group = query.shape[1] // key.shape[1]
    masses, start = [], 0
    for spec in specs:
        rows = slice(spec.row_start, spec.row_start + spec.num_prompt)
        seen = torch.ones(spec.num_queries, spec.num_prompt, dtype=torch.bool, device=key.device)
        seen = seen.tril(spec.num_prompt - spec.num_queries)
        mass = torch.zeros(spec.num_prompt, dtype=torch.float64, device=key.device)
        for head in range(query.shape[1]):
            q = query[start : start + spec.num_queries, head].double()
            logits = q @ key[rows, head // group].double().T * scale
            if soft_cap:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            logits = logits.masked_fill(~seen, -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks[head].double().expand(spec.num_queries, 1)], 1)
            mass += logits.softmax(1)[:, : spec.num_prompt].sum(0)
        masses += [part.sum() for part in mass.split(BLOCK_SIZE)]
        start += spec.num_queries
    return torch.stack(masses)


def check_mass(case: MassCase, device: str, seed: int) -> dict[str, Any]:
    """One case: the error of the masses, the blocks chosen otherwise, and the bands."""
    generator = torch.Generator(device).manual_seed(seed)
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
    query = guards.holding(values.to(case.dtype))
    sinks = torch.linspace(-5, 9, heads, device=device) if case.sinks else None
    scale = case.head_dim**-0.5
    mass = block_mass_triton(
        GuardedAllocations.of(query, guards),
        key,
        specs,
        block_size=BLOCK_SIZE,
        scale=scale,
        soft_cap=case.soft_cap,
        sinks=sinks,
    )
    expected = expected_mass(query, key, specs, scale, case.soft_cap, sinks)
    error = float((mass.double() - expected).norm() / expected.norm())
    differing = blocks_chosen_otherwise(mass, expected, specs)
    broken = guards.broken()
    agrees = error <= TOLERANCE and differing == 0 and broken == 0  # NaN agrees with nothing
    return {"case": case.name, "error": error, "chosen_otherwise": differing, "broken_bands": broken, "agrees": agrees}


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


def state_cases(small: bool, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, arguments of `check_state`)."""
    source = random.Random(seed)
    for number in range(4 if small else 24):
        longest = 600 if small else LONG
        count = source.randrange(1, 4 if small else 33)
        new = [source.choice((1, 1, source.randrange(2, 90))) for _ in range(count)]
        new[0] = source.randrange(1, longest)  # a prefill among decodes
        yield (
            f"lengths and slots, {count} requests, {sum(new)} rows",
            {"new": new, "segments": source.randrange(2, 6), "seed": seed + number, "longest": longest},
        )


def check_state(new: list[int], segments: int, seed: int, longest: int, device: str) -> dict[str, Any]:
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
    block_table = torch.randperm(len(new) * most_blocks, generator=generator).view(len(new), most_blocks).int()
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    slots = draw(0, 1 << 20, rows + padding)
    slots[rows:] = PAD
    slots[draw(0, rows, max(1, rows // 50))] = PAD
    guards = Guards(device)
    request_slots = torch.randperm(max_reqs, generator=generator)[: len(new)]
    inputs = [request_slots, starts, torch.nn.functional.pad(seq_lens, (0, 2)), block_table, slots]
    given = [guards.holding(tensor.to(device)) for tensor in inputs]
    states = []
    for method in ("update_triton", "update_reference"):
        state = SegmentState(segments, max_reqs, rows + padding, block_size, torch.device(device))
        state.dropped.copy_(dropped)
        state.seq_lens = guards.holding(state.seq_lens)
        state.slot_mappings = guards.holding(state.slot_mappings)
        getattr(state, method)(range(1, segments), *given)
        states.append(state)
    ours, theirs = states
    wrong = int((ours.seq_lens != theirs.seq_lens).sum() + (ours.slot_mappings != theirs.slot_mappings).sum())
    broken = guards.broken()
    return {"wrong": wrong, "broken_bands": broken, "agrees": wrong == 0 and broken == 0}


def compiled_variants() -> int | None:
    """How many variants of the kernels Triton has compiled; None in the interpreter."""
    kernels = [
        selection_kernels._block_lse_kernel,
        selection_kernels._row_lse_kernel,
        selection_kernels._mass_kernel,
    ]
    if not all(hasattr(kernel, "device_caches") for kernel in kernels):
        return None
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def new_variants(device: str, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int | None:
    """Variants that other lengths, batches and query counts compile after the first one."""
    before = None
    for number, tokens in enumerate(lengths):
        prompts = [tokens] * (1 + number % 2)
        queries = 128 - 3 * number
        specs = [SelectionSpec(i * tokens, tokens, 0, queries, 0.9) for i in range(len(prompts))]
        key = torch.randn(sum(prompts), kv_heads, head_dim, dtype=torch.float16, device=device)
        query = torch.randn(queries * len(prompts), heads, head_dim, dtype=torch.float16, device=device)
        block_mass_triton(query, key, specs, block_size=BLOCK_SIZE, scale=0.1)
        if before is None:
            before = compiled_variants()
    after = compiled_variants()
    return None if before is None or after is None else after - before


def check_all(output: Path, small: bool, seconds: float, seed: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = small or device == "cpu"
    started = time.monotonic()
    found: dict[str, Any] = {"device": device, "seed": seed, "small": small, "cases": [], "failed": []}

    def keep(row: dict[str, Any]) -> None:
        found["cases"].append(row)
        found["failed"] = [case["case"] for case in found["cases"] if not case["agrees"]]
        output.write_text(json.dumps(found, indent=1) + "\n")

    def left() -> bool:
        return time.monotonic() - started < seconds

    masses = mass_cases(small, device == "cuda", seed)
    states = list(state_cases(small, seed))
    found["planned"] = len(masses) + len(states)
    for name, arguments in states:
        if left():
            keep({"case": name} | check_state(**arguments, device=device))
    lengths = (300, 470, 1100) if small else (3000, 40_000, 9001, LONG)
    shape = (2, 1, 64) if small else (32, 8, 128)
    found["new_variants"] = new_variants(device, lengths, *shape)
    for number, case in enumerate(masses):
        if left():
            keep(check_mass(case, device, seed + number))
    say(f"{len(found['cases'])} of {found['planned']} cases, {len(found['failed'])} do not agree")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.gpu.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--small", action="store_true", help="few small cases, as for compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="N", help="start no case after so many")
    parser.add_argument("--seed", type=int, help="(default: a fresh one, which FILE names)")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(1 << 30) if args.seed is None else args.seed
    return 1 if check_all(args.output, args.small, args.seconds, seed)["failed"] else 0


if __name__ == "__main__":
    run_main(main)
