"""Show UniPrefill at work: one long needle prompt, dense and pruned in turn.

Starts a server, prints the question, both answers, the tokens kept in each segment, both times
to the first token and their ratio, and stops the server. Ctrl-C leaves nothing running.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from scripts import serve
from scripts.fork import ROOT, ForkError, Layout, run_main, say

# what to change, by the reason of a report
REMEDIES = {
    "short_prompt": "ask with more --tokens",
    "prompt_exceeds_pool": "raise pool_tokens in --uniprefill-config or ask with fewer --tokens",
}


ROOM_FOR_ANSWER = 32  # tokens


@dataclass(frozen=True)
class Question:
    prompt: str
    question: str
    answer: str

    def is_answered(self, replies: list[Reply]) -> bool:
        """By the last of them."""
        return replies[-1].text.startswith(self.answer)


@dataclass(frozen=True)
class Reply:
    text: str
    first_token: float  # seconds from sending to the first text
    report: dict[str, Any] | None


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


def fitting_question(client: openai.OpenAI, model: str, tokens: int, seed: int) -> Question:
    """A prose question of at most so many tokens of the model, and no more than its context takes."""
    [served] = [entry for entry in client.models.list().data if entry.id == model]
    tokens = min(tokens, served.model_extra["max_model_len"] - ROOM_FOR_ANSWER)

    def count(question: Question) -> int:
        body = {"model": model, "prompt": question.prompt}
        return client.post("../tokenize", body=body, cast_to=dict[str, Any])["count"]

    words = tokens // 2
    question = prose_question(words, seed)
    while (found := count(question)) > tokens or found < 0.97 * tokens:
        words = int(words * 0.985 * tokens / found)
        question = prose_question(words, seed)
    return question


def make_client(address: serve.Address, api_key: str | None) -> openai.OpenAI:
    """A client of the server; where it speaks TLS, its certificate may be signed by nobody that we know."""
    return openai.OpenAI(
        base_url=f"{address.url}/v1",
        api_key=api_key or os.environ.get("VLLM_API_KEY") or "none",
        timeout=1800,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(verify=False),
    )


def ask(client: openai.OpenAI, model: str, question: Question, pruned: bool, max_tokens: int) -> Reply:
    """Stream one completion: its text, when the first of it came, and what was reported."""
    text, first, report = "", None, None
    started = time.perf_counter()
    try:
        stream = client.completions.create(
            model=model,
            prompt=question.prompt,
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"vllm_xargs": {"uniprefill": int(pruned), "uniprefill_report": 1}},
        )
        for chunk in stream:
            for choice in chunk.choices:
                report = (choice.model_extra or {}).get("uniprefill") or report
            piece = "".join(choice.text or "" for choice in chunk.choices)
            if piece and first is None:
                first = time.perf_counter() - started
            text += piece
    except openai.APIError as error:
        raise ForkError(f"The server refused the request: {error.message}") from None
    if first is None:
        raise ForkError("The server sent no token; see build/demo.log.")
    return Reply(text.strip(), first, report)


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


def nothing_dropped(report: dict[str, Any]) -> str:
    """Why the pruned request kept every token; empty if it did not."""
    if report.get("outcome") != "pruned":
        reason = report.get("reason") or "no report"
        return f"nothing was pruned: {reason}" + (f" ({REMEDIES[reason]})" if reason in REMEDIES else "")
    if report["segments"][-1]["tokens_in"] == report["prompt_tokens"]:
        return "nothing was dropped: every block was needed; a smaller top_p or keep_ratio keeps less"
    return ""


def summary(question: Question, dense: list[Reply], pruned: list[Reply]) -> str:
    report = pruned[-1].report or {}
    times = {name: [r.first_token for r in replies] for name, replies in (("dense", dense), ("pruned", pruned))}
    middle = {name: statistics.median(values) for name, values in times.items()}
    lines = [f"\nquestion  {question.question}", f"expected  {question.answer}"]
    lines += [f"dense     {dense[-1].text}", f"pruned    {pruned[-1].text}", ""]
    if report.get("segments"):
        lines += [f"tokens computed of {report['prompt_tokens']:,}, in {report['steps']} steps:", bar_table(report)]
    lines += [nothing_dropped(report), ""]
    if question.is_answered(dense) and not question.is_answered(pruned):
        lines += ["what it needed was dropped: make calibrate MODEL=… finds what this model may drop", ""]
    lines.append("time to first token")
    for name, values in times.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"  {name:<7} {middle[name]:6.2f} s   (median of {each})")
    lines.append(f"  ratio   {middle['dense'] / middle['pruned']:6.2f} x")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a path, a hub name or a NAME of make model; default: the needle model")
    parser.add_argument(
        "--tokens", type=int, default=16_000, help="length of the prompt (default 16000, or what the model takes)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="dense and pruned runs of each (default 3)")
    parser.add_argument("--seed", type=int, default=7, help="which prompt (default 7)")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENT", help="passed on to vllm serve")
    args = parser.parse_args()
    if args.rounds < 1:
        raise ForkError("--rounds must be at least 1.")

    # dense requests would find the first one's prompt in the prefix cache
    extra = ["--port", "0", "--no-enable-prefix-caching", *args.arguments]
    given = serve.given_options(extra)
    if "uds" in given:
        raise ForkError("make demo talks to its server over TCP; leave --uds out.")
    model, needle = serve.choose_model(args.model or given.get("model"))
    address = serve.Address.of(given)
    address.require_free()
    arguments = serve.serve_arguments(model, extra, serve.is_cpu_build(), needle)
    name = serve.given_options(arguments).get("served-model-name", model)
    max_tokens = 4 if needle else 24

    log = Layout().build / "demo.log"
    say(f"starting the server (its log: {log.relative_to(Path.cwd()) if log.is_relative_to(Path.cwd()) else log})")
    dense: list[Reply] = []
    pruned: list[Reply] = []
    with log.open("w") as output, serve.server([serve.vllm_program(), *arguments], output.fileno()) as process:
        try:
            address = serve.wait_until_ready(process, address)
        except ForkError as error:
            tail = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-8:]
            raise ForkError(f"{error}\n" + "\n".join(tail)) from None
        say("ready; one request to warm up")
        client = make_client(address, given.get("api-key"))

        def make(tokens: int, seed: int) -> Question:
            return needle_question(tokens, seed) if needle else fitting_question(client, name, tokens, seed)

        ask(client, name, make(2048, args.seed + 1), True, 1)
        question = make(args.tokens, args.seed)
        for number in range(1, args.rounds + 1):
            for replies, prune in ((dense, False), (pruned, True)):
                replies.append(ask(client, name, question, prune, max_tokens))
                kind = "pruned" if prune else "dense"
                say(f"round {number}/{args.rounds} {kind:<6} first token after {replies[-1].first_token:.2f} s")
    print(summary(question, dense, pruned), flush=True)
    right = question.is_answered(dense) and question.is_answered(pruned)
    return 0 if right or not needle else 1


if __name__ == "__main__":
    run_main(main)
