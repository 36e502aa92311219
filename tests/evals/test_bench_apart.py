"""The part apart without a server: the table and the plot, its link, and what is refused."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from evals.bench import apart, load, report
from evals.bench.arithmetic import spread
from evals.bench.load import DENSE, PRUNED
from evals.live_server import NEEDLE_MODEL, keep_to, own_cores
from scripts.fork import ForkError
from tests.evals.test_bench_load import MIX, made_row


def test_a_result_is_written_and_plotted(tmp_path: Path) -> None:
    rows = [made_row() | {"link": apart.ONE, "bytes": {way: spread([0.0]) for way in apart.WAYS}}]
    sent = {DENSE: spread([33e6, 34e6]), PRUNED: spread([9e6, 9e6])}
    rows.append(made_row() | {"link": "250mbit", "bytes": sent})
    machine = {"cpu": "A CPU", "cores": 2, "gpu": None, "device": "cpu"}
    names = ("package", "torch", "upstream", "upstream_commit", "series_sha256")
    result = {
        "provenance": dict.fromkeys(names, "0") | {"machine": machine},
        "settings": {
            "title": "Apart",
            "method": apart.method(MIX, NEEDLE_MODEL, "0.5", 2),
            "command": "x",
            "rounds": 2,
        },
        "load_average": 0.1,
        "apart": [row | {"ways": {way: row["ways"][way] for way in apart.WAYS}} for row in rows],
    }
    text = report.write(result, [apart.PART], tmp_path / "x")
    assert "| apart, 250mbit/s | pruned |" in text and "| 9.0 [9.0–9.0] |" in text and "| one server | dense |" in text
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_servers_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, parts in (({4, 5, 6, 9}, ([4, 5], [6, 9])), ({4}, ([4], [4]))):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: cores)
        assert (own_cores("kv_producer"), own_cores("kv_consumer")) == parts


def test_idle_servers_keep_to_their_cores_and_what_polls_gives_way() -> None:
    spin = "Thread(target=lambda: any(False for _ in iter(int, 1)), daemon=True).start()"
    code = f"from threading import Thread; {spin}; print(); input()"
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        keep_to([core], [psutil.Process(process.pid)])
        threads = [thread.id for thread in psutil.Process(process.pid).threads()]
        nice = {thread: os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}
        affinity = [os.sched_getaffinity(thread) for thread in threads]
        process.communicate(b"\n")
    assert nice.pop(process.pid) == 0 and [*nice.values()] == [19]
    assert affinity == [{core}] * 2


def test_the_machines_own_network_is_left_alone() -> None:
    with pytest.raises(ForkError, match="make bench-apart"):
        apart.main([])


@pytest.mark.parametrize("text", ["fast", "0mbit", "1gbit,", "250"])
def test_bad_links_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no rate of a link"):
        apart.links_argument(text)
    assert apart.links_argument("1gbit,40mbit") == ("1gbit", "40mbit")


def test_one_rate_is_asked_for() -> None:
    with pytest.raises(ForkError, match="one number of requests"):
        apart.main(["--rate", "0.5,1"])


def test_the_prefill_server_declines_the_short_prompts_alone() -> None:
    assert load.SHORT_TOKENS < apart.DECLINED < MIX.long_tokens
