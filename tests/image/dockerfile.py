"""Read a Dockerfile and .dockerignore, and walk a target's stages with an engine's rules.

Only what this repository's Dockerfile uses is known; anything else raises, so that a step is never
silently left out.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

KNOWN = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "USER"}
KNOWN |= {"WORKDIR"}
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class DockerfileError(Exception):
    """The Dockerfile says what an engine would refuse, or what is not known here."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: `text` is what follows the keyword and its flags, continuation lines joined."""

    keyword: str
    flags: tuple[tuple[str, str], ...]
    text: str
    line: int

    @property
    def words(self) -> list[str] | None:
        """The exec form's words, or None where it is the shell form."""
        if not self.text.startswith("["):
            return None
        words = json.loads(self.text)
        if not all(isinstance(word, str) for word in words):
            raise DockerfileError(f"line {self.line}: the exec form holds strings only")
        return words

    def flag(self, name: str) -> str | None:
        return dict(self.flags).get(name)


def parse(text: str) -> list[Instruction]:
    """The instructions in order; comments and blank lines do not end a continued one."""
    instructions: list[Instruction] = []
    parts: list[str] = []
    start = 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            if re.match(r"#\s*(syntax|escape)\s*=", stripped) and not instructions:
                raise DockerfileError(f"line {number}: parser directives are not known here")
            continue
        start = start or number
        more = stripped.endswith("\\")
        parts.append(stripped[:-1].rstrip() if more else stripped)
        if not more:
            instructions.append(_instruction(" ".join(parts), start))
            parts, start = [], 0
    if parts:
        raise DockerfileError(f"line {start}: the last instruction is not finished")
    return instructions


def _instruction(text: str, line: int) -> Instruction:
    keyword, _, rest = text.partition(" ")
    keyword, rest = keyword.upper(), rest.strip()
    if keyword not in KNOWN:
        raise DockerfileError(f"line {line}: {keyword} is not known here")
    if keyword in ("RUN", "COPY", "ADD") and re.search(r"<<-?[\"']?\w", rest):
        raise DockerfileError(f"line {line}: here-documents are not known here")
    flags = []
    while match := re.match(r"--([a-z-]+)(?:=(\S+))?\s+", rest):
        flags.append((match[1], match[2] or ""))
        rest = rest[match.end() :]
    return Instruction(keyword, tuple(flags), rest, line)


_VARIABLE = re.compile(r"\$(?:\{(\w+)(?:(:[-+])([^}]*))?\}|(\w+))")


def substitute(text: str, variables: dict[str, str]) -> str:
    """$NAME, ${NAME}, ${NAME:-word} and ${NAME:+word}; an unset name is empty."""

    def value(match: re.Match[str]) -> str:
        found = variables.get(match[1] or match[4], "")
        if match[2] == ":-":
            return found or match[3]
        if match[2] == ":+":
            return match[3] if found else ""
        return found

    return _VARIABLE.sub(value, text)


def pairs(instruction: Instruction, variables: dict[str, str]) -> dict[str, str]:
    """name=value words of LABEL and ENV, quotes removed and variables filled in."""
    if "'" in instruction.text:
        raise DockerfileError(f"line {instruction.line}: single quotes are not known here")
    found = {}
    for word in shlex.split(instruction.text):
        name, equals, value = word.partition("=")
        if not equals:
            raise DockerfileError(f"line {instruction.line}: expected name=value, found {word!r}")
        found[name] = substitute(value, variables)
    return found


def mount_options(text: str) -> dict[str, str]:
    """type=…,id=…,target=… of a RUN's --mount."""
    return dict(item.split("=", 1) if "=" in item else (item, "true") for item in text.split(","))


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def stages(text: str, arguments: dict[str, str]) -> tuple[dict[str, Stage], dict[str, str]]:
    """The stages by name, in order, and the values of the ARGs before the first FROM."""
    found: dict[str, Stage] = {}
    outer: dict[str, str] = {}
    for instruction in parse(text):
        if instruction.keyword == "FROM":
            match = re.fullmatch(r"(\S+)(?:\s+[Aa][Ss]\s+(\S+))?", instruction.text)
            if not match or instruction.flags:
                raise DockerfileError(f"line {instruction.line}: FROM {instruction.text} is not known here")
            name = match[2] or str(len(found))
            if name in found:
                raise DockerfileError(f"line {instruction.line}: a second stage {name}")
            found[name] = Stage(name, substitute(match[1], outer))
        elif found:
            found[next(reversed(found))].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            name, _, default = instruction.text.partition("=")
            outer[name] = arguments.get(name, substitute(default, outer))
        else:
            raise DockerfileError(f"line {instruction.line}: {instruction.keyword} before the first FROM")
    return found, outer


@dataclass(frozen=True)
class HealthCheck:
    words: tuple[str, ...]
    options: dict[str, str]


