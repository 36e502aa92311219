"""An engine for dockerfile.Walk without a container engine: each stage is a folder, each step a chroot.

Base images of Debian are made with debootstrap. Needs root, for chroot and namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dockerfile import Config, DockerfileError, Ignore

ENTER = Path(__file__).with_name("enter.py")
# what debian:*-slim leaves out of its packages
SLIM = """\
path-exclude /usr/share/doc/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
path-exclude /usr/share/man/*
path-include /usr/share/doc/*/copyright
"""


class Failed(Exception):
    """A step ended with a status other than 0; the text is the end of what it printed."""


def apt_settings() -> dict[str, str]:
    """Where this machine's apt gets Debian's packages from: file in the root -> content."""
    files = {}
    for path in (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list")):
        if path.is_file():
            files[str(path)] = path.read_text()
            break
    dump = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True).stdout
    proxies = [line for line in dump.splitlines() if "::Proxy" in line]
    return files | {"/etc/apt/apt.conf.d/90acquire": "\n".join(proxies) + "\n"}


def inside(root: Path, path: str) -> Path:
    """A path of the image in our file system; the image's own links do not lead out of the root."""
    found = root
    for part in Path(path).parts[1:]:
        found = found / part
        if found.is_symlink():
            link = os.readlink(found)
            found = inside(root, link if link.startswith("/") else "/" + str(found.parent.relative_to(root) / link))
    return found


class CleanRoot:
    """The engine. `work` holds the stages' folders; `cache` (kept between builds) base images and cache mounts."""

    def __init__(
        self, work: Path, cache: Path, context: Path, secrets: dict[str, Path], volumes: list[str], log: Path
    ) -> None:
        self.work, self.cache, self.context, self.secrets, self.volumes = work, cache, context, secrets, volumes
        self.log = log
        self.count = 0

    def say(self, text: str) -> None:
        with self.log.open("a") as out:
            print(text, file=out)

    def fresh(self) -> Path:
        self.count += 1
        return self.work / f"stage{self.count}"

    def base(self, name: str) -> Path:
        """FROM an image of Debian, as debootstrap makes it."""
        image, _, tag = name.partition(":")
        if image != "debian" or not tag.endswith("-slim"):
            raise DockerfileError(f"FROM {name}: only debian:…-slim can be made here")
        suite = tag.removesuffix("-slim")
        made = self.cache / f"debian-{suite}"
        if not (made / "complete").is_file():
            self.say(f"debootstrap {suite}")
            shutil.rmtree(made, ignore_errors=True)
            self.call(["debootstrap", "--variant=minbase", suite, str(made / "root")])
            for path, text in apt_settings().items():
                inside(made / "root", path).write_text(text)
            (made / "root/etc/dpkg/dpkg.cfg.d/slim").write_text(SLIM)
            (made / "complete").touch()
        return self.copy_of(made / "root")

    def copy_of(self, image: Path) -> Path:
        target = self.fresh()
        self.call(["cp", "--archive", "--reflink=auto", str(image), str(target)])
        return target

    def call(self, command: list[str]) -> None:
        with self.log.open("ab") as out:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        if done.returncode:
            raise Failed(f"{' '.join(command)}: status {done.returncode}\n{self.log.read_text()[-3000:]}")

    def user(self, image: Path, user: str) -> tuple[int, int, str]:
        """uid, gid and home folder of a USER instruction's text, as the image's passwd has them."""
        name, _, group = user.partition(":")
        name = "0" if name == "root" else name
        for line in (image / "etc/passwd").read_text().splitlines():
            fields = line.split(":")
            if name in (fields[0], fields[2]):
                return int(fields[2]), int(group or fields[3]), fields[5]
        if not name.isdigit():
            raise DockerfileError(f"USER {user}: no such user in the image")
        return int(name), int(group or 0), "/"

    def spec(self, image: Path, words: list[str], config: Config, env: dict[str, str], mounts: list) -> list[str]:
        """The command that runs `words` in the image, in namespaces of its own."""
        uid, gid, home = self.user(image, config.user)
        network = [[path, path, True] for path in ("/etc/resolv.conf", "/etc/hosts")]
        volumes = [[path, path, True] for path in self.volumes]
        spec = {
            "root": str(image),
            "mounts": [*network, *volumes, *mounts],
            "env": {"HOME": home} | env,
            "cwd": config.workdir,
            "uid": uid,
            "gid": gid,
            "words": words,
        }
        handle, path = tempfile.mkstemp(dir=self.work, suffix=".json")
        with os.fdopen(handle, "w") as out:
            json.dump(spec, out)
        # whatever ends this process ends the command too
        namespaces = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
        ]
        return [*namespaces, sys.executable, str(ENTER), path]

    def run(self, image: Path, words: list[str], config: Config, env: dict[str, str], mounts: list[dict]) -> None:
        self.say(f"RUN {words[-1]}")
        made = []
        for mount in mounts:
            match mount["type"]:
                case "secret":
                    if mount["id"] in self.secrets:
                        made.append([str(self.secrets[mount["id"]]), mount["target"], True])
                case "cache":
                    folder = self.cache / "mounts" / mount["target"].strip("/").replace("/", "-")
                    folder.mkdir(parents=True, exist_ok=True)
                    made.append([str(folder), mount["target"], False])
                case "bind":
                    made.append([str(inside(mount["origin"], mount["source"])), mount["target"], True])
                case other:
                    raise DockerfileError(f"RUN --mount=type={other} is not known here")
        before = {target: inside(image, target).exists() for _, target, _ in made}
        self.call(self.spec(image, words, config, env, made))
        for target, existed in before.items():  # the mount's own place is no part of the layer
            if not existed:
                place = inside(image, target)
                place.rmdir() if place.is_dir() else place.unlink(missing_ok=True)

    def copy(self, image: Path, sources: list[str], target: str, origin: Path | None, chown: str) -> None:
        self.say(f"COPY {' '.join(sources)} {target}")
        uid, gid = (int(part) for part in chown.split(":"))
        for source in sources:
            if origin is not None:
                start = inside(origin, source)
                files = (
                    [start] if not start.is_dir() else [p for p in start.rglob("*") if p.is_symlink() or p.is_file()]
                )
            else:
                start = self.context / source
                ignore = Ignore((self.context / ".dockerignore").read_text())
                files = [self.context / path for path in ignore.files(self.context)]
                files = [path for path in files if path == start or path.is_relative_to(start)]
            if not files:
                raise DockerfileError(f"COPY {source}: not there, or left out by .dockerignore")
            folder = start.is_dir()
            for path in files:
                name = path.relative_to(start) if folder else Path(path.name if target.endswith("/") else "")
                place = inside(image, str(Path(target) / name))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, place, follow_symlinks=False)
                os.chown(place, uid, gid, follow_symlinks=False)

    def make_folder(self, image: Path, path: str, config: Config) -> None:
        place = inside(image, path)
        if not place.exists():  # an engine makes it as root, whatever USER says
            place.mkdir(parents=True)

    @contextlib.contextmanager
    def container(
        self, image: Path, config: Config, arguments: list[str], env: dict[str, str], volumes: dict[str, str], log: Path
    ) -> Iterator[Container]:
        """Run the image's entrypoint with `arguments` until the block ends."""
        words = [*config.entrypoint, *(arguments or config.command)]
        mounts = [[source, target, True] for source, target in volumes.items()]
        command = self.spec(image, words, config, config.env | env, mounts)
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            try:
                yield Container(process, config, self.user(image, config.user), config.env | env)
            finally:
                process.kill()  # its process 1 dies with it, and with that the whole PID namespace
                process.wait()


