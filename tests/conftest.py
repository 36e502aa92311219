"""How tests are spread over pytest-xdist's workers."""

import os

import pytest

# Their cases share no fixture, so each goes to whichever worker is free; other files go as a whole.
SPREAD = ("test_oracle_agreement.py", "test_architectures.py", "test_keep_all.py")

# A core for each worker: engines bind their threads to the cores that they may use; without this,
# those of two workers would share the first one.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    # The machine of tests/gpu has no xdist.
    from xdist.scheduler import LoadFileScheduling

    class FileOrCaseScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith(SPREAD) else file

    return FileOrCaseScheduling(config, log)
