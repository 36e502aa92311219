"""`make eval`: the table's arithmetic, refusals, resuming, the requests it sends, and a run on the needle model."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import vllm  # noqa: E402  before torch: on a CPU it chooses Triton's interpreter
from lm_eval import tasks as harness_tasks  # noqa: E402

from evals.live_server import free_port  # noqa: E402
from evals.lm import arithmetic, report  # noqa: E402
from evals.lm.__main__ import NEEDLE_MODEL, chosen_variants, lengths_argument, main, make_parser, server_options  # noqa: E402
from evals.lm.records import open_records  # noqa: E402
from evals.lm.runner import Variant  # noqa: E402
from evals.lm.tasks import Tasks, leaves  # noqa: E402
from evals.needle.prompts import is_correct, make_prompt  # noqa: E402
from evals.tasks.generators.datasets import NEEDLE_ANSWER_TOKENS, documents  # noqa: E402
from scripts.fork import ForkError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HARNESS = Path(harness_tasks.__file__).parent

# --- arithmetic ---


@pytest.mark.parametrize("n", [4, 50, 200])
def test_no_difference_still_has_an_interval(n: int) -> None:
    expected = arithmetic.Z**2 / (n + arithmetic.Z**2)
    assert arithmetic.score_interval(0, 0, n) == pytest.approx((-expected, expected), abs=1e-6)


def test_the_score_interval_mirrors_and_holds_the_difference() -> None:
    for gained, lost, n in [(3, 9, 50), (0, 1, 8), (5, 0, 5), (10, 10, 20)]:
        low, high = arithmetic.score_interval(gained, lost, n)
        assert arithmetic.score_interval(lost, gained, n) == pytest.approx((-high, -low), abs=1e-6)
        assert -1 <= low <= (gained - lost) / n <= high <= 1
        assert low < high


def test_the_score_interval_is_the_plain_one_for_many_samples() -> None:
    gained, lost, n = 3000, 2000, 40_000
    difference = (gained - lost) / n
    width = arithmetic.Z * math.sqrt((gained + lost) / n - difference**2) / math.sqrt(n)
    assert arithmetic.score_interval(gained, lost, n) == pytest.approx(
        (difference - width, difference + width), abs=2e-5
    )


@pytest.mark.parametrize(("p_gained", "p_lost"), [(0.02, 0.02), (0.05, 0.15), (0.3, 0.1)])
def test_the_score_interval_covers(p_gained: float, p_lost: float) -> None:
    """The probability, counted over all outcomes of 30 pairs, that the interval holds the truth."""
    n, covered = 30, 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            ways = math.comb(n, gained) * math.comb(n - gained, lost)
            chance = ways * p_gained**gained * p_lost**lost * (1 - p_gained - p_lost) ** (n - gained - lost)
            if chance > 1e-9:
                low, high = arithmetic.score_interval(gained, lost, n)
                covered += chance * (low <= p_gained - p_lost <= high)
    assert 0.93 <= covered <= 1


def test_the_bootstrap_agrees_with_the_normal_interval() -> None:
    values = [((i * 37) % 101) / 101 - 0.3 for i in range(300)]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    low, high = arithmetic.bootstrap_interval(values)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert arithmetic.bootstrap_interval(values) == (low, high)


def test_the_method_follows_the_scores() -> None:
    def method(dense: list[float], pruned: list[float]) -> str:
        return arithmetic.paired_difference(dense, pruned)["interval_method"]

    assert method([0, 1, 1], [1, 1, 0]) == arithmetic.SCORE
    assert method([0.25, 0.5], [0.25, 0.5]) == arithmetic.SCORE
    assert method([0.25, 0.5], [0.25, 0.75]) == arithmetic.BOOTSTRAP


def pruned_report(tokens: int, *alive: int) -> dict[str, Any]:
    segments = [{"layers": [2 * i, 2 * i + 1], "tokens_in": n} for i, n in enumerate((tokens, *alive))]
    return {"outcome": "pruned", "reason": None, "prompt_tokens": tokens, "segments": segments}


DENSE_REPORT = {
    "outcome": "dense",
    "reason": "short_prompt",
    "prompt_tokens": 100,
    "segments": [{"layers": [0, 5], "tokens_in": 100}],
}


def example_row(**place: Any) -> dict[str, Any]:
    return arithmetic.make_row(
        {"task": "a", "length": 4096, "setting": "top_p 0.9", "method": "", **place},
        dense=[1, 1, 1, 0],
        pruned=[1, 0, 0, 1],
        reports=[pruned_report(1000, 400, 100), pruned_report(1000, 200, 100), DENSE_REPORT, DENSE_REPORT],
        times=[(2.0, 1.0), (3.0, 1.0), (4.0, 2.0)],
    )


def test_a_row_is_what_its_samples_say() -> None:
    row = example_row()
    assert (row["samples"], row["dense"], row["pruned"], row["difference"]) == (4, 0.75, 0.5, -0.25)
    assert (row["better_pruned"], row["worse_pruned"]) == (1, 2)
    assert row["interval"] == pytest.approx(arithmetic.score_interval(1, 2, 4))
    assert row["kept"] == pytest.approx([0.3, 0.1]), "of the pruned prompts only"
    assert row["computed"] == pytest.approx((0.5 + 1.3 / 3 + 1 + 1) / 4), "of all prompts"
    assert row["not_pruned"] == {"short_prompt": 2}
    assert row["ttft"]["ratio"] == 3.0
    assert (row["ttft"]["paired"]["min"], row["ttft"]["paired"]["max"]) == (2.0, 3.0)


def test_rows_are_pooled_by_sample() -> None:
    place = {"task": "b", "length": 4096, "setting": "top_p 0.9", "method": ""}
    other = arithmetic.make_row(place, [1] * 8, [1] * 8, [pruned_report(1000, 900, 600)] * 8, [])
    row = arithmetic.pooled([example_row(), other])
    assert (row["task"], row["samples"]) == ("all", 12)
    assert (row["dense"], row["pruned"]) == (pytest.approx(11 / 12), pytest.approx(10 / 12))
    assert row["interval"] == pytest.approx(arithmetic.score_interval(1, 2, 12))
    assert row["kept"] == pytest.approx([(2 * 0.3 + 8 * 0.9) / 10, (2 * 0.1 + 8 * 0.6) / 10])
    assert row["computed"] == pytest.approx((0.5 + 1.3 / 3 + 1 + 1 + 8 * 2.5 / 3) / 12)
    assert row["not_pruned"] == {"short_prompt": 2}
    assert row["ttft"]["ratio"] == 3.0


def test_the_table_shows_the_row() -> None:
    low, high = (100 * x for x in arithmetic.score_interval(1, 2, 4))
    expected = (
        f"| a | 4,096 | top_p 0.9 | 4 | 75.0% | 50.0% | -25.0 [{low:+.1f}, {high:+.1f}] | 1, 2 | 30.0%, 10.0% "
        "| 0.73 | 3.00x [2.00–3.00] |"
    )
    lines = report.result_table([example_row(), example_row(task="b"), example_row(length=8192)]).splitlines()
    assert lines[2] == expected
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| a", "| b", "| all", "| a"]
    starred = arithmetic.make_row({"task": "c", "length": 1, "setting": "s"}, [0.5, 1], [0.25, 1], [], [])
    assert report.difference(starred).endswith("]*")
    [note] = report.not_pruned_lines([example_row()])
    assert "2 of 4 prompts were prefilled densely all the same (short_prompt)" in note


# --- what is asked for ---


def test_lengths_and_options_are_read() -> None:
    assert lengths_argument("16384,4K") == (4096, 16384)
    options = server_options({"max_model_len": 9, "enforce_eager": True, "a_b": False, "c": {"d": 1}})
    assert options == ["--max-model-len", "9", "--enforce-eager", "--no-a-b", "--c", '{"d": 1}']


@pytest.mark.parametrize(
    ("folder", "name", "output_type"),
    [
        ("arc", "arc_easy", "multiple_choice"),
        ("wikitext", "wikitext", "loglikelihood_rolling"),
        ("lambada", "lambada_openai", "loglikelihood"),
        ("arc", "ai2_arc", "multiple_choice"),
    ],
)
def test_tasks_with_prompt_logprobs_are_refused(folder: str, name: str, output_type: str) -> None:
    """Before anything is downloaded, also as members of a tag."""
    index = harness_tasks.TaskManager(include_path=str(HARNESS / folder), include_defaults=False).task_index
    with pytest.raises(
        ForkError, match=rf"log-probabilities of prompt tokens \({output_type}\).*prefilled densely"
    ) as e:
        list(leaves(index, name))
    assert str(e.value).count(". ") == 0, "one sentence"


def test_generating_tasks_and_groups_are_found() -> None:
    index = harness_tasks.TaskManager(include_path=str(HARNESS / "gsm8k"), include_defaults=False).task_index
    assert list(leaves(index, "gsm8k")) == ["gsm8k"]
    with pytest.raises(ForkError, match="No task is called gms8k"):
        list(leaves(index, "gms8k"))
    assert len(Tasks(["local_ruler", "local_vt", "needle"], {}).names) == 17


def test_each_config_says_how_its_prompts_are_pruned() -> None:
    """A profile's own amounts are overridden by --top-p if it is the only method."""

    def variants(*arguments: str) -> list[tuple[str, str, Any]]:
        found = chosen_variants(make_parser().parse_args(arguments))
        assert all(variant.xargs["uniprefill"] == 1 for variant in found)
        return [(variant.name, variant.method, variant.xargs.get("uniprefill_top_p")) for variant in found]

    heads = '{"selection_layers": [{"layer": 3, "heads": [1], "top_p": 0.8}]}'
    assert variants() == [("top_p 0.99", "", 0.99)]
    assert variants("--uniprefill-config", '{"top_p": 0.9, "selection_layers": [3]}') == [("top_p 0.9", "", 0.9)]
    assert variants("--uniprefill-config", '{"profile": "a.json"}') == [("own settings", "", None)]
    assert variants("--method", "published={}", "--method", f"heads={heads}", "--top-p", ".5,.9") == [
        ("published, top_p 0.5", "published", 0.5),
        ("published, top_p 0.9", "published", 0.9),
        ("heads", "heads", None),
    ]
    assert variants("--method", f"heads={heads}", "--top-p", ".5") == [
        ("heads", "heads", None),
        ("heads, top_p 0.5", "heads", 0.5),
    ]
    for wrong in (
        ["--method", "a={}", "--uniprefill-config", "{}"],
        ["--method", "a={}", "--base-url", "http://127.0.0.1:1"],
        ["--uniprefill-config", '{"keep_ratio": 0.5}', "--top-p", ".9"],
        ["--method", "a={}", "--method", 'a={"hops": 2}'],
        ["--method", f"a={heads}", "--method", 'b={"keep_ratio": 0.5}', "--top-p", ".9"],
    ):
        with pytest.raises(ForkError):
            variants(*wrong)


