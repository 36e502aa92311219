"""Measure what UniPrefill gains and costs on this machine.

Seven parts:
  ttft        time to first token, dense and pruned, over prompt lengths
  efficiency  with a fixed keep_ratio: the gain against the one that dense prefills at the kept
              lengths predict, for the first cut alone and for all cuts
  breakdown   where the time of those pruned prefills goes, in runs of their own: embedding, each
              segment, selection, compaction, metadata, sampling
  concurrency time to first token of 1, 4 and 16 prompts sent together
  poisson     throughput and time between tokens of a random mix of short and long prompts
  kernels     the selection alone, without an engine: against the floors that memory and matrix
              units set, and against plain torch that holds all scores
  decode      time per token: pristine release, fork without the flag, with it after a dense and
              after a pruned prefill; each in processes of its own

Dense and pruned run in turn in one process, after a warm-up; medians are reported. The result is
written after every part, as OUTPUT.json, OUTPUT.md and OUTPUT.png. Exit status 0: measured, also
where an expectation is missed (the table says so); 1: a problem to mend.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evals.bench import decode, kernels, parts, report, traffic
from evals.bench.arithmetic import ModelShape
from evals.bench.engine import (
    engine,
    engine_arguments,
    keep_ratio_variant,
    prepare_environment,
    refusal,
    top_p_variants,
)
from evals.bench.expectations import PARTS, expectations, not_measured
from evals.bench.shapes import SHAPES, Prompts, Shape, model_folder
from evals.needle.prompts import MAX_TOKENS
from evals.provenance import provenance
from scripts.fork import ROOT, ForkError, run_main, say

IN_PROCESS = ("ttft", "efficiency", "breakdown")
TRAFFIC = ("concurrency", "poisson")
POISSON_TOKENS = 32  # that each request of poisson generates
MIN_LENGTH = 1024  # shorter prompts are prefilled densely


def numbers(text: str) -> tuple[int, ...]:
    """ "4096,2048" -> (2048, 4096)."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 2048,4096") from None


def lengths_argument(text: str) -> tuple[int, ...]:
    found = numbers(text)
    if found[0] < MIN_LENGTH:
        raise argparse.ArgumentTypeError(
            f"{found[0]} is too short: prompts under {MIN_LENGTH} tokens are prefilled densely"
        )
    return found


