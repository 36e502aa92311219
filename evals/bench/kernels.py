"""The part kernels: selection alone, against its floors and against plain torch; no engine.

On a GPU the Triton kernels are timed. Without one it is the torch reference that serves there,
since Triton's interpreter says nothing about speed; the row says which.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from evals.bench import report
from evals.bench.arithmetic import compare, rotated, size_label, spread
from evals.bench.engine import Bench
from evals.bench.shapes import ModelShape
from scripts.fork import say

if TYPE_CHECKING:
    import torch
    from vllm.v1.uniprefill.selection import SelectionSpec

NUM_QUERIES, BLOCK_SIZE, SINK, RECENT = 128, 64, 128, 128
CACHE_BYTES = 256 << 20  # inputs in turn from this much memory, so that no cache holds them
MOST_SETS = 8
SELECTION_SECONDS = 1e-3
LONG = 131072


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """This machine's ceilings go beside the rows."""
    bench.facts["ceilings"] = rates = ceilings(bench.device, small=bench.shape.name == "tiny")
    bench.facts["too_long_for_plain_torch"] = too_long = [
        n for n in bench.shape.kernel_lengths if not fits(bench.model, n, free_memory(bench.device))
    ]
    for tokens in bench.shape.kernel_lengths:
        if tokens not in too_long:
            yield measure_kernels(bench.model, tokens, bench.repeats, rates, bench.device)


def work_of(shape: ModelShape, tokens: int) -> dict[str, int]:
    """The least that scoring a prompt's blocks in one layer takes, and what our kernels add.

    Returns:
        bytes: keys and queries read once, masses written once.
        flops: q·k of every query and key (the causal corner of the last queries is not taken off).
        workspace_bytes: what the kernels write once and read twice between them.

    """
    blocks = -(-tokens // BLOCK_SIZE)
    rows = tokens * shape.kv_heads + NUM_QUERIES * shape.heads
    return {
        "bytes": rows * shape.head_dim * 2 + blocks * 4,
        "flops": 2 * NUM_QUERIES * shape.heads * tokens * shape.head_dim,
        "workspace_bytes": 3 * blocks * NUM_QUERIES * shape.heads * 4,
    }


def floor_seconds(work: dict[str, int], rates: dict[str, float]) -> dict[str, float]:
    """By unit, at the rates; `floor` is the larger."""
    memory, compute = work["bytes"] / rates["bytes_per_second"], work["flops"] / rates["flops_per_second"]
    return {"memory": memory, "compute": compute, "floor": max(memory, compute)}


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


def seconds_a_call(function: Callable[[], Any], calls: int, device: str) -> float:
    """Of calls that follow one another; on a GPU they queue up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return (time.perf_counter() - begin) / calls


def ceilings(device: str, small: bool = False) -> dict[str, float]:
    """What this machine's memory and matrix units do: bytes and FLOPs a second, medians of 5."""
    import torch

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = 1 << (22 if small else 30 if device == "cuda" else 28)
    side = 256 if small else 8192 if device == "cuda" else 2048
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    copies, products = [], []
    for repetition in range(6):
        copy = seconds_a_call(lambda: target.copy_(source), 5, device)
        product = seconds_a_call(lambda: a @ b, 3, device)
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
    work = work_of(shape, tokens)
    wanted = CACHE_BYTES // work["bytes"] if device == "cuda" else 1
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
    calls = {"mass": 20, "selection": 20, "plain": 3} if device == "cuda" else dict.fromkeys(jobs, 1)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repetition in range(repeats + 1):
        for name in rotated(list(jobs), repetition):
            value = seconds_a_call(jobs[name], calls[name], device)
            if repetition > 0:
                seconds[name].append(value)
    peaks = {}
    if device == "cuda":
        for name in jobs:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            jobs[name]()
            peaks[name] = torch.cuda.max_memory_allocated() - before
    least = floor_seconds(work, rates)
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
        "work": work,
        "floor_seconds": least,
        "share_of_floor": spread(least["floor"] / value for value in seconds["mass"]),
        "peak_bytes": peaks,
        "difference_to_plain": difference,
    }


