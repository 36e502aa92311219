"""A decode server over HTTP, whose clients forge what a prefill server would send."""

from __future__ import annotations

import json

import pytest
from test_server import complete

from evals.live_server import free_port, live_server
from evals.needle.prompts import make_prompt

TRANSFER = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "recompute"}


def test_a_server_goes_on_after_forged_parameters(tmp_path) -> None:
    """HTTP 400 by name, though the server tells the prefill server of every request that it refuses."""
    options = {
        "--uniprefill-config": '{"top_p": 0.9}',
        "--kv-transfer-config": json.dumps(TRANSFER),
        "--block-size": "32",
        "--kv-cache-memory-bytes": "128M",
        "--max-model-len": "4096",
    }
    text = make_prompt("multikey", 1500, 0).text
    address = {
        "remote_engine_id": "forged",
        "remote_request_id": "0",
        "remote_host": "127.0.0.1",
        "remote_port": free_port(),
        "remote_block_ids": [[1], [1], [1], [1]],
    }
    offer = {"alive": [1500, 2, 2, 2], "plan": "0" * 32}
    forged = [
        ({"uniprefill": offer}, "uniprefill.plan"),
        ({"uniprefill": []}, "uniprefill"),
        ({"uniprefill": offer, "remote_engine_id": ["no", "key"]}, "remote_engine_id"),
        ({"remote_block_ids": [1]}, "remote_block_ids"),
        ({"remote_port": None}, "remote_port"),
    ]
    environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    with live_server(options, tmp_path / "log", environment=environment) as live:
        for changed, name in forged:
            params = {"do_remote_prefill": True, **address, **changed}
            status, answer = complete(live.url, text, kv_transfer_params=params)
            assert (status, answer["error"]["param"]) == (400, f"kv_transfer_params.{name}")
        # Nobody answers for these: the prompt is prefilled here.
        params = {"do_remote_prefill": True, **address}
        status, answer = complete(live.url, text, kv_transfer_params=params)
        assert status == 200 and answer == complete(live.url, text)[1] | {
            name: answer[name] for name in ("id", "created")
        }
