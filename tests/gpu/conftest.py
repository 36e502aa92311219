"""A run of limited time skips what it has no time for: GPU_TEST_SECONDS."""

from __future__ import annotations

import os
import time

import pytest

STARTED = time.monotonic()


@pytest.fixture(autouse=True)
def within_time() -> None:
    if time.monotonic() - STARTED > float(os.environ.get("GPU_TEST_SECONDS", "inf")):
        pytest.skip("no time left")
