"""Measure what UniPrefill gains and costs on this machine.

Dense and pruned run in turn in one process, after a warm-up; medians are reported. The result is
written after every part, as bench-MODEL-DEVICE.json, .md and .png in --results. Exit status 0:
measured, also where an expectation is missed (the table says so); 1: a problem to mend.

Parts:
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.bench import cache, classes, concurrency, decode, efficiency, gain, interleave, kernels, overhead, traffic
from evals.bench.engine import MIN_LENGTH, Bench, EngineSpec, prepare_environment, resolved_cuts
from evals.bench.report import Part, Result, require_matplotlib, write
from evals.bench.shapes import NEEDLE_MODEL, SHAPES, ModelShape, Prompts, Shape, model_folder, model_name, read_config
from evals.needle.prompts import MAX_TOKENS
from evals.provenance import add_results_option, command_line, count_argument, numbers_argument, provenance
from scripts import models
from scripts.fork import ForkError, run_main, say


def lacks(result: Result) -> Iterator[str]:
    asked = result["settings"]["parts"]
    yield from (f"{part.name}: not asked for" for part in PARTS if part.name not in asked)
    if result["provenance"]["machine"]["device"] == "cpu":
        yield (
            "an H100-class GPU (gain at 8K, 32K and 128K against the FLOP model, selection per "
            "layer, kernel times, FULL CUDA graphs): no GPU here; `make bench-gpu` measures it on one"
        )
    if result["settings"]["prompts"] == "random":
        yield "whether the needle is answered: the model does not know the needle's words"


PARTS = (
    replace(gain.PART, lacks=lacks),
    efficiency.PART,
    overhead.PART,
    interleave.PART,
    classes.PART,
    concurrency.PART,
    cache.PART,
    traffic.PART,
    kernels.PART,
    decode.PART,
    decode.OF_FLASHINFER,
)
NAMES = tuple(part.name for part in PARTS)


def lengths_argument(text: str) -> tuple[int, ...]:
    found = numbers_argument(text)
    if found[0] < MIN_LENGTH:
        raise argparse.ArgumentTypeError(
            f"{found[0]} is too short: prompts under {MIN_LENGTH} tokens are prefilled densely"
        )
    return found


def parts_argument(text: str) -> tuple[str, ...]:
    asked = text.split(",")
    if unknown := [name for name in asked if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in asked)


def share_argument(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not greater than 0 and at most 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench",
        description=__doc__ + "\n".join(f"  {part.name:12}{part.about}" for part in PARTS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, shown = parser.add_argument, "(default: %(default)s)"
    add(
        "--shape",
        choices=list(SHAPES),
        help="needle: the tiny model of evals/needle, for a CPU; the others: dummy weights in that model's shape, "
        "bf16, for an 80 GB GPU (tiny…: for a test) (default: needle)",
    )
    add(
        "--model",
        type=lambda name: Path(models.resolve(name)),
        metavar="FOLDER",
        help="this model (a folder, or a NAME of `make model`) at the shape's lengths, with dummy weights if it is a "
        "config.json alone; without --shape it is cut where the engine chooses",
    )
    add(
        "--lengths",
        type=lengths_argument,
        metavar="N,N",
        help="prompt tokens (default: the shape's); efficiency, breakdown and interleave use 8K and 16K, or 128K, of "
        "them, or else the longest",
    )
    add("--repeats", type=count_argument, default=5, help=f"repetitions {shown}")
    add("--parts", type=parts_argument, default=NAMES[:-1], metavar="PART,PART", help="(default: all but flashinfer)")
    add(
        "--selection-layers", type=numbers_argument, metavar="N,N", help="cut after these layers (default: the shape's)"
    )
    add("--top-p", type=share_argument, default=0.99, help=shown)
    add("--keep-ratio", type=share_argument, help="(default: the shape's, .3)")
    add("--traffic-length", type=int, metavar="N", help="prompt tokens of concurrency, cache and poisson's long ones")
    add(
        "--kernel-lengths", type=numbers_argument, metavar="N,N", help="keys of the part kernels (default: the shape's)"
    )
    add("--arrivals", type=count_argument, default=24, help=f"requests of poisson {shown}")
    add("--decode-rounds", type=count_argument, default=3, help=shown)
    add(
        "--pristine",
        type=Path,
        metavar="FOLDER",
        help="where the release itself can be imported from, for the decode part (default: made from this checkout, on "
        "a CPU; `pip install --target FOLDER vllm==…` makes one for a GPU)",
    )
    add_results_option(parser)
    return parser


def chosen_shape(args: argparse.Namespace) -> Shape:
    """The shape with what the arguments set."""
    shape = SHAPES[args.shape or "needle"]
    if args.model is not None and args.model.resolve() != NEEDLE_MODEL:
        cuts = shape.selection_layers if args.shape else None
        shape = replace(shape, name=model_name(args.model), selection_layers=cuts)
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
    require_matplotlib()


def measured(bench: Bench, parts: Sequence[Part]) -> Iterator[tuple[Part, dict[str, Any]]]:
    """The rows of every part, as they are measured; one engine at a time."""
    for spec in dict.fromkeys(spec for part in parts for spec in part.engines(bench)):
        with bench.started(spec) as started:
            for part in parts:
                if spec in part.engines(bench):
                    yield from ((part, row) for row in part.measure(started))
            del started
    for part in parts:
        if not part.engines(bench):
            yield from ((part, row) for row in part.measure(bench))


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
    output = args.results / f"bench-{shape.name}-{device}"
    with model_folder(shape, args.model) as (folder, load_format):
        prompts = Prompts.of(folder)
        check(args, shape, prompts)
        if shape.selection_layers is None:
            spec = EngineSpec((), shape.lengths[-1])
            shape = replace(shape, selection_layers=resolved_cuts(spec.arguments(folder, load_format)))
        say(f"{origin['package']} on {origin['machine']['gpu'] or origin['machine']['cpu']}")
        result: dict[str, Any] = {
            "provenance": origin,
            "settings": {
                "title": f"Benchmark: {shape.name}",
                "method": f"Medians of {args.repeats} repetitions [range], dense and pruned in turn in one process, a "
                "warm-up before; gains are ratios of medians [range of the paired ratios], above 1 is faster.",
                "command": command_line("bench", argv),
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
        bench = Bench(
            shape, folder, load_format, ModelShape.from_config(read_config(folder)), prompts, device, args, result
        )
        for part, row in measured(bench, [part for part in PARTS if part.name in args.parts]):
            if part in (decode.PART, decode.OF_FLASHINFER):
                result[part.name] = row
            else:
                result.setdefault(part.name, []).append(row)
            write(result, PARTS, output, with_plot=False)
        text = write(result, PARTS, output)
    say(f"written: {output}.json, .md, .png")
    print(text)
    return 0


if __name__ == "__main__":
    run_main(main)
