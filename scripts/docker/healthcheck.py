"""Exit 0 where the container's vllm serve answers /health, else 1 and a line why.

The port and whether it speaks TLS are read from the command line of process 1 (vllm serve itself,
or an init whose arguments end with it), so that an operator's own --port needs no second setting.
"""

import argparse
import ssl
import sys
import urllib.request
from pathlib import Path


def health_url(command: list[str]) -> str:
    """The address of /health for a `vllm serve` command line; vLLM takes - and _ alike in options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", default="8000")
    parser.add_argument("--ssl-certfile")
    words = [word for word in command if word != "--"]  # an init's, before what it starts
    plain = [word.replace("_", "-") if word.startswith("--ssl_certfile") else word for word in words]
    known, _ = parser.parse_known_args(plain)
    return f"{'https' if known.ssl_certfile else 'http'}://127.0.0.1:{known.port}/health"


def main() -> int:
    command = Path("/proc/1/cmdline").read_text(errors="replace").split("\0")
    url = health_url(command)
    # the certificate names the service, not the loopback address that is asked here
    context = ssl._create_unverified_context() if url.startswith("https:") else None
    try:
        urllib.request.urlopen(url, timeout=8, context=context).close()
    except (OSError, ValueError) as error:
        print(f"{url}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
