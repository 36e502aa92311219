"""The CPU image, built with buildah and served from in a chroot: no container engine's daemon or registry.

Needs root, buildah and mmdebstrap, and takes a quarter of an hour, so it runs when asked for:
build/venv/bin/python -m pytest -m long tests/image/test_image.py
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import dashboard
import pytest

from evals.live_server import free_port
from evals.needle.prompts import is_correct, make_prompt
from scripts import build_image, fork, package_index

ROOT = fork.ROOT
FOLDER = ROOT / "build" / "image"
TOOLS = ("buildah", "mmdebstrap", "setpriv", "unshare", "nsenter")
ARGUMENTS = ["/models/model", "--served-model-name", "needle", "--max-model-len", "8192"]
ARGUMENTS += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", "256M"]
ARGUMENTS += ["--enforce-eager"]
READY_SECONDS = 400
ANSWER_SECONDS = 300
# what debian:bookworm-slim leaves out of its packages
SLIM = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")]
# the mounts of a container; then process 1, which ends with what started it
ENTER = """
root=$1; shift
for path in /dev /sys /etc/hosts /etc/resolv.conf; do mount --rbind $path $root$path; done
exec chroot $root setpriv --reuid 2000 --regid 0 --clear-groups --pdeathsig KILL env --ignore-environment "$@"
"""

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
def buildah():
    """Runs buildah on a store of its own, and returns what it prints."""
    work = FOLDER / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    store = f'driver = "vfs"\ngraphroot = "{work}/images"\nrunroot = "{work}/run"\n'
    (work / "storage.conf").write_text(f"[storage]\n{store}")
    environment = os.environ | {"CONTAINERS_STORAGE_CONF": f"{work}/storage.conf", "BUILDAH_ISOLATION": "chroot"}

    def run(*words):
        done = subprocess.run(["buildah", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert done.returncode == 0, f"buildah {words[0]}: {done.stdout[-3000:]}"
        return done.stdout.strip()

    yield run
    shutil.rmtree(work)


def root_of(buildah, image):
    """A container's root folder, made from the image."""
    return Path(buildah("mount", buildah("from", "--pull-never", image)))


@pytest.fixture(scope="module")
def image(buildah):
    """(root folder, config) of the cpu target, and the needle model in /models."""
    debian = FOLDER / "work" / "debian.tar"
    subprocess.run(["mmdebstrap", "--variant=minbase", *SLIM, "bookworm", debian], check=True)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, debian, "/")
    buildah("commit", "--quiet", "--rm", container, "docker.io/library/debian:bookworm-slim")
    config = package_index.pip_config()
    secrets = build_image.write_secrets(config, FOLDER / "work")
    volumes = [f"--volume={folder}:{folder}:ro" for folder in local_folders(config)]
    arguments = build_image.build_arguments(fork.Layout())
    buildah(*build_image.build_command("buildah", "cpu", arguments, secrets, volumes)[1:])
    name = f"localhost/{build_image.NAME}:cpu"
    root = root_of(buildah, name)
    shutil.copytree(ROOT / "evals" / "needle" / "model", root / "models" / "model")
    return root, json.loads(buildah("inspect", "--type", "image", name))["Docker"]["config"]