def parts_argument(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    if unknown := [part for part in asked if part not in PARTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in asked)


def share_argument(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0 and at most 1")
    return value


def repeats_argument(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least one repetition is needed")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--shape",
        choices=list(SHAPES),
        default="needle",
        help="needle: the tiny model of evals/needle, for a CPU; the others: dummy weights in that "
        "model's shape, bf16, for an 80 GB GPU (tiny: for a test); of a model that the engine "
        "refuses only the kernels are measured (default: %(default)s)",
    )
    add("--model", type=Path, metavar="FOLDER", help="load this model instead of the shape's")
    add(
        "--lengths",
        type=lengths_argument,
        metavar="N,N",
        help="prompt tokens (default: the shape's, 2K to 32K for needle, 32K to 128K for the "
        "large ones); efficiency and breakdown use 8K and 16K, or 128K, of them, or else the longest",
    )
    add("--repeats", type=repeats_argument, default=5, help="repetitions (default: %(default)s)")
    add(
        "--parts",
        type=parts_argument,
        default=PARTS,
        metavar="PART,PART",
        help=f"of {','.join(PARTS)} (default: all)",
    )
    add(
        "--selection-layers",
        type=numbers,
        metavar="N,N",
        help="cut after these layers (default: the shape's; 1,3,5 for needle, 7 for llama-3.1-8b)",
    )
    add("--top-p", type=share_argument, default=0.99, help="(default: %(default)s)")
    add("--keep-ratio", type=share_argument, help="(default: .2 for needle, else .3)")
    add("--traffic-length", type=int, metavar="N", help="prompt tokens of concurrency and poisson's long ones")
    add("--kernel-lengths", type=numbers, metavar="N,N", help="keys of the part kernels (default: the shape's)")
    add("--arrivals", type=repeats_argument, default=24, help="requests of poisson (default: %(default)s)")
    add("--decode-rounds", type=repeats_argument, default=decode.ROUNDS, help="(default: %(default)s)")
    add(
        "--pristine",
        type=Path,
        metavar="FOLDER",
        help="where the release itself can be imported from, for the decode part (default: made "
        "from this checkout, on a CPU; `pip install --target FOLDER vllm==…` makes one for a GPU)",
    )
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="without suffix (default: evals/results/bench-SHAPE-DEVICE)",
    )
    return parser


def chosen_shape(args: argparse.Namespace) -> Shape:
    """The shape with what the arguments set."""
    shape = SHAPES[args.shape]
    given = {
        name: getattr(args, name)
        for name in ("lengths", "selection_layers", "keep_ratio", "traffic_length", "kernel_lengths")
        if getattr(args, name) is not None
    }
    shape = replace(shape, **given)
    kept = tuple(n for n in shape.efficiency_lengths if n in shape.lengths)
    return replace(shape, efficiency_lengths=kept or shape.lengths[-1:])


def check(args: argparse.Namespace, shape: Shape, prompts: Prompts) -> None:
    """Refuse what cannot be measured, before anything is."""
    if prompts.needle and shape.lengths[-1] > MAX_TOKENS:
        raise ForkError(f"Needle prompts have at most {MAX_TOKENS} tokens; shorten --lengths.")
    if args.pristine is not None and not (args.pristine / "vllm" / "__init__.py").is_file():
        raise ForkError(f"--pristine {args.pristine} holds no vllm/ package.")
    try:
        report.require_matplotlib()
    except ModuleNotFoundError:
        raise ForkError("The plot needs matplotlib; run `make build`.") from None


def in_process_parts(
    args: argparse.Namespace, shape: Shape, arguments: dict[str, Any], prompts: Prompts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, row) as they are measured; one engine per list of cuts."""
    model = ModelShape.of(Path(arguments["model"]))
    all_cuts, first_cut = shape.selection_layers, shape.selection_layers[:1]
    for cuts in dict.fromkeys((all_cuts, first_cut)):
        wanted = [part for part in IN_PROCESS if part in args.parts]
        if cuts != all_cuts:
            wanted = [part for part in wanted if part != "ttft"]
        if not wanted:
            continue
        say(f"starting an engine with cuts after {','.join(map(str, cuts))}")
        config = {"selection_layers": list(cuts)}
        with engine(arguments | {"uniprefill_config": config, "enforce_eager": True}) as llm:
            bench = parts.Bench(llm, model, prompts, args.repeats)
            yield from engine_parts(bench, shape, wanted, args.top_p)
            del bench, llm  # the next engine needs the memory


def engine_parts(
    bench: parts.Bench, shape: Shape, wanted: Sequence[str], top_p: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    fixed = keep_ratio_variant(shape.keep_ratio)
    variants = top_p_variants(top_p) if shape.prune_by == "top_p" else [fixed]
    if "ttft" in wanted:
        for tokens in shape.lengths:
            yield "ttft", parts.measure_ttft(bench, tokens, variants)
    for tokens in shape.efficiency_lengths:
        if "efficiency" in wanted:
            yield "efficiency", parts.measure_efficiency(bench, tokens, fixed)
        if "breakdown" in wanted:
            yield "breakdown", parts.measure_breakdown(bench, tokens, fixed)


def traffic_part(
    args: argparse.Namespace, shape: Shape, model: Path, load_format: str, prompts: Prompts
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, row) of concurrency and poisson, on an engine that runs many requests together."""
    say(f"starting an engine for {max(traffic.CONCURRENCY)} requests together")
    arguments = engine_arguments(
        model, load_format, shape.traffic_length, POISSON_TOKENS, seqs=2 * max(traffic.CONCURRENCY), resident=4
    )
    config = {"selection_layers": list(shape.selection_layers)}
    variant = keep_ratio_variant(shape.keep_ratio)
    with engine(arguments | {"uniprefill_config": config, "enforce_eager": True}) as llm:
        bench = parts.Bench(llm, ModelShape.of(model), prompts, args.repeats)
        if "concurrency" in args.parts:
            for together in traffic.CONCURRENCY:
                yield "concurrency", traffic.measure_concurrency(bench, shape.traffic_length, together, variant)
        if "poisson" in args.parts:
            yield (
                "poisson",
                traffic.measure_poisson(
                    bench, shape.traffic_length, variant, count=args.arrivals, new_tokens=POISSON_TOKENS
                ),
            )
        del bench, llm


def kernels_part(
    args: argparse.Namespace, shape: Shape, model: ModelShape, device: str, result: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(part, row); this machine's ceilings go into the result beside them."""
    result["ceilings"] = rates = kernels.ceilings(device, small=shape.name == "tiny")
    result["too_long_for_plain_torch"] = [
        n for n in shape.kernel_lengths if not kernels.fits(model, n, kernels.free_memory(device))
    ]
    for tokens in shape.kernel_lengths:
        if tokens not in result["too_long_for_plain_torch"]:
            yield "kernels", kernels.measure_kernels(model, tokens, args.repeats, rates, device)


def decode_part(
    args: argparse.Namespace,
    shape: Shape,
    model: Path,
    load_format: str,
    prompts: Prompts,
    device: str,
) -> dict[str, Any]:
    arguments = engine_arguments(model, load_format, max(decode.CONTEXTS), decode.NEW_TOKENS)
    if device == "cuda":
        arguments["compilation_config"] = decode.GPU_COMPILATION
    pruning = keep_ratio_variant(shape.keep_ratio).extra_args
    with TemporaryDirectory(prefix="bench-pristine-") as folder:
        pristine = args.pristine
        if pristine is None and device == "cpu":
            pristine = decode.write_pristine(Path(folder))
        jobs = decode.programs(
            arguments,
            decode.decode_prompts(prompts),
            list(shape.selection_layers),
            pruning,
            pristine,
            args.repeats,
        )
        return decode.measure_decode(jobs, args.decode_rounds)


def measured(
    args: argparse.Namespace,
    shape: Shape,
    model: Path,
    load_format: str,
    prompts: Prompts,
    device: str,
    result: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part that was asked for and that this model allows, as it is measured."""
    wanted = set(args.parts)
    arguments = engine_arguments(model, load_format, shape.lengths[-1], 1)
    if wanted - {"kernels"} and (sentence := refusal(arguments)):
        say(f"no engine for this shape: {sentence}")
        result["refused"] = sentence
        wanted &= {"kernels"}
    if wanted & set(IN_PROCESS):
        yield from in_process_parts(args, shape, arguments, prompts)
    if wanted & set(TRAFFIC):
        yield from traffic_part(args, shape, model, load_format, prompts)
    if "kernels" in wanted:
        yield from kernels_part(args, shape, ModelShape.of(model), device, result)
    if "decode" in wanted:
        yield "decode", decode_part(args, shape, model, load_format, prompts, device)


def write(result: dict[str, Any], output: Path, with_plot: bool) -> None:
    """The three files, with what is known by now."""
    result["finished"] = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    result["expectations"] = expectations(result)
    result["not_measured"] = not_measured(result)
    output.parent.mkdir(parents=True, exist_ok=True)
    json_file, md_file, png_file = (Path(f"{output}.{end}") for end in ("json", "md", "png"))
    json_file.write_text(json.dumps(result, indent=1) + "\n")
    md_file.write_text(report.markdown(result))
    if with_plot:
        report.plot(result, png_file)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    # Ended from outside, as by timeout(1): stop the workers and remove the temporary folders too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    prepare_environment()
    load = os.getloadavg()[0]
    origin = provenance()
    shape = chosen_shape(args)
    device = origin["machine"]["device"]
    output = args.output or ROOT / "evals" / "results" / f"bench-{shape.name}-{device}"
    with model_folder(shape, args.model) as (model, load_format):
        prompts = Prompts.of(model)
        check(args, shape, prompts)
        say(f"{origin['package']} on {origin['machine']['gpu'] or origin['machine']['cpu']}")
        result: dict[str, Any] = {
            "provenance": origin,
            "settings": {
                "command": shlex.join(["make", "bench", *([f"ARGS={shlex.join(argv)}"] if argv else [])]),
                "shape": shape.name,
                "lengths": shape.lengths,
                "selection_layers": shape.selection_layers,
                "top_p": args.top_p,
                "keep_ratio": shape.keep_ratio,
                "parts": args.parts,
                "repeats": args.repeats,
                "prompts": "needle" if prompts.needle else "random",
            },
            "load_average": load,
        }
        for part, row in measured(args, shape, model, load_format, prompts, device, result):
            if part == "decode":
                result[part] = row
            else:
                result.setdefault(part, []).append(row)
            write(result, output, with_plot=False)
        write(result, output, with_plot=True)
    say(f"written: {output}.json, .md, .png")
    print(report.markdown(result))
    return 0


if __name__ == "__main__":
    run_main(main)
