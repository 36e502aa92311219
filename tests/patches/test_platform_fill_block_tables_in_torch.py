"""platform-fill-block-tables-in-torch.patch: the torch versions write what the release's kernels do."""

from __future__ import annotations

import pytest
import vllm  # noqa: F401  before torch: on a CPU it chooses Triton's interpreter

# isort: split
import torch
from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import block_table, buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZES, NUM_BLOCKS, MAX_TOKENS = [16, 32, 8], [12, 6, 24], 128
# Of each request: its slot, the tokens before the step, those of the step. The last one is a dummy.
REQUESTS = [(3, 40, 1), (0, 0, 70), (5, 17, 20), (-1, 0, 2)]
PADDED_REQS = 6


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots, starts and positions, with rows of padding behind."""
    slots, _, counts = (torch.tensor(column) for column in zip(*REQUESTS, strict=True))
    starts = torch.cat([torch.zeros(1), counts.cumsum(0), counts.sum().expand(2)]).int()
    positions = torch.cat([torch.arange(before, before + count) for _, before, count in REQUESTS])
    return slots.int().to(DEVICE), starts.to(DEVICE), torch.nn.functional.pad(positions, (0, 7)).to(DEVICE)


@pytest.fixture(autouse=True)
def cpu_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the CPU worker does when it starts."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)


def filled_tables() -> BlockTables:
    tables = BlockTables(BLOCK_SIZES, 8, MAX_TOKENS, NUM_BLOCKS, DEVICE, slot_mapping_enabled=[True, True, False])
    for slot in range(8):
        blocks = tuple([100 * slot + 10 * group + i for i in range(n)] for group, n in enumerate(NUM_BLOCKS))
        tables.append_block_ids(slot, blocks, overwrite=True)
    tables.apply_staged_writes()
    for table in tables.input_block_tables:
        table.fill_(7)
    return tables


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the release's kernels run")
def test_slots_and_tables_are_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    slots, starts, positions = batch()
    num_tokens = int(starts[-1])
    with_kernels = filled_tables()
    with_kernels.device = torch.device("cuda")  # decides alone which of the two runs
    expected_slots = with_kernels.compute_slot_mappings(slots, starts, positions, num_tokens + 5)
    expected_tables = with_kernels.gather_block_tables(slots[:-1], PADDED_REQS)

    def refuse(*_, **__):
        raise AssertionError("a kernel ran")

    for name in ("_gather_block_tables_kernel", "_compute_slot_mappings_kernel"):
        monkeypatch.setattr(block_table, name, {(3, 5): refuse, (3, PADDED_REQS): refuse})
    in_torch = filled_tables()
    found_slots = in_torch.compute_slot_mappings(slots, starts, positions, num_tokens + 5)
    found_tables = in_torch.gather_block_tables(slots[:-1], PADDED_REQS)
    assert torch.equal(found_slots, expected_slots)
    assert torch.equal(in_torch.slot_mappings, with_kernels.slot_mappings), "all of it, padding too"
    assert found_slots[0, 0] == (300 + 40 // 16) * 16 + 40 % 16 and (found_slots[2] == -1).all()
    assert (found_slots[:, num_tokens - 2 :] == -1).all(), "dummy and padding"
    for found, expected in zip(found_tables, expected_tables, strict=True):
        assert torch.equal(found, expected)
        assert (found[len(REQUESTS) - 1 :] == 0).all() and (found[0] // 100 == 3).all()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="on a GPU the release's kernels run")
def test_no_requests_are_no_tokens() -> None:
    tables = filled_tables()
    none, starts = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert (tables.compute_slot_mappings(none, starts, torch.zeros(4, dtype=torch.int64), 4) == -1).all()
    assert all((table == 0).all() for table in tables.gather_block_tables(none, 2))
