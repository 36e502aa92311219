"""make serve and make demo: arguments, output, and nothing left running. The server is a stand-in."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest

from scripts import compile_cpu, demo, fork, serve


def value(arguments, option):
    return serve.given_options(arguments).get(option, "")


def test_any_model_gets_uniprefill_and_nothing_else():
    arguments = serve.serve_arguments("some/model", [], cpu=True, needle=False)
    assert arguments == ["serve", "some/model", "--uniprefill-config", '{"top_p": 0.99}']


def test_a_model_of_ours_is_served_with_its_profile_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(serve.models, "is_made", lambda model: model == "build/models/ours")
    monkeypatch.setattr(serve, "PROFILES", tmp_path)
    published = '{"top_p": 0.99}'

    def config(*given, model="build/models/ours"):
        return value(serve.serve_arguments(model, given, cpu=False, needle=False), "uniprefill-config")

    assert config() == published
    (tmp_path / "ours.json").touch()
    assert config() == json.dumps({"profile": str(tmp_path / "ours.json")})
    assert config("--uniprefill-config", "{}") == "{}"
    assert config(model="elsewhere/ours") == published


def test_the_needle_model_is_served_with_the_default_budget():
    arguments = serve.serve_arguments("m", [], cpu=True, needle=True)
    assert value(arguments, "served-model-name") == "needle"
    assert "max-num-batched-tokens" not in serve.given_options(arguments)


@pytest.mark.parametrize("given", [["--max-num-seqs", "2"], ["--max-num-seqs=2"], ["--max_num_seqs", "2"]])
def test_what_the_user_gives_is_not_set_again(given):
    arguments = serve.serve_arguments("m", given, cpu=False, needle=True)
    assert value(arguments, "max-num-seqs") == "2"
    assert sum(a.replace("_", "-").startswith("--max-num-seqs") for a in arguments) == 1
    assert "--kv-cache-memory-bytes" not in arguments


def test_a_cpu_without_avx512_multiplies_float32(monkeypatch):
    flags = compile_cpu.AVX2.needs
    monkeypatch.setattr(serve.compile_cpu, "cpu_flags", lambda text: flags)
    assert value(serve.serve_arguments("m", [], cpu=True, needle=True), "dtype") == "float32"
    assert value(serve.serve_arguments("m", ["--dtype", "bfloat16"], cpu=True, needle=True), "dtype") == "bfloat16"
    assert serve.fast_dtype(cpu=False) == "auto"
    flags = compile_cpu.AVX512.needs
    assert serve.fast_dtype(cpu=True) == "auto"


def test_the_default_model_is_ours_and_its_absence_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "NEEDLE_MODEL", tmp_path)
    assert serve.choose_model("x/y") == ("x/y", False)
    assert serve.choose_model(str(tmp_path)) == (str(tmp_path), True)
    with pytest.raises(fork.ForkError, match="MODEL=path-or-name"):
        serve.choose_model(None)
    (tmp_path / "config.json").touch()
    assert serve.choose_model(None) == (str(tmp_path), True)


def test_a_configuration_file_counts_as_given_but_less(tmp_path):
    """A default of ours on the command line would win over it."""
    file = tmp_path / "server.yaml"
    file.write_text("port: 9100\nmax_num_seqs: 2\nserved-model-name: [a, b]\nuniprefill-config: {top_p: 0.5}\n")
    given = serve.given_options(["--config", str(file), "--port=9200", "--uniprefill-config.top_p", "0.7"])
    assert (given["port"], given["max-num-seqs"], given["served-model-name"]) == ("9200", "2", "a")
    arguments = serve.serve_arguments("m", ["--config", str(file)], cpu=True, needle=True)
    assert not {"--max-num-seqs", "--uniprefill-config", "--served-model-name"} & set(arguments)
    assert "--max-model-len" in arguments
    assert serve.given_options(["--config", str(tmp_path / "none")]) == {"config": str(tmp_path / "none")}


@pytest.mark.parametrize(
    ("given", "url", "curl"),
    [
        ({}, "http://127.0.0.1:8000", "curl"),
        ({"port": "81", "host": "0.0.0.0"}, "http://127.0.0.1:81", "curl"),
        ({"port": "81", "host": "::"}, "http://[::1]:81", "curl"),
        ({"host": "192.0.2.7", "ssl-keyfile": "k", "ssl-certfile": "c"}, "https://192.0.2.7:8000", "curl -k"),
        ({"uds": "/tmp/a b"}, "http://localhost", "curl --unix-socket '/tmp/a b'"),
    ],
)
def test_an_address_is_reached_from_this_machine(given, url, curl):
    address = serve.Address.of(given)
    assert (address.url, address.curl) == (url, curl)


@pytest.mark.parametrize("port", ["x", "-1", "65536", ""])
def test_a_port_that_is_none_is_one_sentence(port):
    with pytest.raises(fork.ForkError, match="--port must be a number from 0 to 65535"):
        serve.Address.of({"port": port})


def test_a_taken_port_or_socket_is_one_sentence(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = serve.Address("127.0.0.1", other.getsockname()[1])
        with pytest.raises(fork.ForkError, match=f"port {address.port} .*Address already in use.*--port"):
            address.require_free()
        with pytest.raises(fork.ForkError, match=f"port {address.port} "):
            serve.Address("", address.port).require_free()
    serve.Address("127.0.0.1", 0).require_free()
    (tmp_path / "socket").touch()
    with pytest.raises(fork.ForkError, match="remove the file"):
        serve.Address(uds=str(tmp_path / "socket")).require_free()


@pytest.mark.parametrize(("needle", "cpu", "least"), [(True, False, 4096), (False, True, 1200), (False, False, 4096)])
def test_the_ready_line_has_a_request_long_enough_to_be_pruned(needle, cpu, least):
    """The shell runs it up to curl; a name with a quote and a space does not break it."""
    name = "needle" if needle else "it's a/model"
    text = serve.ready_text(serve.Address(port=81), name, needle, cpu)
    [line] = [line for line in text.splitlines() if "| curl" in line]
    command, curl = line.split(" | curl ")
    assert curl.startswith("http://127.0.0.1:81/v1/completions ") and curl.endswith("-d @-")
    body = json.loads(subprocess.run(command, shell=True, capture_output=True, check=True).stdout)
    assert (body["model"], body["vllm_xargs"]) == (name, {"uniprefill_report": 1})
    assert len(body["prompt"].split()) > least


REPORT = {
    "outcome": "pruned",
    "reason": None,
    "prompt_tokens": 1000,
    "steps": 3,
    "segments": [
        {"layers": [0, 2], "tokens_in": 1000, "tokens_out": 250},
        {"layers": [3, 7], "tokens_in": 250, "tokens_out": 250},
    ],
}


class Stub:
    """In the client's place: streams these events, or fails with this error."""

    def __init__(self, *events):
        self.completions, self.events = self, events

    def create(self, **request):
        self.request = request
        for event in self.events:
            if isinstance(event, Exception):
                raise event
            yield openai.types.Completion.construct(**event)

    def ask(self):
        return demo.ask(self, "m", demo.Question("prompt", "q", "v12"), pruned=True, max_tokens=4)