def test_a_run_refuses_before_it_starts_anything(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(vllm, "LLM", lambda **_: pytest.fail("an engine was started"))
    with pytest.raises(ForkError, match="arc_easy is scored by log-probabilities"):
        main(["--tasks", "needle_single,arc_easy", "--records", str(tmp_path)])
    with pytest.raises(ForkError, match="32768 positions; shorten LENGTHS"):
        main(["--lengths", "64K", "--records", str(tmp_path)])


# --- records ---


def test_records_survive_a_kill_in_the_middle_of_a_line(tmp_path) -> None:
    with open_records(tmp_path, {"a": 1}, fresh=False) as records:
        records.add({"q": 1}, "one")
        records.add({"q": 2}, "two")
        path = records.path
        with pytest.raises(ForkError, match="Another run"), open_records(tmp_path, {"a": 1}, fresh=False):
            pass
    path.write_text(path.read_text()[:-5])
    with open_records(tmp_path, {"a": 1}, fresh=False) as records:
        assert (records.get({"q": 1}), records.get({"q": 2})) == ("one", None)
        records.add({"q": 2}, "two")
    with open_records(tmp_path, {"a": 1}, fresh=False) as records:
        assert (records.get({"q": 1}), records.get({"q": 2})) == ("one", "two")
    with open_records(tmp_path, {"a": 2}, fresh=False) as records:
        assert records.get({"q": 1}) is None, "other settings, other records"
    with open_records(tmp_path, {"a": 1}, fresh=True) as records:
        assert records.get({"q": 1}) is None


# --- through the API, against a server that only pretends ---

LENGTH, SAMPLES = 2048, 4


class Pretended(ThreadingHTTPServer):
    """Answers needle questions from a list: dense all right, pruned the odd samples wrong."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        from transformers import AutoTokenizer

        encode = AutoTokenizer.from_pretrained(NEEDLE_MODEL)
        docs = documents("needle_multikey", str(NEEDLE_MODEL), (LENGTH,), SAMPLES)
        self.answers = {tuple(encode(doc["input"]).input_ids): (i, doc["outputs"][0]) for i, doc in enumerate(docs)}
        self.asked: list[dict[str, Any]] = []
        self.fail_after = math.inf
        self.package = vllm.__version__

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def samples_asked(self, stream: bool) -> list[tuple[int, int]]:
        """(sample, whether pruned) in order, without the probe that begins a run."""
        found = [(self.prompt_of(body), body) for body in self.asked if body.get("stream", False) == stream]
        return [(self.answers[p][0], body["vllm_xargs"]["uniprefill"]) for p, body in found if p in self.answers]

    @staticmethod
    def prompt_of(body: dict[str, Any]) -> tuple[int, ...]:
        prompt = body["prompt"]
        return tuple(prompt[0] if isinstance(prompt[0], list) else prompt)


class Handler(BaseHTTPRequestHandler):
    server: Pretended

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, content: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        answers = {
            "/v1/models": {"data": [{"id": "needle", "max_model_len": 4096}]},
            "/version": {"version": self.server.package},
        }
        self.reply(json.dumps(answers[self.path]).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(self.server.asked) >= self.server.fail_after:
            self.reply(b'{"error": "gone"}', status=500)
            return
        self.server.asked.append(body)
        prompt, pruned = self.server.prompt_of(body), body["vllm_xargs"]["uniprefill"]
        i, answer = self.server.answers.get(prompt, (0, "?"))
        n = len(prompt)
        alive = (n, n // 4, n // 8) if pruned else (n, n, n)
        said = {
            "outcome": "pruned" if pruned else "dense",
            "reason": None if pruned else "disabled",
            "prompt_tokens": n,
            "segments": [{"layers": [i, i], "tokens_in": k, "tokens_out": k} for i, k in enumerate(alive)],
        }
        text = "wrong" if pruned and i % 2 else f"{answer} ."
        answered = {"choices": [{"index": 0, "text": text, "finish_reason": "length", "uniprefill": said}]}
        if body.get("stream"):
            time.sleep(0.04 if pruned else 0.2)
            self.reply(f"data: {json.dumps(answered)}\n\ndata: [DONE]\n\n".encode(), "text/event-stream")
        else:
            self.reply(json.dumps(answered).encode())


@pytest.fixture
def pretended() -> Iterator[Pretended]:
    before = signal.getsignal(signal.SIGTERM)
    server = Pretended()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
    signal.signal(signal.SIGTERM, before)


def run_against(server: Pretended, folder: Path, *more: str) -> dict[str, Any]:
    arguments = ["--base-url", server.url, "--lengths", str(LENGTH), "--limit", str(SAMPLES)]
    arguments += ["--tasks", "needle_multikey", "--ttft-samples", "3", "--batch-size", "2"]
    arguments += ["--results", str(folder), "--records", str(folder / "records"), *more]
    assert main(arguments) == 0
    return json.loads((folder / "lm-needle-cpu.json").read_text())


def test_every_request_says_how_it_is_prefilled(pretended: Pretended, tmp_path: Path, capsys) -> None:
    result = run_against(pretended, tmp_path)
    [row] = result["rows"]
    assert (row["dense"], row["pruned"], row["difference"]) == (1, 0.5, -0.5)
    assert row["scores"] == {"dense": [1, 1, 1, 1], "pruned": [1, 0, 1, 0]}
    tokens = LENGTH - NEEDLE_ANSWER_TOKENS
    assert row["kept"] == [tokens // 4 / tokens, tokens // 8 / tokens]
    assert 2 < row["ttft"]["ratio"] < 6
    assert row["not_pruned"] == {}
    assert all(body["vllm_xargs"]["uniprefill_report"] == 1 for body in pretended.asked)
    shares = [
        body["vllm_xargs"].get("uniprefill_top_p") for body in pretended.asked if body["vllm_xargs"]["uniprefill"]
    ]
    assert set(shares) == {0.99}
    assert sorted(pretended.samples_asked(stream=False)) == [(i, pruned) for i in range(SAMPLES) for pruned in (0, 1)]
    # a warm-up, then each sample both ways in turn, the order changing
    warm_up = [(0, 0), (0, 1)]
    assert pretended.samples_asked(stream=True) == [*warm_up, (0, 0), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]
    salts = [body["cache_salt"] for body in pretended.asked if body.get("stream")]
    assert len(set(salts)) == len(salts)
    printed = capsys.readouterr()
    assert "| needle_multikey | 2,048 | top_p 0.99 | 4 | 100.0% | 50.0% | -50.0 [" in printed.out
    assert "[1/1] needle_multikey at 2,048, dense: 2 of 4 answered" in printed.err
    page = (tmp_path / "lm-needle-cpu.md").read_text()
    for fact in ("package", "version", "commit", "upstream_commit"):
        assert result["about"][fact] in page
    assert result["about"]["series_sha256"][:16] in page
    assert result["complete"]


def test_a_run_that_ended_goes_on(pretended: Pretended, tmp_path: Path) -> None:
    pretended.fail_after = 1 + SAMPLES + 2  # the probe, all dense ones and two pruned
    with pytest.raises(ForkError, match="failed a request"):
        run_against(pretended, tmp_path, "--batch-size", "1")
    first = pretended.samples_asked(stream=False)
    assert len(first) == SAMPLES + 2
    pretended.fail_after = math.inf
    run_against(pretended, tmp_path)
    asked = pretended.samples_asked(stream=False)
    assert len(asked) == len(set(asked)) == 2 * SAMPLES, "nothing is asked twice"
    before = len(pretended.asked)
    row = run_against(pretended, tmp_path)["rows"][0]
    assert len(pretended.asked) == before + 1, "the probe alone"
    assert (row["dense"], row["pruned"]) == (1, 0.5)
    run_against(pretended, tmp_path, "--fresh")
    assert len(pretended.samples_asked(stream=False)) == 4 * SAMPLES


def test_a_server_is_started_and_waited_for(monkeypatch) -> None:
    from evals.lm import __main__ as program
    from evals.lm import backends

    args = make_parser().parse_args(["--backend", "api", "--port", str(free_port())])
    listen = f"import signal, socket; s = socket.create_server(('127.0.0.1', {args.port})); signal.pause()"
    monkeypatch.setattr(program, "vllm_program", lambda: sys.executable)
    monkeypatch.setattr(program, "serve_arguments", lambda *_, **__: ["-c", listen])
    monkeypatch.setattr(backends, "ApiBackend", lambda url, *_: url)
    with program.asked_backend(args, {}, 1, "") as url:
        assert url == f"http://127.0.0.1:{args.port}"
        socket.create_connection(("127.0.0.1", args.port)).close()


def test_another_package_is_refused(pretended: Pretended, tmp_path: Path) -> None:
    pretended.package = "0.32.0"
    with pytest.raises(ForkError, match="0.32.0, not the patched one"):
        run_against(pretended, tmp_path)
    assert not pretended.samples_asked(stream=False)


def test_another_profile_of_the_same_name_is_asked_anew(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    keys = []
    for text in ("{}", "{ }"):
        profile.write_text(text)
        keys.append(Variant("profile", "profile", {"uniprefill": 1}, {"profile": str(profile)}).key())
    assert keys[0] != keys[1]


def test_every_length_may_have_its_own_number_of_samples(pretended: Pretended, tmp_path: Path) -> None:
    result = run_against(pretended, tmp_path, "--lengths", "1024,2048", "--limit", "3,1", "--ttft-samples", "0")
    assert [(row["length"], row["samples"]) for row in result["rows"]] == [(1024, 3), (2048, 1)]
    with pytest.raises(ForkError, match="3 numbers for 2 lengths"):
        run_against(pretended, tmp_path, "--lengths", "1024,2048", "--limit", "3,1,1")


def test_a_task_in_other_words_is_refused(pretended: Pretended, tmp_path: Path) -> None:
    with pytest.raises(ForkError, match="unknown to the model's tokenizer"):
        run_against(pretended, tmp_path, "--tasks", "local_vt")


# --- the needle model itself ---


def test_the_needle_model_is_evaluated_also_after_a_kill(tmp_path: Path) -> None:
    """In process, two values of top_p, killed after a few answers and started again."""
    command = [sys.executable, "-m", "evals.lm", "--lengths", "2048", "--limit", "4", "--ttft-samples", "1"]
    command += ["--tasks", "needle_multikey,needle_multiquery", "--top-p", ".5,.99", "--batch-size", "2"]
    command += ["--results", str(tmp_path), "--records", str(tmp_path / "records")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "top_p 0.5: 2 of 4 answered" in line:
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail("".join(lines))
    [path] = (tmp_path / "records").iterdir()
    kept = path.read_text()
    kept = kept[: kept.rfind("\n") + 1]
    assert kept.count("\n") >= 6, "four dense answers and two pruned"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "needle_multikey at 2,048, dense: 4 of 4 answered before" in done.stderr
    assert path.read_text().startswith(kept)
    keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(set(keys)) == len(keys) == 2 * (3 * 4 + 1), "tasks x (ways x samples + timed)"
    result = json.loads((tmp_path / "lm-needle-cpu-curve.json").read_text())
    assert [row["setting"] for row in result["rows"]] == ["top_p 0.5", "top_p 0.99"] * 2
    for row in result["rows"]:
        assert row["dense"] >= 0.75, "the model no longer knows its task"
        assert row["pruned"] >= row["dense"] - 0.25
        assert 0 < row["kept"][-1] <= row["kept"][0] < 0.5
        assert row["ttft"]["ratio"] > 0 and row["not_pruned"] == {}
    assert (tmp_path / "lm-needle-cpu-curve.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "![accuracy and TTFT against what is computed](lm-needle-cpu-curve.png)"
        in (tmp_path / "lm-needle-cpu-curve.md").read_text()
    )


def test_the_samples_are_those_of_the_needle_prompts() -> None:
    [doc, *_] = documents("needle_multiquery", str(NEEDLE_MODEL), (LENGTH,), 1)
    prompt = make_prompt("multiquery", LENGTH - NEEDLE_ANSWER_TOKENS, seed=0)
    assert doc["input"] == prompt.text
    assert is_correct(prompt, doc["outputs"][0])


def test_backends_refuse_what_would_be_cut_off() -> None:
    """The harness cuts off the start of a long prompt and goes on."""
    from evals.lm.runner import RecordedLM

    lm = SimpleNamespace(tokenizer=SimpleNamespace(unk_token_id=None))
    backend = SimpleNamespace(encode=lambda prompt: list(range(len(prompt))), max_length=100, lm=lm)
    recorded = RecordedLM(backend, None, 1, "task at 128")
    with pytest.raises(ForkError, match="take 101 tokens, and the model runs with 100; shorten LENGTHS"):
        recorded._check(SimpleNamespace(args=("x" * 91, {"max_gen_toks": 10})))
    recorded._check(SimpleNamespace(args=("x" * 90, {"max_gen_toks": 10})))
