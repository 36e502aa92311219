"""The CPU image without a container engine: the Dockerfile's steps in a clean root, and what it then serves.

Needs root and debootstrap, and takes a quarter of an hour, so it runs when asked for:
build/venv/bin/python -m pytest -m long tests/image
"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import dashboard
import pytest
from clean_root import CleanRoot
from dockerfile import Walk

from evals.needle.prompts import is_correct, make_prompt
from scripts import build_image, fork, package_index

ROOT = fork.ROOT
FOLDER = ROOT / "build" / "image"
TOOLS = ("debootstrap", "setpriv", "unshare", "nsenter")
NEEDLE = {str(ROOT / "evals" / "needle"): "/models"}
ARGUMENTS = ["/models/model", "--served-model-name", "needle", "--max-model-len", "8192"]
ARGUMENTS += ["--max-num-batched-tokens", "8448", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "256M"]
ARGUMENTS += ["--enforce-eager"]
READY_SECONDS = 400

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.getuid() != 0, reason="chroot and namespaces need root"),
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}"),
]


def local_folders(config):
    """The folders of this machine in which pip looks for packages."""
    found = set()
    for name in ("index-url", "extra-index-url", "find-links"):
        for word in config.get(name, "").split():
            parts = urllib.parse.urlsplit(word)
            if parts.scheme in ("", "file"):
                # an index page's links may lead beside its folder
                found.add(parts.path if name == "find-links" else str(Path(parts.path).parent))
    return sorted(found)


@pytest.fixture(scope="module")
def engine():
    work = FOLDER / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    config = package_index.pip_config()
    secrets = build_image.write_secrets(config, work)
    yield CleanRoot(work, FOLDER / "cache", ROOT, secrets, local_folders(config), work / "log")
    shutil.rmtree(work)


@pytest.fixture(scope="module")
def image(engine):
    """(root folder, config) of the cpu target."""
    (FOLDER / "cache").mkdir(exist_ok=True)
    text = (ROOT / build_image.DOCKERFILE).read_text()
    return Walk(text, build_image.build_arguments(fork.Layout()), engine).build("cpu")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(container, log):
    deadline = time.monotonic() + READY_SECONDS
    while not container.is_healthy():
        assert container.process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(2)


@pytest.fixture(scope="module")
def served(engine, image, tmp_path_factory):
    """(address, container, log, whether the health check failed before the server was ready)."""
    root, config = image
    log, port = tmp_path_factory.mktemp("container") / "log", free_port()
    with engine.container(root, config, [*ARGUMENTS, "--port", str(port)], {"OMP_NUM_THREADS": "1"}, NEEDLE, log) as it:
        time.sleep(1)
        unhealthy = not it.is_healthy()
        wait_until_healthy(it, log)
        yield f"http://127.0.0.1:{port}", it, log, unhealthy


def complete(url, prompt, **xargs):
    body = {"model": "needle", "prompt": prompt.text, "max_tokens": 4, "temperature": 0}
    body["vllm_xargs"] = {"uniprefill_report": 1, **xargs}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def inside(container, code):
    done = container.execute(["python3", "-c", code], 60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_image_has_nothing_of_the_build(image):
    root, _ = image
    assert not (root / "src").exists() and not (root / "etc/pip.conf").exists()
    assert not list((root / "run").glob("secrets/*")) and not (root / "root/.cache").exists()
    assert not list((root / "var/lib/apt/lists").glob("*_Packages"))
    site = next((root / "opt/vllm/lib").glob("python3*/site-packages"))
    names = {path.name.split("-")[0].lower() for path in site.glob("*.dist-info")}
    assert "vllm" in names and not names & {"pytest", "hypothesis", "lm_eval", "schemathesis", "ruff"}
    assert list(site.glob("vllm/_C*.so"))


def test_the_labels_say_what_is_installed(image):
    root, config = image
    (path,) = root.glob("opt/vllm/lib/python3*/site-packages/vllm-*.dist-info/uniprefill.json")
    found = json.loads(path.read_text())
    assert found["device"] == "cpu" and found["edited"] == []
    assert config.labels["org.opencontainers.image.version"] == found["version"]
    assert config.labels["uniprefill.series-sha256"] == found["series_sha256"]
    assert config.labels["uniprefill.upstream-tag"] == found["upstream"]["tag"]
    assert config.labels["uniprefill.upstream-commit"] == found["upstream"]["commit"]


def test_the_health_check_passes_when_the_server_is_ready(served):
    url, container, _, unhealthy = served
    assert unhealthy and container.is_healthy()
    assert urllib.request.urlopen(f"{url}/health", timeout=10).status == 200


def test_process_1_is_the_server_and_no_root(served):
    _, container, _, _ = served
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["2000"] * 4 and status["Gid"].split() == ["0"] * 4
    words = Path(f"/proc/{container.pid}/cmdline").read_text().split("\0")
    assert words[1:3] == ["/opt/vllm/bin/vllm", "serve"] and words[-3:-1] == ["--uniprefill-config", '{"top_p": 0.99}']
    code = "import os; print(os.getuid(), os.getpid() != 1, os.getcwd(), os.environ['HOME'], os.path.exists('/work'))"
    assert inside(container, code) == "2000 True /home/vllm /home/vllm False"
    assert (
        inside(container, "import os; print(os.access('/opt/vllm', os.W_OK), os.access('.cache', os.W_OK))")
        == "False True"
    )


def test_a_long_prompt_is_pruned_and_answered(served):
    url, _, log, _ = served
    prompt = make_prompt("multikey", 4096, seed=1)
    response = complete(url, prompt)
    assert is_correct(prompt, response["choices"][0]["text"]), log.read_text()[-2000:]
    report = response["choices"][0]["uniprefill"]
    assert report["outcome"] == "pruned" and report["prompt_tokens"] == 4096
    assert report["segments"][-1]["tokens_kept"] < 4096 / 4


def test_every_query_of_the_dashboard_has_an_answer(served, tmp_path):
    """A real Prometheus scrapes the container with our settings, and is asked what the dashboard asks."""
    program = shutil.which("prometheus")
    if not program:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    url, port = served[0], free_port()
    settings = (ROOT / "scripts/docker/prometheus.yml").read_text()
    assert settings.count("vllm:8000") == settings.count("15s") == 1
    settings = settings.replace("vllm:8000", url.removeprefix("http://")).replace("15s", "1s")
    (tmp_path / "prometheus.yml").write_text(settings)
    command = [program, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        # a counter must be seen before it rises, so the first requests come before the scrapes that count
        for seed in range(6):
            prompt = make_prompt("multikey", 2048, seed=seed)
            complete(url, prompt)
            complete(url, prompt, uniprefill=0)
            complete(url, make_prompt("single", 512, seed=seed))
            time.sleep(1.5)
        time.sleep(2)
        known, empty = dashboard.registered(), []
        for title, query in dashboard.queries(interval="1m").items():
            if dashboard.series_and_labels(query)[0] <= known.keys():
                address = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
                with urllib.request.urlopen(address, timeout=30) as reply:
                    result = json.load(reply)["data"]["result"]
                if not any(math.isfinite(float(sample["value"][1])) for sample in result):
                    empty.append((title, query, result))
        assert not empty, empty
    finally:
        process.terminate()
        process.wait(30)


def test_it_stops_when_it_is_asked_to(served):
    _, container, log, _ = served
    assert container.stop(60) == 0, log.read_text()[-3000:]


def test_an_operators_own_setting_wins(engine, image, tmp_path):
    root, config = image
    log, port = tmp_path / "log", free_port()
    own = ["--uniprefill-config", '{"top_p": 0.9, "enabled": false}', "--port", str(port)]
    with engine.container(root, config, [*ARGUMENTS, *own], {"OMP_NUM_THREADS": "1"}, NEEDLE, log) as container:
        wait_until_healthy(container, log)
        prompt = make_prompt("multikey", 2048, seed=1)
        response = complete(f"http://127.0.0.1:{port}", prompt)
    assert is_correct(prompt, response["choices"][0]["text"])
    report = response["choices"][0]["uniprefill"]
    assert (report["outcome"], report["reason"]) == ("dense", "disabled")
