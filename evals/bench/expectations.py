"""What the project expects of its benchmark, held against a result."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from evals.bench.arithmetic import size_label
from evals.bench.decode import DENSE, FORK, PRISTINE, PRUNED

PARTS = ("ttft", "efficiency", "breakdown", "concurrency", "poisson", "kernels", "decode")
EFFICIENCY = 0.85
OVERHEAD = 0.05
GAIN_AT_16K = 2.0
SHARE_OF_FLOP_MODEL = 0.9
SELECTION_SECONDS = 1e-3
WIDEST_SPREAD = 0.2  # runs that differ by more tell nothing
LONG = 131072


def expectation(what: str, measured: str, met: bool) -> dict[str, Any]:
    return {"expectation": what, "measured": measured, "met": met}


def expectations(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every expectation that the result can tell about, with what was measured."""
    on_gpu = result["provenance"]["machine"]["device"] == "cuda"
    needle = result["settings"]["shape"] == "needle"
    found: list[dict[str, Any]] = []
    if needle and not on_gpu:
        found += of_ttft(result.get("ttft", []))
    if not needle and on_gpu:  # elsewhere time is not FLOPs
        found += of_flop_model(result.get("ttft", []))
    found += of_efficiency(result.get("efficiency", []))
    found += of_breakdown(result.get("breakdown", []), on_gpu and not needle)
    if on_gpu:
        found += of_kernels(result)
    found += of_concurrency(result.get("concurrency", []))
    found += of_decode(result.get("decode", {}))
    found += of_gpu(result.get("gpu", {}))
    return found


