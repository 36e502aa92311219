"""worker-play-pipeline-stages.patch: one process says that it is this or that stage."""

from __future__ import annotations

import pytest
from vllm.distributed.parallel_state import GroupCoordinator, get_pp_group, get_tp_group


def flags(group: GroupCoordinator) -> tuple[bool, bool]:
    return group.is_first_rank, group.is_last_rank


@pytest.fixture
def pp_group(one_rank: None) -> GroupCoordinator:
    return get_pp_group()


def test_a_process_plays_each_stage_and_is_itself_again(pp_group: GroupCoordinator) -> None:
    """Also after a stage whose flags are both false."""
    assert flags(pp_group) == (True, True)
    for stage in [(True, False), (False, False), (False, True), (True, True)]:
        with pp_group.as_stage(*stage):
            assert flags(pp_group) == stage
        assert flags(pp_group) == (True, True)


def test_an_exception_ends_the_play_and_goes_through(pp_group: GroupCoordinator) -> None:
    with pytest.raises(RuntimeError, match="in the model"), pp_group.as_stage(is_first=False, is_last=False):
        raise RuntimeError("in the model")
    assert flags(pp_group) == (True, True)


def test_only_this_group_plays(pp_group: GroupCoordinator) -> None:
    with pp_group.as_stage(is_first=False, is_last=False):
        assert flags(get_tp_group()) == (True, True)
        assert (pp_group.rank, pp_group.world_size) == (0, 1)


def test_without_a_play_the_flags_are_the_ranks_place(
    pp_group: GroupCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pp_group, "ranks", [0, 1, 2])
    for rank, expected in enumerate([(True, False), (False, False), (False, True)]):
        monkeypatch.setattr(pp_group, "rank", rank)
        assert flags(pp_group) == expected