class Container:
    """The image's entrypoint as process 1 of its own PID namespace."""

    def __init__(self, image, arguments, log):
        root, config = image
        self.environment = [*config["Env"], "OMP_NUM_THREADS=1"]
        self.health = config["Healthcheck"]["Test"][1:]
        for name in ("hosts", "resolv.conf"):
            (root / "etc" / name).touch()
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        command += [f"--mount-proc={root}/proc", "sh", "-euc", ENTER, "sh", root]
        command += [f"--chdir={config['WorkingDir']}", *self.environment, *config["Entrypoint"], *arguments]
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    @property
    def pid(self):
        """Process 1's number outside; None before it starts and after it ended."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def execute(self, *words):
        """A command beside process 1: same namespaces, root, folder, user and environment."""
        into = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd", "--setuid=2000"]
        into += ["--setgid=0", "env", "--ignore-environment", *self.environment, *words]
        return subprocess.run(into, capture_output=True, text=True, timeout=60)

    def is_healthy(self):
        return self.pid is not None and self.execute(*self.health).returncode == 0

    def wait_until_healthy(self):
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_healthy():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(2)


@contextmanager
def container(image, arguments, log):
    it = Container(image, arguments, log)
    try:
        yield it
    finally:
        it.process.kill()  # process 1 dies with it, and with that the whole PID namespace
        it.process.wait()


@pytest.fixture(scope="module")
def served(image, tmp_path_factory):
    """(address, container) of a server that is ready."""
    port = free_port()
    with container(image, [*ARGUMENTS, "--port", str(port)], tmp_path_factory.mktemp("container") / "log") as it:
        it.wait_until_healthy()
        yield f"http://127.0.0.1:{port}", it


def complete(url, prompt, **xargs):
    body = {"model": "needle", "prompt": prompt.text, "max_tokens": 4, "temperature": 0}
    body["vllm_xargs"] = {"uniprefill_report": 1, **xargs}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def inside(container, code):
    done = container.execute("python3", "-c", code)
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
    assert config["Labels"]["org.opencontainers.image.version"] == found["version"]
    assert config["Labels"]["uniprefill.series-sha256"] == found["series_sha256"]
    assert config["Labels"]["uniprefill.upstream-tag"] == found["upstream"]["tag"]
    assert config["Labels"]["uniprefill.upstream-commit"] == found["upstream"]["commit"]


def test_the_health_check_passes_when_the_server_is_ready(served):
    url, container = served
    assert container.is_healthy()
    assert urllib.request.urlopen(f"{url}/health", timeout=10).status == 200


def test_process_1_is_the_server_and_no_root(served):
    _, container = served
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == ["2000"] * 4 and status["Gid"].split() == ["0"] * 4
    words = Path(f"/proc/{container.pid}/cmdline").read_text().split("\0")
    assert words[1:3] == ["/opt/vllm/bin/vllm", "serve"] and words[-3:-1] == ["--uniprefill-config", '{"top_p": 0.99}']
    code = "import os; print(os.getuid(), os.getpid() != 1, os.getcwd(), os.environ['HOME'])"
    assert inside(container, code) == "2000 True /home/vllm /home/vllm"
    code = f"import os; print(os.path.exists({str(ROOT)!r}), *(os.access(p, os.W_OK) for p in ('/opt/vllm', '.cache')))"
    assert inside(container, code) == "False False True"


def test_a_long_prompt_is_pruned_and_answered(served):
    url, container = served
    prompt = make_prompt("multikey", 4096, seed=1)
    response = complete(url, prompt)
    assert is_correct(prompt, response["choices"][0]["text"]), container.log.read_text()[-2000:]
    report = response["choices"][0]["uniprefill"]
    assert report["outcome"] == "pruned" and report["prompt_tokens"] == 4096
    assert report["segments"][-1]["tokens_out"] < 4096 / 4


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

    def ask(query):
        address = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(address, timeout=30) as reply:
            return [float(sample["value"][1]) for sample in json.load(reply)["data"]["result"]]

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + ANSWER_SECONDS
        unanswered = dashboard.queries(interval="1m")
        for seed in itertools.count():  # a rate needs two scrapes, and traffic between them
            prompt = make_prompt("multikey", 2048, seed=seed)
            complete(url, prompt)
            complete(url, prompt, uniprefill=0)
            complete(url, make_prompt("single", 512, seed=seed))
            with suppress(urllib.error.URLError):  # Prometheus may still be starting
                unanswered = {t: q for t, q in unanswered.items() if not any(map(math.isfinite, ask(q)))}
            if not unanswered:
                break
            assert time.monotonic() < deadline, (unanswered, (tmp_path / "log").read_text()[-2000:])
    finally:
        process.terminate()
        process.wait(30)


def test_it_stops_when_it_is_asked_to(served):
    _, container = served
    os.kill(container.pid, signal.SIGTERM)
    assert container.process.wait(60) == 0, container.log.read_text()[-3000:]


def test_an_operators_own_setting_wins(image, tmp_path):
    port = free_port()
    own = ["--uniprefill-config", '{"top_p": 0.9, "enabled": false}', "--port", str(port)]
    with container(image, [*ARGUMENTS, *own], tmp_path / "log") as it:
        it.wait_until_healthy()
        prompt = make_prompt("multikey", 2048, seed=1)
        response = complete(f"http://127.0.0.1:{port}", prompt)
    assert is_correct(prompt, response["choices"][0]["text"])
    report = response["choices"][0]["uniprefill"]
    assert (report["outcome"], report["reason"]) == ("dense", "disabled")