def of_ttft(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    rows = [row for row in rows if row["tokens"] >= 4096]
    for name in rows[0]["pruned"] if rows else ():
        gains = {row["tokens"]: row["pruned"][name]["gain"]["ratio"] for row in rows}
        values = list(gains.values())
        yield expectation(
            f"{name}: gain over 1 from 4K, growing with length",
            ", ".join(f"{size_label(tokens)} {gain:.2f}x" for tokens, gain in gains.items()),
            min(values) > 1 and all(a < b for a, b in pairwise(values)),
        )
        if 16384 in gains:
            right = next(r["pruned"][name]["answered"] for r in rows if r["tokens"] == 16384)
            told = f"{right['right']} of {right['asked']} answered" if right else "not asked"
            answered = right is not None and right["right"] == right["asked"]
            yield expectation(
                f"{name}: gain at least {GAIN_AT_16K:g} at 16K, needle answered",
                f"{gains[16384]:.2f}x, {told}",
                gains[16384] >= GAIN_AT_16K and answered,
            )


def of_flop_model(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for name, pruned in row["pruned"].items():
            gain, model = pruned["gain"]["ratio"], pruned["flop_model_gain"]
            yield expectation(
                f"{name} at {size_label(row['tokens'])}: gain at least {SHARE_OF_FLOP_MODEL:g} of the FLOP model",
                f"{gain:.2f}x of {model:.2f}x: {gain / model:.2f}",
                gain >= SHARE_OF_FLOP_MODEL * model,
            )


def of_efficiency(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["tokens"] >= 16384:
            yield expectation(
                f"{place(row)}: gain at least {EFFICIENCY:g} of that at the kept lengths",
                f"{row['gain']['ratio']:.2f}x of {row['expected_gain']:.2f}x: {row['efficiency']:.2f}",
                row["efficiency"] >= EFFICIENCY,
            )


def of_breakdown(rows: list[dict[str, Any]], with_selection: bool) -> Iterator[dict[str, Any]]:
    for row in rows:
        share = row["overhead_share"]["median"]
        if row["tokens"] >= 16384:
            yield expectation(
                f"{place(row)}: selection, compaction and metadata at most {OVERHEAD:.0%} of the prefill",
                f"{share:.1%}",
                share <= OVERHEAD,
            )
        if with_selection and row["tokens"] == LONG:
            slowest = max(cut["median"] for cut in row["selection_seconds_per_cut"])
            yield expectation(
                f"{place(row)}: selection at most {SELECTION_SECONDS * 1e3:g} ms a layer",
                f"{slowest * 1e3:.2f} ms",
                slowest <= SELECTION_SECONDS,
            )


def of_kernels(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in result.get("kernels", []):
        where = f"kernels at {size_label(row['tokens'])}"
        seconds = row["seconds"]["selection"]["median"]
        if row["tokens"] == LONG and result["settings"]["shape"] == "llama-3.1-8b":
            yield expectation(
                f"{where}: the whole selection at most {SELECTION_SECONDS * 1e3:g} ms a layer",
                f"{seconds * 1e3:.3f} ms",
                seconds <= SELECTION_SECONDS,
            )
        yield expectation(
            f"{where}: faster than plain torch",
            f"{row['against_plain']['ratio']:.1f}x",
            row["against_plain"]["ratio"] > 1,
        )


def of_concurrency(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["tokens"] >= 4096:
            yield expectation(
                f"{row['together']} prompts of {size_label(row['tokens'])} together: mean time to first token gains",
                f"{row['gain']['ratio']:.2f}x",
                row["gain"]["ratio"] > 1,
            )


def of_decode(decode: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for row in decode.get("contexts", []):
        for pair, found in row["compared"].items():
            after_pruning = pair == f"{PRUNED} / {DENSE}"
            what = "not slower" if after_pruning else "no difference beyond the spread of the runs"
            noisy = found["spread"] > WIDEST_SPREAD
            yield expectation(
                f"decode at {row['context']}, {pair}: {what}",
                f"{found['ratio']:.3f}, spread {found['spread']:.3f}" + (", too noisy to tell" if noisy else ""),
                not noisy and (found["within"] or (after_pruning and found["ratio"] < 1)),
            )


def of_gpu(gpu: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What `evals.gpu` checked."""
    for name, what in (
        ("checks", "every Triton kernel agrees with torch, bands intact"),
        ("sanitizer", "compute-sanitizer finds no access out of bounds"),
    ):
        if checks := gpu.get(name):
            failed, done = checks["failed"], len(checks["cases"])
            told = f"{len(failed)} of {done} cases failed" + (f": {failed[0]}" if failed else "")
            where = "" if checks["device"] == "cuda" else ", small, in Triton's interpreter"
            yield expectation(f"{what}{where}", told, done > 0 and not failed)
    if (new := gpu.get("checks", {}).get("new_variants")) is not None:
        yield expectation("no length, batch or query count compiles a kernel anew", f"{new} variants", new == 0)
    graphs = gpu.get("graphs")
    if graphs and graphs["device"] == "cuda":  # elsewhere there are none
        rows = graphs["rows"]
        same, total = sum(row["same_tokens"] for row in rows), sum(row["of"] for row in rows)
        answered = sum(all(row["answered"]) for row in rows)
        yield expectation(
            "decode with FULL CUDA graphs: the tokens of eager, and the answers right",
            f"{same} of {total} tokens, {answered} of {len(rows)} answered by both, {graphs['graphs']} graphs",
            same == total and answered == len(rows) and graphs["graphs"] > 0,
        )


def place(row: dict[str, Any]) -> str:
    cuts = ",".join(map(str, row["selection_layers"]))
    return f"{row['variant']} at {size_label(row['tokens'])}, cuts after {cuts}"


def not_measured(result: dict[str, Any]) -> list[str]:
    """What the benchmark can measure and this result lacks, each with its reason."""
    settings, machine = result["settings"], result["provenance"]["machine"]
    lacks = [f"{part}: not asked for" for part in PARTS if part not in settings["parts"]]
    if sentence := result.get("refused"):
        asked = ", ".join(part for part in PARTS if part in settings["parts"] and part != "kernels")
        lacks.append(f"{asked}: the engine refuses this shape: {sentence}")
    lacks += [
        f"kernels at {size_label(tokens)}: plain torch's scores do not fit this machine's memory"
        for tokens in result.get("too_long_for_plain_torch", [])
    ]
    lacks += result.get("cut_short", [])
    if machine["device"] == "cpu":
        lacks.append(
            "an H100-class GPU (gain at 32K, 64K and 128K against the FLOP model, selection per "
            "layer, kernel times, FULL CUDA graphs): no GPU here; `make bench-gpu` measures it on one"
        )
    if settings["prompts"] == "random":
        lacks.append("whether the needle is answered: the model does not know the needle's words")
    packages = result.get("decode", {}).get("packages", {})
    if FORK in packages and PRISTINE not in packages:
        lacks.append("decode on the pristine release: none given (--pristine)")
    return lacks
