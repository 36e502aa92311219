"""The served completion routes under generated bodies with our arguments: no server error, no hang.

schemathesis makes the bodies from the server's own OpenAPI. Most bodies made at random are refused for their first odd
field, so most of these overlay a good request, one that is pruned, with a few generated fields.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from test_fuzz_arguments import ARGUMENTS, FUZZ_TIMES, objects

from evals.live_server import NAME, LiveServer, live_server
from evals.needle.prompts import make_prompt

pytestmark = pytest.mark.slow
EXAMPLES = 120 * FUZZ_TIMES
HANG_SECONDS = 60.0
MAX_TOKENS = 3
ROUTES = ("/v1/completions", "/v1/chat/completions")
PROMPT = make_prompt("single", 300, seed=1).text
OPTIONS: dict[str, str | None] = {
    # prompts of 200 tokens are pruned already
    "--uniprefill-config": json.dumps(
        {"min_prompt_tokens": 200, "block_size": 16, "num_queries": 32, "sink_tokens": 16, "recent_tokens": 32}
    ),
    "--max-model-len": "1024",
    "--max-num-batched-tokens": "2048",
    "--max-num-seqs": "8",
    "--kv-cache-memory-bytes": "16M",
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": NAME, "prompt": PROMPT},
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": PROMPT}]},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live_server(OPTIONS, tmp_path_factory.mktemp("fuzz") / "log") as live:
        yield live


@pytest.fixture(scope="module")
def schema(server: LiveServer):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def bounded(body: dict[str, Any]) -> dict[str, Any]:
    """The body with what it may cost limited; what is no number stays as it is."""
    limits = {"max_tokens": MAX_TOKENS, "max_completion_tokens": MAX_TOKENS, "n": 3, "best_of": 3, "min_tokens": 2}
    small = {
        name: min(value, limits[name])
        for name, value in body.items()
        if name in limits and isinstance(value, int | float)
    }
    return {"max_tokens": MAX_TOKENS} | body | small


def send(server: LiveServer, path: str, body: Any) -> requests.Response:
    """Post a body as Python's JSON, in which NaN and infinities have a spelling; raises if the server hangs."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return requests.post(server.url + path, data=data, headers=headers, timeout=HANG_SECONDS)


def without_ours(body: Any) -> Any:
    """The same body for a server that knows none of our arguments."""
    if not isinstance(body, dict) or not isinstance(body.get("vllm_xargs"), dict):
        return body
    rest = {name: value for name, value in body["vllm_xargs"].items() if not str(name).startswith("uniprefill")}
    return body | {"vllm_xargs": rest}


def upstream_error(body: Any, response: requests.Response) -> str | None:
    """Which known server error of the release this is; None for any other."""
    # Its check_structured_outputs_count reads the value before its type is validated: AttributeError, so HTTP 500.
    structured = body.get("structured_outputs") if isinstance(body, dict) else None
    if structured is not None and not isinstance(structured, dict) and "has no attribute 'get'" in response.text:
        return "structured_outputs that is no object"
    return None


@dataclass
class Found:
    """What the bodies of one test came to: how often each status, and what must not be."""

    statuses: Counter[int] = field(default_factory=Counter)
    upstream: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0


def check(server: LiveServer, path: str, body: Any, found: Found) -> None:
    """Send one body and note what is wrong with the answer; hypothesis shall neither shrink nor repeat it."""
    shown = f"{body!r}"[:2000]
    started = time.monotonic()
    try:
        response = send(server, path, body)
    except requests.RequestException as error:
        found.bad.append(f"{type(error).__name__} for {shown}")
        return
    found.slowest = max(found.slowest, time.monotonic() - started)
    found.statuses[response.status_code] += 1
    if response.status_code < 500:
        return
    known = upstream_error(body, response)
    if known is not None and send(server, path, without_ours(body)).status_code >= 500:
        found.upstream[known] += 1
        return
    found.bad.append(f"HTTP {response.status_code} for {shown}: {response.text[:500]}")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", ROUTES)
def test_generated_bodies(server: LiveServer, schema, path: str, mode: GenerationMode) -> None:
    operation = schema[path]["POST"]
    found = Found()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=FUZZ_TIMES == 1,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        case=operation.as_strategy(generation_mode=mode),
        xargs=objects(ARGUMENTS),
        fields=st.sampled_from([0, 1, 1, 2, 3, 100]),
        seed=st.integers(0, 2**32),
    )
    def run(case: Any, xargs: dict[str, Any], fields: int, seed: int) -> None:
        body = case.body
        if isinstance(body, dict):
            if fields < 100:
                names = sorted(body)
                chosen = random.Random(seed).sample(names, min(fields, len(names)))
                body = GOOD[path] | {name: body[name] for name in chosen}
            body = bounded(body | {"vllm_xargs": xargs})
        elif not isinstance(body, bytes):
            body = json.loads(json.dumps(body, default=str))
        check(server, path, body, found)

    run()
    print(path, mode.value, dict(found.statuses), dict(found.upstream), f"slowest {found.slowest:.1f} s")
    assert found.bad == []
    assert found.statuses[400] > 10 and found.statuses[200] > 10, f"all alike: {found.statuses}"
    assert_alive(server, path)


def assert_alive(server: LiveServer, path: str) -> None:
    """After all that, a pruned request is answered, and nothing is left behind."""
    body = GOOD[path] | {"max_tokens": MAX_TOKENS, "vllm_xargs": {"uniprefill_report": 1}}
    response = send(server, path, body)
    assert response.status_code == 200 and response.json()["choices"][0]["uniprefill"]["outcome"] == "pruned"
    metrics = server.metrics()
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert metrics.total(f"vllm:{name}") == 0, name
