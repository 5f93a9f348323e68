"""Who is in trouble, from what the ranks say; the rest of the heartbeat is tested with real ranks, in tests/launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ranks import Ranks

from distrib.heartbeat import BEAT_S, Beat, Hang, Here, Watch

LIMIT_S = 5.0
AT_STEP = Beat(0, marks=7, calls=20, doing="step 4", prompt=True)


def judged(beats: list[Beat | None], seconds: float, beating: tuple[int, ...], watch: Watch | None = None) -> Any:
    """The first verdict and when, of ranks that stay where they are; those of `beating` live."""
    watch = watch or Watch(LIMIT_S, len(beats), 100.0)
    for count in range(1, int(seconds / BEAT_S) + 1):
        now = 100.0 + count * BEAT_S
        live = [replace(beat, count=count) if beat and rank in beating else beat for rank, beat in enumerate(beats)]
        if found := watch.look(live, now):
            return now - 100.0, found
    return None


def test_a_rank_whose_beats_stay_away_does_not_answer() -> None:
    seconds, found = judged([AT_STEP] * 3, 60, beating=(0, 2))
    assert found == Hang(1, "rank 1 does not answer for 5 s, last seen at step 4: it is stopped, or out of reach")
    assert LIMIT_S < seconds <= LIMIT_S + 1
    _, unheard = judged([None, AT_STEP], 60, beating=(1,))
    assert unheard.line == "rank 0 does not answer for 5 s, never heard of: it is stopped, or out of reach"


def test_a_rank_that_is_done_need_not_answer() -> None:
    assert judged([AT_STEP, replace(AT_STEP, done=True)], 60, beating=(0,)) is None


@pytest.mark.parametrize(
    ("others", "slow"),
    [
        ({"calls": 21, "waits": True, "stack": "wait"}, {"stack": "nap (mine.py:7)"}),
        ({"marks": 8, "calls": 19}, {"stack": "nap (mine.py:7)"}),
        ({"waits": True}, {"stack": "nap (mine.py:7)"}),
        # in the same collective, which somebody else has not begun
        ({"calls": 21}, {"stack": "nap (mine.py:7)"}),
    ],
)
def test_the_rank_that_others_wait_for_is_named(others: dict[str, Any], slow: dict[str, Any]) -> None:
    ahead, behind = replace(AT_STEP, **others), replace(AT_STEP, **slow)
    seconds, found = judged([ahead, behind, ahead], 60, beating=(0, 1, 2))
    assert found == Hang(1, "rank 1 makes no progress, others wait for it 5 s: step 4, in nap (mine.py:7)")
    assert LIMIT_S < seconds <= LIMIT_S + 1


def test_a_long_computation_of_all_is_no_hang() -> None:
    assert judged([AT_STEP, AT_STEP], 3600, beating=(0, 1)) is None


def test_progress_of_anyone_starts_the_time_anew() -> None:
    watch = Watch(LIMIT_S, 2, 100.0)
    for count in range(1, 200):
        ahead = replace(AT_STEP, count=count, calls=21 + count // 16)
        assert watch.look([ahead, replace(AT_STEP, count=count)], 100.0 + count * BEAT_S) is None


def test_loading_and_saving_have_ten_minutes() -> None:
    saving = replace(AT_STEP, doing="the checkpoint of step 4", prompt=False)
    seconds, found = judged([saving, replace(AT_STEP, marks=8)], 3600, beating=(0, 1))
    assert (found.rank, 600 < seconds <= 601) == (0, True)


def test_a_watcher_that_was_stopped_itself_blames_nobody() -> None:
    """As after `scontrol suspend`: its clock went on, its beats and everyone's did not."""
    watch = Watch(LIMIT_S, 2, -3600.0)
    assert judged([replace(AT_STEP, waits=True), AT_STEP], LIMIT_S, beating=(), watch=watch) is None
    assert judged([AT_STEP, AT_STEP], 2 * LIMIT_S, beating=(0,), watch=Watch(LIMIT_S, 2, 100.0))


def test_a_place_outside_of_steps_is_left_as_it_was_entered() -> None:
    here = Here()
    here.at("step 4")
    with here.patiently("the checkpoint of step 4"):
        assert (here.doing, here.prompt, here.marks) == ("the checkpoint of step 4", False, 2)
    assert (here.doing, here.prompt, here.marks) == ("step 4", True, 3)


def test_another_thread_sees_who_waits_and_who_keeps_them_waiting(two_ranks: Ranks) -> None:
    ((waits, _), counted), ((sleeps, stack), also) = two_ranks("rank_cases:watched")
    assert (waits, sleeps) == (True, False)
    assert "watched (rank_cases.py:" in stack
    assert (counted, also) == (1, 1)
