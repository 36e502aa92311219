"""Build the container image with docker, podman or buildah, and tag it uniprefill-vllm:VERSION-DEVICE and :DEVICE.

The package index that pip uses here, with its login and certificates, reaches the build as secrets:
no layer of the image has them. What follows `--` goes to the engine's `build` as it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from scripts import package_index
from scripts.build import choose_device, has_nvidia_gpu
from scripts.fork import ROOT, ForkError, Layout, read_upstream, read_version, run_main, say, series_sha256

NAME = "uniprefill-vllm"
ENGINES = ("docker", "podman", "buildah")
DOCKERFILE = "scripts/docker/Dockerfile"
CONTEXT = ("Makefile", "UPSTREAM", "VERSION", "patches", "scripts", ".dockerignore")
# pip's settings that say where packages come from
INDEX_SETTINGS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "timeout")
CA = "/run/secrets/ca"


def revision(root: Path = ROOT) -> str:
    """Our commit, "-dirty" appended where the image's inputs differ from it; "unknown" outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--", *CONTEXT) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def build_arguments(layout: Layout) -> dict[str, str]:
    """The Dockerfile's arguments: what the labels say."""
    upstream, version = read_upstream(layout.root / "UPSTREAM"), read_version(layout.root / "VERSION")
    return {
        "VERSION": f"{version.upstream}-{version.revision}",
        "REVISION": revision(layout.root),
        "UPSTREAM_TAG": upstream.tag,
        "UPSTREAM_COMMIT": upstream.commit,
        "SERIES_SHA256": series_sha256(layout),
    }


def write_secrets(config: dict[str, str], folder: Path) -> dict[str, Path]:
    """Secret id -> file: pip's settings as a pip.conf, and its certificates where it names some."""
    lines, secrets = ["[global]"], {}
    settings = dict(config)
    settings.setdefault("timeout", config.get("default-timeout", ""))
    for name in INDEX_SETTINGS:
        if value := " ".join(settings.get(name, "").split()):
            lines.append(f"{name} = {value}")
    if config.get("cert"):
        secrets["ca"] = Path(config["cert"])
        lines.append(f"cert = {CA}")
    secrets["pip.conf"] = folder / "pip.conf"
    secrets["pip.conf"].touch(mode=0o600)
    secrets["pip.conf"].write_text("\n".join(lines) + "\n")
    return secrets


def find_engine() -> str:
    """The first of docker, podman and buildah that answers."""
    problems = []
    for name in ENGINES:
        path = shutil.which(name)
        if not path:
            problems.append(f"{name} is not installed")
            continue
        done = subprocess.run([path, "info"], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return path
        problems.append(f"{name} does not answer ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})")
    raise ForkError(f"No container engine: {'; '.join(problems)}; install or start {' or '.join(ENGINES)}.")


def build_command(
    engine: str, device: str, arguments: dict[str, str], secrets: dict[str, Path], extra: Sequence[str]
) -> list[str]:
    command = [engine, "build", "--file", DOCKERFILE, "--target", device]
    if Path(engine).name != "docker":
        command += ["--format", "docker"]  # their own format has no health check
    for tag in (f"{arguments['VERSION']}-{device}", device):
        command += ["--tag", f"{NAME}:{tag}"]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    for name, path in secrets.items():
        command += ["--secret", f"id={name},src={path}"]
    return [*command, *extra, "."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="", help="cpu or cuda; default: cuda where there is a GPU")
    parser.add_argument("extra", nargs="*", metavar="-- ARGUMENT", help="passed on to docker build")
    args = parser.parse_args()
    device, engine, arguments = choose_device(args.device, has_nvidia_gpu()), find_engine(), build_arguments(Layout())
    with tempfile.TemporaryDirectory() as folder:
        secrets = write_secrets(package_index.pip_config(), Path(folder))
        command = build_command(engine, device, arguments, secrets, args.extra)
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    if done.returncode:
        raise ForkError(f"{Path(engine).name} build failed with status {done.returncode}; its last lines say why.")
    say(f"done: {NAME}:{arguments['VERSION']}-{device}, also {NAME}:{device}")
    return 0


if __name__ == "__main__":
    run_main(main)
