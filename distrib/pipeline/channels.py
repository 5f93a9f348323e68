"""What crosses the ranks of a pipeline, and in which order.

A channel goes from one rank to another and carries activations or gradients, never both. Its parcels travel in the
order of sending, which both ends know from the schedule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from distrib.pipeline.ops import Op, Schedule

AHEAD = 1
"""Parcels that a receiver asks for in a channel beyond the one it needs."""
UNDER_WAY = 4
"""Parcels in a channel for which the receiver did not ask yet; the sender then waits."""


class Channel(NamedTuple):
    sender: int
    receiver: int
    gradients: bool


class Parcel(NamedTuple):
    """The input of a stage's forward, or the gradient of its output."""

    stage: int
    micro_batch: int
    gradient: bool


def needed(op: Op, stages: int) -> Parcel | None:
    end = 0 if op.kind == "F" else stages - 1
    return None if op.kind == "W" or op.stage == end else Parcel(op.stage, op.micro_batch, op.kind != "F")


def given(op: Op, stages: int) -> Parcel | None:
    to = op.stage + 1 if op.kind == "F" else op.stage - 1
    return Parcel(to, op.micro_batch, op.kind != "F") if op.kind != "W" and 0 <= to < stages else None


@lru_cache(maxsize=16)
def traffic(schedule: Schedule) -> Mapping[Channel, Sequence[Parcel]]:
    """What crosses ranks, in the order of sending."""
    homes, stages = schedule.homes, schedule.stages
    found: dict[Channel, list[Parcel]] = {}
    for rank, ops in enumerate(schedule.ranks):
        for parcel in filter(None, (given(op, stages) for op in ops)):
            if homes[parcel.stage] != rank:
                channel = Channel(rank, homes[parcel.stage], parcel.gradient)
                found.setdefault(channel, []).append(parcel)
    return found


@lru_cache(maxsize=16)
def under_way(schedule: Schedule) -> int:
    """How many parcels a channel must hold for every rank to reach its end: a schedule may need more than a few."""
    queues = traffic(schedule)
    longest, bound = max(map(len, queues.values()), default=0), UNDER_WAY
    while bound < longest and not _ends(schedule, queues, bound):
        bound *= 2
    return bound


def _ends(schedule: Schedule, queues: Mapping[Channel, Sequence[Parcel]], bound: int) -> bool:
    """Whether every rank reaches its end; who waits for whom does not depend on how long anything takes."""
    where: dict[Parcel | None, tuple[Channel, int]] = {
        parcel: (channel, index) for channel, parcels in queues.items() for index, parcel in enumerate(parcels)
    }
    asked, sent, done = Counter(dict.fromkeys(queues, AHEAD)), Counter[Channel](), [0] * len(schedule.ranks)
    stages = schedule.stages

    def goes_on(op: Op) -> bool:
        arriving, leaving = where.get(needed(op, stages)), where.get(given(op, stages))
        if arriving:
            channel, index = arriving
            asked[channel] = max(asked[channel], index + 1 + AHEAD)
            if sent[channel] <= index:
                return False
        if leaving:
            channel, index = leaving
            if index >= asked[channel] + bound:
                return False
            sent[channel] = index + 1
        return True

    before = -1
    while before < sum(done):
        before = sum(done)
        for rank, ops in enumerate(schedule.ranks):
            while done[rank] < len(ops) and goes_on(ops[done[rank]]):
                done[rank] += 1
    return done == [len(ops) for ops in schedule.ranks]
