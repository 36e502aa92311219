"""Find and download one file from the package index that pip is configured for.

`pip download` runs a source archive's build to learn its metadata, which for vLLM means
installing torch first. This reads the index's own page instead and fetches just the file.
"""

from __future__ import annotations

import ast
import base64
import html.parser
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from scripts.fork import ForkError, say

_ASK_PIP_FOR_ITS_DEFAULT = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"


def parse_pip_config(listing: str) -> dict[str, str]:
    """`pip config list` as one mapping; the environment wins, then [download], then [global]."""
    found: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, _, key = name.partition(".")
        if equals and section in found:
            found[section][key] = ast.literal_eval(value)
    return found["global"] | found["download"] | found[":env:"]


def pip_config() -> dict[str, str]:
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    if done.returncode:
        raise ForkError("pip is missing from this Python; install it (Debian: python3-pip, python3-venv).")
    config = parse_pip_config(done.stdout)
    if "index-url" not in config:
        done = subprocess.run([sys.executable, "-c", _ASK_PIP_FOR_ITS_DEFAULT], capture_output=True, text=True)
        if done.returncode:
            raise ForkError("pip names no default index; set one with PIP_INDEX_URL.")
        config["index-url"] = done.stdout.strip()
    return config


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for name, value in attrs if tag == "a" and name == "href" and value]


def find_link(page: str, base: str, filename: str) -> str | None:
    """The address of `filename` on an index page, resolved against the page's own."""
    parser = _Links()
    parser.feed(page)
    for href in parser.hrefs:
        url = urllib.parse.urljoin(base, href)
        path = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
        if path.rsplit("/", 1)[-1] == filename:
            return urllib.parse.urldefrag(url).url
    return None


def _open(url: str, config: dict[str, str]):
    """Open with pip's certificates and time limit; credentials in the address become a header."""
    parts = urllib.parse.urlsplit(url)
    headers = {"Accept": "text/html, */*;q=0.5"}
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    context = ssl.create_default_context(cafile=config.get("cert") or None)
    request = urllib.request.Request(url, headers=headers)
    timeout = float(config.get("timeout") or config.get("default-timeout") or 60)
    return urllib.request.urlopen(request, timeout=timeout, context=context)


def locate(project: str, filename: str, config: dict[str, str]) -> str:
    """The first address that offers the file: find-links folders, then each index."""
    for folder in config.get("find-links", "").split():
        path = Path(urllib.parse.urlsplit(folder).path) / filename
        if "://" not in folder.removeprefix("file://") and path.is_file():
            return path.as_uri()
    problems = []
    for index in [config["index-url"], *config.get("extra-index-url", "").split()]:
        base = f"{index.rstrip('/')}/{project}/"
        try:
            with _open(base, config) as reply:
                link = find_link(reply.read().decode(), reply.geturl(), filename)
        except (urllib.error.URLError, OSError) as error:
            problems.append(str(getattr(error, "reason", error)))
            continue
        if link:
            return link
        problems.append("not listed")
    raise ForkError(
        f"No package index that pip is configured for offers {filename} ({'; '.join(problems)}): "
        "check the network and `pip config list`, or put the file into build/archives."
    )


def download(project: str, filename: str, target: Path) -> None:
    config = pip_config()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with _open(locate(project, filename, config), config) as reply, partial.open("wb") as out:
            total, done, told = int(reply.headers.get("Content-Length") or 0), 0, 0
            while chunk := reply.read(1 << 20):
                out.write(chunk)
                done += len(chunk)
                if done - told >= 64 << 20:
                    told = done
                    say(f"  {filename}: {done >> 20} of {total >> 20 or '?'} MiB")
        partial.replace(target)
    except (urllib.error.URLError, OSError) as error:
        raise ForkError(f"Downloading {filename} failed ({error}); run the command again.") from None
    finally:
        partial.unlink(missing_ok=True)