def fits(shape: ModelShape, tokens: int, free_bytes: int) -> bool:
    """Whether the plain version's scores, weights and mask fit beside the inputs."""
    scores = shape.heads * NUM_QUERIES * tokens * 4
    return 3 * scores + MOST_SETS * work_of(shape, tokens)["bytes"] < free_bytes


def free_memory(device: str) -> int:
    import psutil
    import torch

    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def expectations(result: report.Result) -> Iterator[dict[str, Any]]:
    for row in result.get("kernels", []) if report.on_gpu(result) else ():
        where = f"kernels at {size_label(row['tokens'])}"
        seconds = row["seconds"]["selection"]["median"]
        if row["tokens"] == LONG and result["settings"]["shape"] == "llama-3.1-8b":
            yield report.expectation(
                f"{where}: the whole selection at most {SELECTION_SECONDS * 1e3:g} ms a layer",
                f"{seconds * 1e3:.3f} ms",
                seconds <= SELECTION_SECONDS,
            )
        faster = row["against_plain"]["ratio"]
        yield report.expectation(f"{where}: faster than plain torch", f"{faster:.1f}x", faster > 1)


def lacks(result: report.Result) -> Iterator[str]:
    for tokens in result.get("too_long_for_plain_torch", []):
        yield f"kernels at {size_label(tokens)}: plain torch's scores do not fit this machine's memory"


def section(result: report.Result) -> str:
    rows = result.get("kernels", [])
    if not rows:
        return ""

    def lines() -> Iterator[tuple[str, ...]]:
        for row in rows:
            floor, peak = row["floor_seconds"], row["peak_bytes"]
            yield (
                size_label(row["tokens"]),
                *(report.milliseconds(row["seconds"][name], 3) for name in ("mass", "selection", "plain")),
                report.gain(row["against_plain"]),
                f"{floor['memory'] * 1e3:.3f}",
                f"{floor['compute'] * 1e3:.3f}",
                report.ranged(row["share_of_floor"]),
                f"{peak['mass'] / 2**20:.0f} / {peak['plain'] / 2**20:.0f}" if peak else "–",
                f"{row['difference_to_plain']:.1e}",
            )

    rates = result["ceilings"]
    head = (
        "keys",
        "masses ms",
        "whole selection ms",
        "plain torch ms",
        "gain over plain",
        "memory floor ms",
        "compute floor ms",
        "floor over masses",
        "peak MiB, masses / plain",
        "difference",
    )
    note = (
        f"One layer, one prompt, {rows[0]['implementation']}. Measured here: "
        f"{rates['bytes_per_second'] / 1e12:.2f} TB/s copying, {rates['flops_per_second'] / 1e12:.2f} TFLOP/s in "
        f"{rates['dtype']}; the floors are keys and queries read once, and q·k, at these. Floor over masses: 1 is at "
        "the floor. The whole selection adds choosing blocks and finding rows. Difference: relative, of our masses "
        "and plain torch's.\n\n"
    )
    return note + report.table(head, lines())


def panels(result: report.Result) -> list[report.Panel]:
    return [partial(draw, rows=result["kernels"])]


def draw(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    lengths = report.length_axis(axis, rows, f"Selection in one layer, {rows[0]['implementation']}", "seconds")
    axis.set_yscale("log")
    for name, style in (("memory", ":"), ("compute", "--")):
        values = [row["floor_seconds"][name] for row in rows]
        axis.plot(lengths, values, color="black", linestyle=style, label=f"{name} floor")
    labels = {"masses": "mass", "whole selection": "selection", "plain torch": "plain"}
    report.draw_lines(axis, lengths, {label: [row["seconds"][name] for row in rows] for label, name in labels.items()})


PART = report.Part(
    "kernels",
    "the selection alone, without an engine, against its floors and plain torch",
    "The selection alone",
    section,
    measure,
    expectations=expectations,
    panels=panels,
    lacks=lacks,
)
