"""The part kernels: selection alone, against its floors and against plain torch; no engine.

On a GPU the Triton kernels are timed. Without one it is the torch reference that serves there,
since Triton's interpreter says nothing about speed; the row says which.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evals.bench.arithmetic import ModelShape, compare, selection_floor, size_label, spread
from scripts.fork import say

if TYPE_CHECKING:
    import torch
    from vllm.v1.uniprefill.selection import SelectionSpec

NUM_QUERIES, BLOCK_SIZE, SINK, RECENT = 128, 64, 128, 128
CACHE_BYTES = 256 << 20  # inputs in turn from this much memory, so that no cache holds them
MOST_SETS = 8


def plain_block_mass(query: torch.Tensor, key: torch.Tensor, block_size: int, scale: float) -> torch.Tensor:
    """What one writes first: all scores in memory, softmax, sum. One prompt, `[blocks]` fp32."""
    import torch

    num_queries, heads, _ = query.shape
    tokens, kv_heads, _ = key.shape
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    scores = torch.einsum("mkgd,nkd->kgmn", grouped, key).float() * scale
    seen = torch.ones(num_queries, tokens, dtype=torch.bool, device=key.device).tril(tokens - num_queries)
    mass = scores.masked_fill_(~seen, float("-inf")).softmax(-1).sum((0, 1, 2))
    return torch.nn.functional.pad(mass, (0, -tokens % block_size)).view(-1, block_size).sum(1)


def timer(device: str) -> Callable[[Callable[[], Any], int], float]:
    """(function, calls) -> seconds a call: events around calls that queue up on a GPU, else wall time."""
    import torch

    def on_gpu(function: Callable[[], Any], calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def on_cpu(function: Callable[[], Any], calls: int) -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - begin) / calls

    return on_gpu if device == "cuda" else on_cpu


def ceilings(device: str, small: bool = False) -> dict[str, float]:
    """What this machine's memory and matrix units do: bytes and FLOPs a second, medians of 5."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = 1 << (22 if small else 30 if device == "cuda" else 28)
    side = 256 if small else 8192 if device == "cuda" else 2048
    timed = timer(device)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    copies, products = [], []
    for repetition in range(6):
        copy, product = timed(lambda: target.copy_(source), 5), timed(lambda: a @ b, 3)
        if repetition > 0:
            copies.append(2 * size / copy)
            products.append(2 * side**3 / product)
    return {
        "bytes_per_second": statistics.median(copies),
        "flops_per_second": statistics.median(products),
        "dtype": str(dtype).removeprefix("torch."),
    }


def make_inputs(
    shape: ModelShape, tokens: int, device: str, seed: int
) -> tuple[torch.Tensor, torch.Tensor, list[SelectionSpec]]:
    """Random queries and keys of one prompt, as slices of a packed projection like the engine's."""
    import torch
    from vllm.v1.uniprefill.selection import SelectionSpec

    generator = torch.Generator(device).manual_seed(seed)
    width = (shape.kv_heads * 2) * shape.head_dim
    packed = torch.randn(tokens, width, generator=generator, device=device, dtype=torch.float32).bfloat16()
    key = packed[:, : width // 2].unflatten(1, (shape.kv_heads, shape.head_dim))
    query = torch.randn(NUM_QUERIES, shape.heads, shape.head_dim, generator=generator, device=device).bfloat16()
    return query, key, [SelectionSpec(0, tokens, 0, NUM_QUERIES, keep_ratio=0.3)]


def whole_selection(query: torch.Tensor, key: torch.Tensor, specs: list[SelectionSpec], scale: float) -> torch.Tensor:
    """All that a selection layer adds: masses, blocks, rows. The kept count is known, so nothing waits."""
    from vllm.v1.uniprefill.selection import block_mass, kept_rows, known_kept_tokens, select_blocks

    mass = block_mass(query, key, specs, block_size=BLOCK_SIZE, scale=scale)
    forced = {"block_size": BLOCK_SIZE, "sink_tokens": SINK, "recent_tokens": RECENT}
    keep = select_blocks(mass, specs, top_p_over="all", **forced)
    counts = [known_kept_tokens(spec, **forced) for spec in specs]
    return kept_rows(keep, specs, len(key), block_size=BLOCK_SIZE, keep_counts=counts)[0]


def measure_kernels(
    shape: ModelShape, tokens: int, repeats: int, rates: dict[str, float], device: str
) -> dict[str, Any]:
    """One length: our masses, the whole selection and plain torch, in turn, on other inputs each time."""
    import torch
    from vllm.v1.uniprefill.selection import block_mass

    scale = shape.head_dim**-0.5
    floor = selection_floor(shape, tokens, NUM_QUERIES, BLOCK_SIZE)
    wanted = CACHE_BYTES // floor.bytes if device == "cuda" else 1
    sets = [make_inputs(shape, tokens, device, seed) for seed in range(max(2, min(MOST_SETS, wanted)))]
    turn = 0

    def rotating(function: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> Any:
            nonlocal turn
            turn += 1
            return function(*sets[turn % len(sets)])

        return call

    jobs = {
        "mass": rotating(lambda q, k, specs: block_mass(q, k, specs, block_size=BLOCK_SIZE, scale=scale)),
        "selection": rotating(lambda q, k, specs: whole_selection(q, k, specs, scale)),
        "plain": rotating(lambda q, k, specs: plain_block_mass(q, k, BLOCK_SIZE, scale)),
    }
    query, key, specs = sets[0]
    ours = block_mass(query, key, specs, block_size=BLOCK_SIZE, scale=scale)
    plain = plain_block_mass(query, key, BLOCK_SIZE, scale)
    difference = float((ours - plain).norm() / plain.norm())
    timed = timer(device)
    calls = {"mass": 20, "selection": 20, "plain": 3} if device == "cuda" else dict.fromkeys(jobs, 1)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repeats + 1):
        names = list(jobs)
        for name in names[repetition % 3 :] + names[: repetition % 3]:
            value = timed(jobs[name], calls[name])
            if repetition > 0:
                seconds[name].append(value)
    peaks = {}
    if device == "cuda":
        for name in jobs:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            jobs[name]()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    least = floor.seconds(rates["bytes_per_second"], rates["flops_per_second"])
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    say(
        f"kernels {size_label(tokens)}: masses {medians['mass'] * 1e3:.3f} ms, selection "
        f"{medians['selection'] * 1e3:.3f} ms, plain torch {medians['plain'] * 1e3:.3f} ms, "
        f"floor {least['floor'] * 1e3:.3f} ms"
    )
    return {
        "tokens": tokens,
        "implementation": "Triton kernels" if device == "cuda" else "torch reference",
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "against_plain": compare(seconds["plain"], seconds["mass"]),
        "work": asdict(floor),
        "floor_seconds": least,
        "over_floor": spread(value / least["floor"] for value in seconds["mass"]),
        "peak_bytes": peaks,
        "difference_to_plain": difference,
    }


def fits(shape: ModelShape, tokens: int, free_bytes: int) -> bool:
    """Whether the plain version's scores, weights and mask fit beside the inputs."""
    scores = shape.heads * NUM_QUERIES * tokens * 4
    return 3 * scores + MOST_SETS * selection_floor(shape, tokens, NUM_QUERIES, BLOCK_SIZE).bytes < free_bytes


def free_memory(device: str) -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
