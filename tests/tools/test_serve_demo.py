"""make serve and make demo: arguments, output, and nothing left running. The server is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import demo, fork, serve


def value(arguments, option):
    return serve.option_value(arguments, option, "")


def test_any_model_gets_uniprefill_and_nothing_else():
    arguments = serve.serve_arguments("some/model", [], cpu=True, needle=False)
    assert arguments == ["serve", "some/model", "--uniprefill-config", '{"top_p": 0.99}']


def test_the_needle_model_gets_a_budget_for_a_whole_prompt():
    arguments = serve.serve_arguments("m", [], cpu=True, needle=True)
    budget, length, seqs = (
        int(value(arguments, o)) for o in ("--max-num-batched-tokens", "--max-model-len", "--max-num-seqs")
    )
    assert budget >= length + seqs
    assert value(arguments, "--served-model-name") == "needle"


@pytest.mark.parametrize("given", [["--max-num-seqs", "2"], ["--max-num-seqs=2"], ["--max_num_seqs", "2"]])
def test_what_the_user_gives_is_not_set_again(given):
    arguments = serve.serve_arguments("m", given, cpu=False, needle=True)
    assert value(arguments, "--max-num-seqs") == "2"
    assert sum(a.replace("_", "-").startswith("--max-num-seqs") for a in arguments) == 1
    assert "--kv-cache-memory-bytes" not in arguments


def test_the_default_model_is_ours_and_its_absence_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "NEEDLE_MODEL", tmp_path)
    assert serve.choose_model("x/y") == ("x/y", False)
    assert serve.choose_model(str(tmp_path)) == (str(tmp_path), True)
    with pytest.raises(fork.ForkError, match="MODEL=path-or-name"):
        serve.choose_model(None)
    (tmp_path / "config.json").touch()
    assert serve.choose_model(None) == (str(tmp_path), True)


def test_the_ready_line_says_how_to_send_a_request():
    text = serve.ready_text(serve.base_url(["--port", "81", "--host=0.0.0.0"]), "needle")
    assert "curl http://127.0.0.1:81/v1/completions" in text and '"model": "needle"' in text
    assert '"uniprefill": 1' in text


REPORT = {
    "outcome": "pruned",
    "reason": None,
    "prompt_tokens": 1000,
    "segments": [
        {"layers": [0, 2], "tokens_in": 1000, "tokens_kept": 250},
        {"layers": [3, 7], "tokens_in": 250, "tokens_kept": 250},
    ],
}


def stream(*chunks):
    return [f"data: {chunk}\n".encode() for chunk in chunks] + [b"\n", b"data: [DONE]\n"]


def test_a_stream_gives_text_time_and_report():
    lines = stream(
        '{"choices": [{"text": ""}]}',
        '{"choices": [{"text": " v1"}]}',
        json.dumps({"choices": [{"text": "2", "finish_reason": "length", "uniprefill": REPORT}]}),
        '{"choices": [], "usage": {}}',
    )
    ticks = iter([12.5, 99.0])
    reply = demo.read_stream(lines, 10.0, lambda: next(ticks))
    assert (reply.text, reply.first_token, reply.report) == ("v12", 2.5, REPORT)


def test_a_refusal_and_an_empty_stream_are_errors():
    with pytest.raises(fork.ForkError, match="refused the request: too long"):
        demo.read_stream(stream('{"error": {"message": "too long"}}'), 0)
    with pytest.raises(fork.ForkError, match="no token"):
        demo.read_stream(stream('{"choices": []}'), 0)


def test_the_bars_show_what_each_segment_computed():
    rows = demo.bar_table(REPORT).splitlines()
    assert rows[0].count("█") == 40 and rows[0].endswith("1,000 tokens 100.0%")
    assert rows[1].count("█") == 10 and rows[1].count("·") == 30
    assert rows[1].startswith("  layers   3-7") and rows[1].endswith("250 tokens  25.0%")


def test_the_summary_compares_medians():
    question = demo.Question("p", "what is k1 ?", "v12")
    dense = [demo.Reply("v12 .", t, None) for t in (6.0, 8.0, 100.0)]
    pruned = [demo.Reply("v12 .", t, REPORT) for t in (2.0, 4.0, 5.0)]
    text = demo.summary(question, dense, pruned)
    assert "what is k1 ?" in text and text.count("v12") == 3
    assert "median of 6.00, 8.00, 100.00" in text and "ratio     2.00 x" in text
    unpruned = [demo.Reply("v12", 1.0, {"outcome": "dense", "reason": "too short", "segments": []})]
    assert "nothing was pruned: too short" in demo.summary(question, dense, unpruned)


def test_prompts_hide_the_answer_once():
    for question in (demo.needle_question(2048, 1), demo.prose_question(800, 1)):
        assert question.prompt.count(question.answer) == 1
        assert question.prompt.rstrip().endswith(question.question.split("?")[-1].strip())


# a server that ignores requests to stop, and so does its child in a process group of its own
STUBBORN = """
import os, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
open(sys.argv[1], "w").write(f"{os.getpid()} {child.pid}")
time.sleep(600)
"""


def wait_for_pids(path: Path) -> list[int]:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if path.is_file() and len(path.read_text().split()) == 2:
            return [int(pid) for pid in path.read_text().split()]
        time.sleep(0.05)
    raise AssertionError("the stand-in did not start")


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nothing_is_left_of_a_stubborn_server(tmp_path, monkeypatch):
    monkeypatch.setattr(serve.stop_session, "__defaults__", ((0.5, 0.5),))
    pids_file = tmp_path / "pids"
    with pytest.raises(RuntimeError), serve.server([sys.executable, "-c", STUBBORN, str(pids_file)]):
        pids = wait_for_pids(pids_file)
        assert all(running(pid) for pid in pids)
        raise RuntimeError
    assert not any(running(pid) for pid in pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("background", [False, True])
def test_an_interrupted_program_stops_its_server(tmp_path, number, background):
    program = tmp_path / "program.py"
    pids_file = tmp_path / "pids"
    program.write_text(
        f"""
import sys, time
sys.path.insert(0, {str(fork.ROOT)!r})
from scripts import fork, serve
serve.stop_session.__defaults__ = ((.5, .5),)
def main():
    with serve.server([sys.executable, "-c", {STUBBORN!r}, {str(pids_file)!r}]):
        time.sleep(600)
fork.run_main(main)
"""
    )

    def as_a_shell_does() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN if background else signal.SIG_DFL)

    process = subprocess.Popen([sys.executable, program], stderr=subprocess.PIPE, text=True, preexec_fn=as_a_shell_does)
    pids = wait_for_pids(pids_file)
    os.kill(process.pid, number)
    assert process.wait(30) == 130
    assert "interrupted" in process.stderr.read()
    assert not any(running(pid) for pid in pids)


def test_a_server_that_ends_early_is_an_error():
    with (
        serve.server([sys.executable, "-c", "raise SystemExit(3)"]) as process,
        pytest.raises(fork.ForkError, match="ended with status 3"),
    ):
        serve.wait_until_ready(process, "http://127.0.0.1:9", 30)