class Container:
    """A running container; `process` is the one outside that waits for its process 1."""

    def __init__(
        self, process: subprocess.Popen, config: Config, user: tuple[int, int, str], env: dict[str, str]
    ) -> None:
        self.process, self.config, self.user, self.env = process, config, user, env

    @property
    def pid(self) -> int | None:
        """Process 1's number outside; None before it starts and after it ended."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def execute(self, words: list[str], timeout: float) -> subprocess.CompletedProcess:
        """A command beside process 1: same namespaces, root, user and environment."""
        uid, gid, home = self.user
        into = ["nsenter", "--target", str(self.pid), "--mount", "--pid"]
        into += [f"--root=/proc/{self.pid}/root", f"--wd=/proc/{self.pid}/root{self.config.workdir}"]
        into += ["--setgid", str(gid), "--setuid", str(uid), "/usr/bin/env", "--ignore-environment"]
        settings = [f"{name}={value}" for name, value in ({"HOME": home} | self.env).items()]
        return subprocess.run([*into, *settings, *words], capture_output=True, text=True, timeout=timeout)

    def is_healthy(self) -> bool:
        """Whether the image's health check passes now; it cannot before process 1 starts or after it ended."""
        if self.pid is None:
            return False
        health = self.config.health
        return self.execute(list(health.words), float(health.options["timeout"].removesuffix("s"))).returncode == 0

    def stop(self, seconds: float) -> int:
        """As an engine stops a container: SIGTERM to process 1; its status. Raises where it does not end."""
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(seconds)