def choice(text, **more):
    return {"index": 0, "text": text, **more}


def test_a_stream_gives_text_time_and_report():
    last = {"choices": [choice("2", finish_reason="length", uniprefill=REPORT)]}
    stub = Stub({"choices": [choice("")]}, {"choices": [choice(" v1")]}, last, {"choices": []})
    reply = stub.ask()
    assert (reply.text, reply.report) == ("v12", REPORT) and reply.first_token > 0
    assert stub.request["extra_body"] == {"vllm_xargs": {"uniprefill": 1, "uniprefill_report": 1}}


def test_a_refusal_and_an_empty_stream_are_errors():
    with pytest.raises(fork.ForkError, match="refused the request: too long"):
        Stub(openai.APIError("too long", request=None, body=None)).ask()
    with pytest.raises(fork.ForkError, match="no token"):
        Stub({"choices": []}).ask()


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
    assert "tokens computed of 1,000, in 3 steps:" in text and "nothing was" not in text
    assert "make calibrate" not in text
    wrong = [demo.Reply("v13 .", 1.0, REPORT)]
    assert "make calibrate" in demo.summary(question, dense, wrong)
    assert "make calibrate" not in demo.summary(question, wrong, wrong)


def test_a_summary_of_nothing_pruned_says_why():
    """As the server reports it: with segments that hold every token."""
    whole = [{"layers": [0, 7], "tokens_in": 1000, "tokens_out": 1000}]

    def told(**report):
        replies = [demo.Reply("v12", 1.0, {"prompt_tokens": 1000, "steps": 1, "segments": whole} | report)]
        return demo.summary(demo.Question("p", "q", "v12"), replies, replies)

    assert "nothing was pruned: prompt_exceeds_pool (raise pool_tokens" in told(
        outcome="dense", reason="prompt_exceeds_pool"
    )
    assert "nothing was pruned: prompt_logprobs\n" in told(outcome="dense", reason="prompt_logprobs")
    assert "nothing was dropped: every block was needed" in told(outcome="pruned", reason=None)
    no_report = [demo.Reply("v12", 1.0, None)]
    assert "nothing was pruned: no report" in demo.summary(demo.Question("p", "q", "v12"), no_report, no_report)


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


def wait_for(condition) -> None:
    while not condition():
        time.sleep(0.05)


def wait_for_pids(path: Path) -> list[int]:
    wait_for(lambda: path.is_file() and len(path.read_text().split()) == 2)
    return [int(pid) for pid in path.read_text().split()]


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


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
        serve.wait_until_ready(process, serve.Address(port=9))


# binds at once and listens when told to, as vLLM does when its engine runs; its child listens for itself
LISTENER = """
import os, socket, sys, time
if os.fork() == 0:
    child = socket.create_server(("127.0.0.1", 0))
    time.sleep(600)
uds, port_file, start_file = sys.argv[1:]
listener = socket.socket(socket.AF_UNIX if uds else socket.AF_INET)
listener.bind(uds or ("127.0.0.1", 0))
open(port_file + ".part", "w").write("0" if uds else str(listener.getsockname()[1]))
os.rename(port_file + ".part", port_file)
while not os.path.exists(start_file): time.sleep(.05)
listener.listen()
time.sleep(600)
"""


@pytest.mark.parametrize("by", ["port", "any port", "socket"])
def test_only_the_server_that_was_started_is_ready(tmp_path, monkeypatch, by):
    """Not another one that listens where the user asked, nor one that has only bound its socket."""
    monkeypatch.setattr(serve.stop_session, "__defaults__", ((0.5, 0.5),))
    uds, port_file, start = str(tmp_path / "uds") if by == "socket" else "", tmp_path / "port", tmp_path / "start"
    command = [sys.executable, "-c", LISTENER, uds, str(port_file), str(start)]
    with socket.create_server(("127.0.0.1", 0)) as other, serve.server(command) as process:
        wait_for(port_file.exists)
        port = int(port_file.read_text())
        address = serve.Address("127.0.0.1", port if by == "port" else 0, uds=uds)
        assert serve.listening(process, serve.Address("127.0.0.1", other.getsockname()[1])) is None
        assert serve.listening(process, address) is None
        start.touch()
        assert serve.wait_until_ready(process, address) == serve.Address("127.0.0.1", port, uds=uds)
