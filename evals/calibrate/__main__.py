"""Find what a model may drop: which heads score, where tokens are dropped, and how many.

Writes NAME.json in --results, a profile for `--uniprefill-config '{"profile": "NAME.json"}'`, with its evidence as
NAME.md and NAME.png. A run that was ended goes on where it stopped: what was recorded lies in build/calibrate/.
Exit status 0: written; 1: a problem to mend; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.bench.shapes import ModelShape, model_name
from evals.lm.__main__ import json_argument, lengths_argument, prepare_environment
from evals.provenance import add_results_option, command_line, count_argument, numbers_argument, provenance
from scripts import models
from scripts.fork import ROOT, ForkError, run_main, say
from scripts.serve import NEEDLE_MODEL

FOLDER = ROOT / "build" / "calibrate"
LENGTHS = (1024, 2048)
POOLED = ("samples", "dense", "pruned", "difference", "interval", "interval_method")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.calibrate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        type=lambda name: Path(models.resolve(name)),
        default=NEEDLE_MODEL,
        help="a model's folder, or a NAME of `make model` (default: the needle model)",
    )
    add(
        "--lengths",
        type=lengths_argument,
        default=LENGTHS,
        metavar="N,N",
        help="tokens of the prompts (default: 1K,2K)",
    )
    add("--prompts", type=count_argument, default=24, help="of each part and length (default: %(default)s)")
    add("--loss", type=float, default=1.0, help="points of the answers that may be lost (default: %(default)s)")
    add(
        "--backend",
        choices=("vllm", "transformers"),
        default="vllm",
        help="what answers dense and pruned at the end; transformers for models that the engine does not prune",
    )
    add(
        "--ceiling",
        type=numbers_argument,
        metavar="L,L",
        help="no profile: what is still answered if the needed blocks are kept first, cut after each of these layers; "
        "writes NAME-ceiling.json and .md",
    )
    add("--engine-args", type=json_argument, default={}, metavar="JSON", help="more arguments of LLM(...)")
    add("--timed", type=int, default=3, help="prompts of each length that vLLM is timed with (default: %(default)s)")
    add("--records", type=Path, default=FOLDER, metavar="FOLDER", help="what is recorded (default: build/calibrate)")
    add_results_option(parser)
    return parser


def recall_facts(trial: Any, plan: Any) -> dict[str, Any]:
    from scipy.stats import binomtest

    held = trial.held(plan)
    interval = binomtest(sum(held), len(held)).proportion_ci(method="wilson")
    return {
        "prompts": len(trial.samples),
        "answered_dense": sum(sample.right for sample in trial.samples),
        "telling": len(held),
        "recall": fmean(held),
        "interval": [interval.low, interval.high],
        "computed": trial.computed(plan),
    }


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.ceiling and args.backend != "vllm":
        parser.error("--ceiling asks the engine; leave out --backend transformers")
    prepare_environment()
    about = provenance()

    from evals.calibrate import answers, ceiling, report
    from evals.calibrate.choose import Plan, Trial, candidates
    from evals.calibrate.model import WatchedModel, identity
    from evals.calibrate.prompts import PARTS, make_prompts
    from evals.calibrate.ranks import progress, record
    from evals.lm.records import Records, model_fingerprint, open_records

    if not (args.model / "config.json").is_file():
        raise ForkError(f"--model {args.model} holds no config.json; name the folder of a model.")
    name = model_name(args.model)
    model = WatchedModel(args.model)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and max(args.lengths) > positions:
        raise ForkError(f"{args.model} has {positions} positions; shorten LENGTHS.")
    shape = ModelShape.from_config(model.config.to_dict())
    fingerprint = model_fingerprint(str(args.model))
    records = args.records / name
    trials = {}
    for part in PARTS:
        prompts = [
            prompt
            for length in args.lengths
            for prompt in make_prompts(part, model.tokenizer, model.speaks_needle, length, args.prompts)
        ]
        samples = list(progress(f"{name}, {part}", record(model, prompts, records, fingerprint), len(prompts)))
        trials[part] = Trial(samples, model.layers, shape)
    check = trials["check"]
    if not check.telling:
        raise ForkError("The model answers no prompt of the check part, so nothing can be checked; raise --prompts.")
    made = {
        "command": command_line("calibrate", argv),
        "package": about["package"],
        "torch": about["torch"],
        "transformers": version("transformers"),
        "machine": about["machine"],
        "lengths": list(args.lengths),
        "prompts": args.prompts,
        "loss": args.loss,
        "prompt_names": [sample.prompt.name for sample in check.samples],
    }
    same = {
        "package": about["package"],
        "series": about["series_sha256"],
        "model": fingerprint,
        "by": [args.backend, args.engine_args],
    }
    output = args.results / name
    args.results.mkdir(parents=True, exist_ok=True)
    layers, about_model = model.layers, {"name": name, **identity(model.config)}
    cpu = about["machine"]["device"] == "cpu"
    answered_by = f"transformers {version('transformers')}"
    if args.backend == "vllm":
        answered_by = f"vLLM {about['package']}"
        del model
        gc.collect()

    if args.ceiling:
        if unknown := set(args.ceiling) - set(layers):
            raise ForkError(f"--ceiling {min(unknown)}: no full-attention layer of {args.model} to cut after.")
        rows: list[dict[str, Any]] = []
        with open_records(args.records, same, fresh=False) as kept_answers:
            able = [sample for sample in check.telling if sample.right]
            for row in ceiling.measure(args.model, able, args.ceiling, kept_answers, cpu, args.engine_args):
                rows.append(row)
                Path(f"{output}-ceiling.json").write_text(json.dumps({"made": made, "rows": rows}, indent=1) + "\n")
        text = ceiling.markdown(name, report.made_facts(made), rows)
        Path(f"{output}-ceiling.md").write_text(text)
        print(text)
        return 0

    def holds(plan: Plan, kept_answers: Records) -> dict[str, Any] | None:
        """Its profile with the answers, if these lose no more than they may."""
        settings = plan.settings()
        say(f"{check.computed(plan):.0%} computed: {json.dumps(settings)}")
        evidence = {
            **{part: recall_facts(trial, plan) for part, trial in trials.items()},
            "ranks": [check.rank_facts(cut) for cut in plan.cuts],
        }
        profile = {"model": about_model, "settings": settings, "evidence": evidence, "made": made}
        with contextlib.ExitStack() as stack:
            if args.backend == "transformers":
                ask, backend = answers.with_transformers(model, settings), None
            else:
                asked = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "profile.json"
                asked.write_text(json.dumps(profile))
                ask, backend = answers.start_engine(
                    args.model, {"profile": str(asked)}, check.samples, cpu, args.engine_args
                )
                stack.callback(backend.close)
            ask_all = partial(answers.compare, check.samples, ask, backend, records=kept_answers, settings=settings)
            if (rows := ask_all(timed=0, loss=args.loss / 100)) is None:
                say("more is lost than may be, whatever the prompts to come")
                return None
            everything = answers.together(rows)
            say(f"of what it can answer dense {everything['dense']:.1%}, pruned {everything['pruned']:.1%} right")
            evidence["end_to_end"] = {
                "by": answered_by,
                "all": {key: everything[key] for key in POOLED},
                "rows": ask_all(timed=args.timed),
            }
        return profile

    with open_records(args.records, same, fresh=False) as kept_answers:
        plans = candidates(trials["choose"], check)
        asked, profile = next(
            ((i, found) for i, plan in enumerate(plans, 1) if (found := holds(plan, kept_answers))), (0, None)
        )
    if profile is None:
        raise ForkError(
            f"No setting loses at most {args.loss:g} points of the check part's answers; raise --loss or --prompts."
        )
    profile["evidence"]["candidates"] = {"made": len(plans), "asked": asked}
    rows = profile["evidence"]["end_to_end"]["rows"]
    report.plot(profile, layers, check.samples, Path(f"{output}.png"))
    Path(f"{output}.json").write_text(json.dumps(profile, indent=1) + "\n")
    Path(f"{output}.md").write_text(report.markdown(profile))
    say(f"written: {output}.json, .md, .png")
    print(report.result_table(rows))
    return 0


if __name__ == "__main__":
    run_main(main)