@dataclass(frozen=True)
class Config:
    """What an image says about containers made of it."""

    env: dict[str, str] = field(default_factory=lambda: {"PATH": DEFAULT_PATH})
    workdir: str = "/"
    user: str = "0"
    labels: dict[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    health: HealthCheck | None = None


class Engine(Protocol):
    """What carries steps out; `image` is whatever stands for a stage's file system."""

    def base(self, name: str) -> object: ...
    def copy_of(self, image: object) -> object: ...
    def run(self, image: object, words: list[str], config: Config, env: dict[str, str], mounts: list[dict]) -> None: ...
    def copy(self, image: object, sources: list[str], target: str, origin: object | None, chown: str) -> None: ...
    def make_folder(self, image: object, path: str, config: Config) -> None: ...


def _words(instruction: Instruction) -> tuple[str, ...]:
    return tuple(instruction.words or ("/bin/sh", "-c", instruction.text))


class Walk:
    """Builds a target: each stage that it needs, once, step by step on an engine."""

    def __init__(self, text: str, arguments: dict[str, str], engine: Engine) -> None:
        self.stages, self.outer = stages(text, arguments)
        self.arguments = arguments
        self.engine = engine
        self.built: dict[str, tuple[object, Config]] = {}

    def build(self, target: str) -> tuple[object, Config]:
        """The image of a stage and its config."""
        if target in self.built:
            return self.built[target]
        stage = self.stages[target]
        if stage.base in self.stages:
            parent, config = self.build(stage.base)
            image = self.engine.copy_of(parent)
        else:
            image, config = self.engine.base(stage.base), Config()
        declared: dict[str, str] = {}
        for instruction in stage.instructions:
            config = self.step(image, instruction, config, declared)
        self.built[target] = image, config
        return self.built[target]

    def step(self, image: object, this: Instruction, config: Config, declared: dict[str, str]) -> Config:
        """Carry one instruction out; `declared` are the stage's ARGs so far."""
        variables = declared | config.env
        match this.keyword:
            case "ARG":
                name, equals, default = this.text.partition("=")
                inherited = substitute(default, variables) if equals else self.outer.get(name)
                if (value := self.arguments.get(name, inherited)) is not None:
                    declared[name] = value
            case "ENV":
                return replace(config, env=config.env | pairs(this, variables))
            case "LABEL":
                return replace(config, labels=config.labels | pairs(this, variables))
            case "WORKDIR":
                path = str(PurePosixPath(config.workdir) / substitute(this.text, variables))
                self.engine.make_folder(image, path, config)
                return replace(config, workdir=path)
            case "USER":
                return replace(config, user=substitute(this.text, variables))
            case "EXPOSE":
                return replace(config, ports=(*config.ports, *substitute(this.text, variables).split()))
            case "ENTRYPOINT":
                return replace(config, entrypoint=_words(this), command=())
            case "CMD":
                return replace(config, command=_words(this))
            case "HEALTHCHECK":
                inner = _instruction(this.text, this.line)
                if inner.keyword != "CMD":
                    raise DockerfileError(f"line {this.line}: HEALTHCHECK {this.text} is not known here")
                return replace(config, health=HealthCheck(_words(inner), dict(this.flags)))
            case "COPY":
                *sources, target = this.words or shlex.split(this.text)
                if unknown := {name for name, _ in this.flags} - {"from", "chown"}:
                    raise DockerfileError(f"line {this.line}: COPY --{unknown.pop()} is not known here")
                slash = "/" if target.endswith("/") or target == "." else ""
                target = str(PurePosixPath(config.workdir) / substitute(target, variables)) + slash
                sources = [substitute(source, variables) for source in sources]
                origin = self.build(this.flag("from"))[0] if this.flag("from") else None
                self.engine.copy(image, sources, target, origin, this.flag("chown") or "0:0")
            case "RUN":
                if unknown := {name for name, _ in this.flags} - {"mount"}:
                    raise DockerfileError(f"line {this.line}: RUN --{unknown.pop()} is not known here")
                mounts = [mount_options(value) for _, value in this.flags]
                for mount in mounts:
                    if mount["type"] == "bind":
                        mount["origin"] = self.build(mount["from"])[0]
                self.engine.run(image, list(_words(this)), config, variables, mounts)
            case _:
                raise DockerfileError(f"line {this.line}: {this.keyword} is not known here")
        return config


class Ignore:
    """A .dockerignore: the last pattern that matches a path, or one of its folders, decides."""

    def __init__(self, text: str) -> None:
        self.patterns: list[tuple[re.Pattern[str], bool]] = []
        self.kept: list[str] = []
        for line in text.splitlines():
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            excluded = not line.startswith("!")
            pattern = line.removeprefix("!").strip("/")
            self.patterns.append((_pattern(pattern), excluded))
            if not excluded:
                self.kept.append(pattern)

    def excludes(self, path: str) -> bool:
        parents = [path, *(str(parent) for parent in PurePosixPath(path).parents if str(parent) != ".")]
        decision = False
        for pattern, excluded in self.patterns:
            if any(pattern.fullmatch(one) for one in parents):
                decision = excluded
        return decision

    def files(self, root: Path) -> list[str]:
        """Every file and link of the context, relative and sorted; hopeless folders are not entered."""
        found: list[str] = []
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            for entry in (root / folder).iterdir():
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir() and not entry.is_symlink():
                    inside = any("*" in kept or kept.startswith(f"{path}/") for kept in self.kept)
                    if inside or not self.excludes(path):
                        waiting.append(path)
                elif not self.excludes(path):
                    found.append(path)
        return sorted(found)


def _pattern(glob: str) -> re.Pattern[str]:
    """A pattern as Go's filepath.Match reads it, and ** for any number of folders."""
    out, i = "", 0
    while i < len(glob):
        if glob.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif glob.startswith("**", i):
            out, i = out + ".*", i + 2
        elif glob[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif glob[i] == "?":
            out, i = out + "[^/]", i + 1
        elif glob[i] in "[\\":
            raise DockerfileError(f"{glob}: character classes and escapes are not known here")
        else:
            out, i = out + re.escape(glob[i]), i + 1
    return re.compile(out)
