"""Long-context accuracy, dense and pruned on the same samples, with lm-evaluation-harness.

Prints one table and writes it, as lm-MODEL-DEVICE.json and .md in --results: for each task and length the scores dense
and pruned, the paired difference with a 95 % interval, the share of the prompt kept, and the ratio of the times to the
first token.
With several values of --top-p, or several methods, it also plots accuracy and that ratio against what is computed, and
the files are lm-MODEL-DEVICE-curve.json, .md and .png.

A run that was ended goes on where it stopped: answers lie in build/evals/, by the settings and the package.
Exit status 0: measured; 1: a problem to mend; 130: interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from evals.bench.engine import MIN_LENGTH
from evals.bench.shapes import ModelShape, model_name, read_config, speaks_needle
from evals.provenance import add_results_option, command_line, count_argument, package_problem, provenance
from scripts import models
from scripts.fork import ROOT, ForkError, run_main, say
from scripts.serve import NEEDLE_MODEL, Address, serve_arguments, server, vllm_program, wait_until_ready

RECORDS = ROOT / "build" / "evals"
LENGTHS = (4096, 8192, 16384)
SPARE_TOKENS = 128  # the harness's own RULER does not count the start of the answer
CPU_SEQUENCES, GPU_SEQUENCES = 4, 16


def lengths_argument(text: str) -> tuple[int, ...]:
    """ "4K,16384" -> (4096, 16384)."""

    def length(word: str) -> int:
        word = word.strip().upper()
        return int(word.removesuffix("K")) * (1024 if word.endswith("K") else 1)

    try:
        return tuple(sorted({length(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 4096,8K,16K") from None


def limits_argument(text: str) -> tuple[int, ...]:
    """ "50,20" -> (50, 20)."""
    return tuple(count_argument(word) for word in text.split(","))


def top_p_argument(text: str) -> tuple[float, ...]:
    try:
        values = tuple(sorted({float(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list like .5,.9,1") from None
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: every top_p is greater than 0 and at most 1")
    return values


def json_argument(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def method_argument(text: str) -> tuple[str, dict[str, Any]]:
    """ "cut early={...}" -> its name and its config."""
    name, sign, config = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not like NAME=JSON")
    return name, json_argument(config)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.lm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", type=models.resolve, default=str(NEEDLE_MODEL), help="a folder, a hub name or a NAME of `make model`"
    )
    add("--lengths", type=lengths_argument, default=LENGTHS, metavar="N,N", help="tokens, prompt and answer")
    add(
        "--limit",
        type=limits_argument,
        default=(50,),
        metavar="N,N",
        help="samples of each task, for all lengths or for each of them (default: 50)",
    )
    add("--tasks", help="tasks or groups (default: `needle` for models with its words, `local_ruler` for others)")
    add(
        "--top-p",
        type=top_p_argument,
        metavar="P,P",
        help="sent with each pruned request, of several methods by those without amounts of their own (default: .99)",
    )
    add("--uniprefill-config", type=json_argument, metavar="JSON", help="of the engine or server that is started")
    add(
        "--method",
        type=method_argument,
        action="append",
        metavar="NAME=JSON",
        help="instead of --uniprefill-config: a config under a name; several are compared, by an engine each",
    )
    add("--backend", choices=("vllm", "api"), default="vllm", help="in this process, or through a server")
    add("--base-url", metavar="URL", help="a server that runs; otherwise `--backend api` starts one")
    add("--port", type=int, default=8101, help="of the server that is started (default: %(default)s)")
    add("--engine-args", type=json_argument, default={}, metavar="JSON", help="more arguments of LLM(...)")
    add("--batch-size", type=count_argument, help="requests at a time (default: 4 on a CPU, 16 on a GPU)")
    add("--apply-chat-template", action="store_true", help="ask as a user would in a chat")
    add("--ttft-samples", type=int, default=5, help="samples that are timed; 0: none (default: %(default)s)")
    add("--records", type=Path, default=RECORDS, metavar="FOLDER", help="where answers are kept (default: build/evals)")
    add("--fresh", action="store_true", help="ask everything again")
    add_results_option(parser)
    return parser


def prepare_environment() -> None:
    """Before vLLM and the harness are imported: quiet, and no downloads unless the caller's environment allows them."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["TQDM_DISABLE"] = "1"  # the progress lines are ours
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (", edited" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def engine_arguments(args: argparse.Namespace, cpu: bool, batch_size: int) -> dict[str, Any]:
    """Arguments of LLM(...).

    Raises:
        ForkError: if the model is too short for the lengths.

    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(args.model).get_text_config()
    positions = getattr(config, "max_position_embeddings", max(args.lengths) + SPARE_TOKENS)
    if max(args.lengths) > positions:
        raise ForkError(f"{args.model} has {positions} positions; shorten LENGTHS.")
    arguments: dict[str, Any] = {
        "max_model_len": min(max(args.lengths) + SPARE_TOKENS, positions),
        "max_num_seqs": batch_size,
        "uniprefill_config": args.uniprefill_config or {},
        "seed": 0,
    }
    if cpu:
        arguments |= {"enforce_eager": True, "distributed_executor_backend": "uni"}
        if Path(args.model).is_dir():
            per_token = ModelShape.from_config(read_config(Path(args.model))).kv_bytes_per_token
            arguments["kv_cache_memory_bytes"] = per_token * (batch_size * arguments["max_model_len"] + 8192)
    return arguments | args.engine_args


def server_options(arguments: dict[str, Any]) -> list[str]:
    """LLM(...)'s arguments as those of `vllm serve`."""
    options = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            options.append(option if value else f"--no-{name.replace('_', '-')}")
        else:
            options += [option, json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return options


@contextlib.contextmanager
def asked_backend(args: argparse.Namespace, arguments: dict[str, Any], batch_size: int, package: str) -> Iterator[Any]:
    """The backend that the arguments ask for; what is started is ended."""
    from evals.lm.backends import ApiBackend, make_engine_backend

    if args.base_url:
        backend = ApiBackend(args.base_url, args.model, args.apply_chat_template, batch_size)
        if problem := package_problem(backend.package(), True, {package}):
            raise ForkError(f"{args.base_url}: {problem}")
        if backend.max_length < max(args.lengths):
            raise ForkError(
                f"{args.base_url} serves {backend.max_length} tokens; shorten LENGTHS or raise its --max-model-len."
            )
        yield backend
    elif args.backend == "api":
        address = Address("127.0.0.1", args.port)
        options = [*server_options(arguments), "--host", address.host, "--port", str(address.port)]
        command = [vllm_program(), *serve_arguments(args.model, options, cpu=False, needle=False)]
        say(f"starting {shlex.join(command[1:])}")
        with server(command, sys.stderr.fileno()) as process:
            wait_until_ready(process, address)
            yield ApiBackend(address.url, args.model, args.apply_chat_template, batch_size)
    else:
        say("starting an engine in this process")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        backend = make_engine_backend(args.model, arguments, args.apply_chat_template, batch_size)
        try:
            yield backend
        finally:
            backend.close()


def chosen_variants(args: argparse.Namespace) -> list[Any]:
    """The ways to prune: of each config what it says itself, or each top_p.

    Raises:
        ForkError: for settings that exclude each other.

    """
    from evals.lm.runner import Variant

    if (args.uniprefill_config is not None or args.method) and args.base_url:
        raise ForkError("--uniprefill-config and --method are for engines that are started here; drop --base-url.")
    if args.uniprefill_config is not None and args.method:
        raise ForkError("--uniprefill-config and --method exclude each other; give the config a name.")
    configs = args.method or [("", args.uniprefill_config or {})]
    if len({name for name, _ in configs}) < len(configs):
        raise ForkError("Two of --method have one name; give each its own.")
    variants = []
    for name, config in configs:
        if "keep_ratio" in config:
            own = f"keep_ratio {config['keep_ratio']:g}"
        elif "profile" in config or any(isinstance(cut, dict) for cut in config.get("selection_layers", ())):
            own = "own settings"
        else:
            own = None
        if own:
            variants.append(Variant(name or own, name, {"uniprefill": 1}, config))
            if not args.top_p or "keep_ratio" in config or len(configs) > 1:
                continue
        for top_p in args.top_p or (config.get("top_p", 0.99),):
            setting = f"{name}, top_p {top_p:g}".removeprefix(", ")
            variants.append(Variant(setting, name, {"uniprefill": 1, "uniprefill_top_p": top_p}, config))
    if args.top_p and all("uniprefill_top_p" not in variant.xargs for variant in variants):
        raise ForkError("--top-p and configs with amounts of their own exclude each other; drop it.")
    return variants


def reserved_tokens(args: argparse.Namespace) -> int:
    """Tokens that a chat template puts around a prompt."""
    if not args.apply_chat_template:
        return 0
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if not tokenizer.chat_template:
        raise ForkError(f"{args.model} has no chat template; drop --apply-chat-template.")
    around = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
    )
    return len(tokenizer(around, add_special_tokens=False).input_ids) + 8  # what merges differently at the seams


def write(result: dict[str, Any], output: Path) -> None:
    """The files, with what is known by now."""
    from evals.lm import report

    result["finished"] = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    output.parent.mkdir(parents=True, exist_ok=True)
    if result["plotted"]:
        report.plot(result, Path(f"{output}.png"))
    Path(f"{output}.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(f"{output}.md").write_text(report.markdown(result))


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: end the server too
    prepare_environment()
    load = os.getloadavg()[0]
    about = provenance() | {"commit": commit(), "lm_eval": version("lm_eval")}

    from evals.lm import report
    from evals.lm.records import model_fingerprint, open_records
    from evals.lm.runner import Run
    from evals.lm.tasks import Tasks

    cpu = about["machine"]["device"] == "cpu"
    limits = args.limit * (len(args.lengths) if len(args.limit) == 1 else 1)
    if len(limits) != len(args.lengths):
        raise ForkError(f"--limit gives {len(limits)} numbers for {len(args.lengths)} lengths; give one, or one each.")
    batch_size = args.batch_size or (CPU_SEQUENCES if cpu else GPU_SEQUENCES)
    variants = chosen_variants(args)
    metadata = {"tokenizer": args.model, "num_samples": max(limits), "reserved_tokens": reserved_tokens(args)}
    names = (args.tasks or ("needle" if speaks_needle(Path(args.model)) else "local_ruler")).split(",")
    tasks = Tasks(names, metadata)
    arguments = {} if args.base_url else engine_arguments(args, cpu, batch_size)
    several = len(variants) > 1
    methods = [list(group) for _, group in groupby(variants, key=lambda variant: variant.method)]
    name = model_name(Path(args.model))
    output = args.results / f"lm-{name}-{about['machine']['device']}{'-curve' if several else ''}"
    asked = "through the completions API" if args.base_url or args.backend == "api" else "in process"
    result: dict[str, Any] = {
        "about": about,
        "settings": {
            "name": name,
            "model": os.path.relpath(args.model, ROOT) if Path(args.model).is_dir() else args.model,
            "command": command_line("eval", argv),
            "asked": asked,
            "tasks": tasks.names,
            "lengths": args.lengths,
            "limit": limits,
            "uniprefill_config": {
                alike[0].method: "the server's own" if args.base_url else alike[0].config for alike in methods
            },
            "engine": arguments,
            "batch_size": batch_size,
            "chat_template": args.apply_chat_template,
        },
        "load_average": load,
        "complete": False,
        "plotted": f"{output.name}.png" if several else None,
        "rows": [],
    }
    # Not the commit, the lengths or the tasks: the same prompt has the same answer, a dense one with any config.
    same = {
        **{key: about[key] for key in ("package", "series_sha256", "torch", "machine")},
        "model": model_fingerprint(args.model),
        "asked": args.base_url or asked,
        "engine_args": args.engine_args,
        "chat": args.apply_chat_template,
    }
    say(f"{about['package']} on {about['machine']['gpu'] or about['machine']['cpu']}; {', '.join(tasks.names)}")
    places, done = len(methods) * len(args.lengths) * len(tasks.names), 0
    with open_records(args.records, same, args.fresh) as records:
        for alike in methods:
            # On a GPU too, whose default would leave a length such as 4K dense.
            config = {"min_prompt_tokens": MIN_LENGTH} | alike[0].config
            given = arguments | ({} if args.base_url else {"uniprefill_config": config})
            with asked_backend(args, given, batch_size, about["package"]) as backend:
                for length, limit in zip(args.lengths, limits, strict=True):
                    run = Run(backend, records, alike, limit, args.ttft_samples, batch_size, args.apply_chat_template)
                    for task_name, task in tasks.load(length):
                        done += 1
                        result["rows"] += run.rows(
                            task_name, task, length, f"[{done}/{places}] {task_name} at {length:,}"
                        )
                        write(result, output)
        result["complete"] = True
        write(result, output)
    say(f"written: {output}.json, .md{', .png' if several else ''}")
    print(report.result_table(result["rows"]))
    return 0


if __name__ == "__main__":
    run_main(main)
