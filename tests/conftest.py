"""Give each of pytest-xdist's workers a core of its own.

Engines bind their threads to the cores that they may use; without this, those of two workers
would share the first one.
"""

import os

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
