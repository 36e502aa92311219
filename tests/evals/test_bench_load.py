"""The load part without a server: the mix, the command, what is made of what a run saved."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from evals.bench import load, report
from evals.bench.load import DENSE, LONG, NO_FLAG, PRUNED, SHORT
from evals.needle.prompts import encode
from scripts.fork import ForkError

MIX = load.Mix(requests=12, long_every=4, long_tokens=2048)


def saved(first: dict[str, float], gap: float) -> dict:
    """What `vllm bench serve` saves of a run in which each class had the same times."""
    classes = MIX.classes()
    return {
        "request_throughput": 2.0,
        "ttfts": [first[name] for name in classes],
        "itls": [[gap, gap, 10 * gap]] * len(classes),
        "input_lens": [2048 if name == LONG else load.SHORT_TOKENS for name in classes],
        "answered": [name == SHORT for name in classes],
    }


def made_row(pruned_first: float = 0.1) -> dict:
    """Two rounds of each way; short requests of pruned wait so long for their first token."""

    def run(way: str, seed: int) -> dict:
        first = pruned_first if way == PRUNED else 0.2
        return saved({SHORT: first * seed, LONG: 2.0}, 0.01 if way == PRUNED else 0.02)

    return load.measure_rate(MIX, "0.5", 2, [DENSE, PRUNED, NO_FLAG], run)


def test_one_request_of_so_many_is_long() -> None:
    assert MIX.classes().count(LONG) == 3 and MIX.classes()[:4] == [SHORT, SHORT, LONG, SHORT]


def test_prompts_have_their_lengths_and_differ_between_rounds() -> None:
    questions = MIX.questions(1)
    lengths = [len(encode(prompt)) for prompt, _ in questions]
    assert lengths == [2048 if name == LONG else load.SHORT_TOKENS for name in MIX.classes()]
    assert all(f"is {answer} ." in prompt for prompt, answer in questions)
    texts = {prompt for seed in (1, 2) for prompt, _ in MIX.questions(seed)}
    assert len(texts) == 24 and questions == MIX.questions(1)


@pytest.mark.parametrize(
    ("way", "xargs"), [(DENSE, {"uniprefill": 0}), (PRUNED, {"uniprefill": 1}), (NO_FLAG, None)], ids=str
)
def test_the_command_asks_for_what_the_way_is(tmp_path: Path, way: str, xargs: dict | None) -> None:
    dataset = tmp_path / "prompts.jsonl"
    load.write_dataset(MIX.questions(1), dataset)
    command = load.bench_command("http://127.0.0.1:1", tmp_path, dataset, "0.5", 3, way, tmp_path / "out.json")
    options = dict(zip(command, command[1:], strict=False))
    assert json.loads(options["--extra-body"]).get("vllm_xargs") == xargs
    assert (options["--num-prompts"], options["--request-rate"], options["--seed"]) == ("12", "0.5", "3")
    assert json.loads(dataset.read_text().splitlines()[0])["output_tokens"] == load.NEW_TOKENS


def test_the_servers_differ_in_the_flag_alone() -> None:
    with_flag, without = (load.server_options(MIX, flag) for flag in (True, False))
    assert with_flag.items() - without.items() == {
        ("--uniprefill-config", '{"top_p": 0.99, "min_prompt_tokens": 1024}')
    }
    assert without.items() <= with_flag.items()


def test_a_class_has_its_own_percentiles() -> None:
    found = load.summary(saved({SHORT: 0.1, LONG: 2.0}, 0.01), MIX.classes())
    assert found[SHORT]["TTFT p99"] == pytest.approx(0.1) and found[LONG]["TTFT p50"] == pytest.approx(2.0)
    assert found[SHORT]["ITL max"] == pytest.approx(0.1) and found[SHORT]["ITL p50"] == pytest.approx(0.01)
    assert (found[SHORT]["requests"], found[SHORT]["right"], found[LONG]["right"]) == (9, 9, 0)


def test_ways_alternate_and_every_round_begins_with_another() -> None:
    asked = []

    def run(way: str, seed: int) -> dict:
        asked.append((seed, way))
        return saved({SHORT: 0.1, LONG: 2.0}, 0.01)

    load.measure_rate(MIX, "inf", 3, ["a", "b", "c"], run)
    assert [way for _, way in asked] == ["b", "c", "a", "c", "a", "b", "a", "b", "c"]
    assert [seed for seed, _ in asked] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("first", "met"), [(0.1, True), (0.2, True), (0.22, False)])
def test_short_requests_must_not_wait_longer_than_dense_ones(first: float, met: bool) -> None:
    ttft, itl, *over_no_flag = load.expectations({"load": [made_row(first)]})
    assert ttft["met"] is met and itl["met"] is True
    assert [row["met"] for row in over_no_flag] == [met, True]
    assert "TTFT p99" in ttft["expectation"] and "0.5 requests/s" in ttft["expectation"]
    assert ttft["measured"].startswith(f"{0.2 / first:.2f}"), "above 1 pruned is faster"


def test_a_result_is_written_and_plotted(tmp_path: Path) -> None:
    machine = {"cpu": "A CPU", "cores": 2, "gpu": None, "device": "cpu"}
    names = ("package", "torch", "upstream", "upstream_commit", "series_sha256")
    result = {
        "provenance": dict.fromkeys(names, "0") | {"machine": machine},
        "settings": {"title": "Load", "method": load.method(MIX, 2), "command": "x", "rounds": 2},
        "load_average": 0.1,
        "load": [made_row(), made_row(0.3) | {"rate": "inf"}],
    }
    text = report.write(result, [load.PART], tmp_path / "x")
    assert "**missed**" in text and "all at once" in text and "over no flag" in text and "18/18" in text
    assert all(line.endswith("|") for line in text.splitlines() if line.startswith("|"))
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_a_model_that_does_not_know_the_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForkError, match="does not know its words; measure another model with `vllm bench serve"):
        load.main(["--model", str(tmp_path)])


@pytest.mark.parametrize("text", ["0", "-1", "fast", "1,"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no rate"):
        load.rates_argument(text)
    assert load.rates_argument("0.5,inf") == ("0.5", "inf")
