"""Show UniPrefill at work: one long needle prompt, dense and pruned in turn.

Starts a server, prints the question, both answers, the tokens kept in each segment, both times
to the first token and their ratio, and stops the server. Ctrl-C leaves nothing running.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import sys
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts import serve
from scripts.fork import ROOT, ForkError, Layout, run_main, say


@dataclass(frozen=True)
class Question:
    prompt: str
    question: str
    answer: str


@dataclass(frozen=True)
class Reply:
    text: str
    first_token: float  # seconds from sending to the first text
    report: dict[str, Any] | None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def needle_question(tokens: int, seed: int) -> Question:
    """From the needle model's own prompts: eight keys with values in a text of filler words."""
    sys.path.insert(0, str(ROOT))
    from evals.needle.prompts import make_prompt

    made = make_prompt("multikey", tokens, seed)
    return Question(made.text, made.question, made.answer)


def prose_question(words: int, seed: int) -> Question:
    """For any other model: a number hidden in a report of about so many words."""
    rng = random.Random(seed)
    towns = ["Arden", "Belmont", "Corby", "Dunmore", "Elgin", "Fairview", "Galway", "Hythe"]
    goods = ["timber", "wool", "salt", "copper", "grain", "glass", "paper", "cider"]
    lines = []
    while sum(len(line.split()) for line in lines) < words:
        year, count = rng.randint(1700, 1999), rng.randint(10, 999)
        lines.append(f"In {year} the port of {rng.choice(towns)} shipped {count} loads of {rng.choice(goods)}.")
    answer = str(rng.randint(1_000_000, 9_999_999))
    lines.insert(len(lines) // 3, f"The special number of the harbour master is {answer}.")
    question = "What is the special number of the harbour master? The special number is"
    return Question("\n".join(lines) + f"\n\nQuestion: {question}", question, answer)


def read_stream(lines: Any, started: float, clock: Any = time.perf_counter) -> Reply:
    """A streamed completion: its text, when the first of it came, and what was reported."""
    text, first, report = "", None, None
    for raw in lines:
        line = raw.decode().strip()
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data:"))
        if "error" in chunk:
            raise ForkError(f"The server refused the request: {chunk['error'].get('message', chunk['error'])}")
        choices = chunk.get("choices", [])
        report = next((choice["uniprefill"] for choice in choices if "uniprefill" in choice), report)
        piece = "".join(choice.get("text") or "" for choice in choices)
        if piece and first is None:
            first = clock() - started
        text += piece
    if first is None:
        raise ForkError("The server sent no token; see build/demo.log.")
    return Reply(text.strip(), first, report)


def ask(url: str, model: str, question: Question, pruned: bool, max_tokens: int) -> Reply:
    body = {
        "model": model,
        "prompt": question.prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "vllm_xargs": {"uniprefill": int(pruned), "uniprefill_report": 1},
    }
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=1800)
    try:
        started = time.perf_counter()
        data = json.dumps(body).encode()
        connection.request("POST", "/v1/completions", data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ForkError(f"The server answered {response.status}: {response.read().decode()[:500]}")
        return read_stream(response, started)
    finally:
        connection.close()


def bar_table(report: dict[str, Any], width: int = 40) -> str:
    """A row a segment: its layers and the share of the prompt that it computed."""
    total = report["prompt_tokens"]
    rows = []
    for segment in report["segments"]:
        first, last = segment["layers"]
        share = segment["tokens_in"] / total
        filled = max(1, round(share * width))
        rows.append(
            f"  layers {first:>3}-{last:<3} {'█' * filled}{'·' * (width - filled)} "
            f"{segment['tokens_in']:>7,} tokens {share:>6.1%}"
        )
    return "\n".join(rows)


def summary(question: Question, dense: list[Reply], pruned: list[Reply]) -> str:
    report = pruned[-1].report or {}
    times = {name: [r.first_token for r in replies] for name, replies in (("dense", dense), ("pruned", pruned))}
    middle = {name: statistics.median(values) for name, values in times.items()}
    lines = [f"\nquestion  {question.question}", f"expected  {question.answer}"]
    lines += [f"dense     {dense[-1].text}", f"pruned    {pruned[-1].text}", ""]
    if report.get("segments"):
        lines += [f"tokens computed of {report['prompt_tokens']:,}:", bar_table(report), ""]
    else:
        lines += [f"nothing was pruned: {report.get('reason') or 'the server did not say why'}", ""]
    lines.append("time to first token")
    for name, values in times.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"  {name:<7} {middle[name]:6.2f} s   (median of {each})")
    lines.append(f"  ratio   {middle['dense'] / middle['pruned']:6.2f} x")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a path or a hub name; default: the needle model")
    parser.add_argument("--tokens", type=int, default=16_000, help="length of the prompt (default 16000)")
    parser.add_argument("--rounds", type=int, default=3, help="dense and pruned runs of each (default 3)")
    parser.add_argument("--seed", type=int, default=7, help="which prompt (default 7)")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to vllm serve")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ForkError("--rounds must be at least 1.")

    model, needle = serve.choose_model(args.model)
    # dense requests would find the first one's prompt in the prefix cache
    extra = ["--port", str(free_port()), "--no-enable-prefix-caching", *args.arguments]
    arguments = serve.serve_arguments(model, extra, serve.is_cpu_build(), needle)
    make = needle_question if needle else lambda tokens, seed: prose_question(int(tokens * 0.55), seed)
    name, url = serve.option_value(arguments, "--served-model-name", model), serve.base_url(arguments)
    max_tokens = 4 if needle else 24

    log = Layout().build / "demo.log"
    say(f"starting the server (its log: {log.relative_to(Path.cwd()) if log.is_relative_to(Path.cwd()) else log})")
    dense: list[Reply] = []
    pruned: list[Reply] = []
    with log.open("w") as output, serve.server([serve.vllm_program(), *arguments], output.fileno()) as process:
        try:
            serve.wait_until_ready(process, url)
        except ForkError as error:
            tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-8:]
            raise ForkError(f"{error}\n" + "\n".join(tail)) from None
        say("ready; one request to warm up")
        ask(url, name, make(2048, args.seed + 1), True, 1)
        question = make(args.tokens, args.seed)
        for number in range(1, args.rounds + 1):
            for replies, prune in ((dense, False), (pruned, True)):
                replies.append(ask(url, name, question, prune, max_tokens))
                kind = "pruned" if prune else "dense"
                say(f"round {number}/{args.rounds} {kind:<6} first token after {replies[-1].first_token:.2f} s")
    print(summary(question, dense, pruned), flush=True)
    right = all(r.text.startswith(question.answer) for r in (dense[-1], pruned[-1]))
    return 0 if right or not needle else 1


if __name__ == "__main__":
    run_main(main)
