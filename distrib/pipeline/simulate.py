"""Runs a schedule on paper: refuses one that cannot run, and says how long a step takes and what it holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median

from distrib.errors import UserError
from distrib.pipeline.ops import Op, Schedule
from distrib.pipeline.record import Span, Timeline


class BadSchedule(UserError):
    """A schedule that cannot run: the rank, the operation, the reason."""


@dataclass(frozen=True)
class Costs:
    """What one micro-batch costs on every stage, in seconds; a whole backward takes `input` and `weight` together.

    `transfer` lies between the end of an operation and what waits for it on another rank, which works meanwhile.
    A stage holds `held` bytes from a forward on, until the gradient of its input is there, and then, where the backward
    is split, `stashed` bytes until the gradients of its weights are. Other units than seconds and bytes do as well.
    """

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    transfer: float = 0.0
    held: float = 1.0
    stashed: float = 1.0

    @classmethod
    def equal(cls, stages: int, forward: float = 1.0, input: float = 1.0, weight: float = 1.0) -> Costs:
        """Stages that cost the same."""
        return cls((forward,) * stages, (input,) * stages, (weight,) * stages)

    @classmethod
    def measured(cls, timeline: Timeline) -> Costs:
        """The median costs of every stage of a recording.

        A stage that only ran whole backwards has its two parts in the proportion of the others', else even ones.
        What a transfer takes is not to be seen there, and counts as nothing.
        """
        took: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
        for spans in timeline.ranks:
            for (stage, kind, _), start, end in spans:
                took[stage, kind].append(end - start)
        middle = {key: median(values) for key, values in took.items()}
        stages = range(1 + max(stage for stage, _ in middle))
        split = [stage for stage in stages if (stage, "I") in middle]
        parts = [sum(middle[stage, kind] for stage in split) for kind in "IW"]
        share = parts[0] / sum(parts) if sum(parts) else 0.5
        for stage in set(stages) - set(split):
            middle[stage, "I"], middle[stage, "W"] = (part * middle[stage, "B"] for part in (share, 1 - share))
        forward, input, weight = (tuple(middle[stage, kind] for stage in stages) for kind in "FIW")
        return cls(forward, input, weight)

    def seconds(self, op: Op) -> float:
        match op.kind:
            case "F":
                return self.forward[op.stage]
            case "I":
                return self.input[op.stage]
            case "W":
                return self.weight[op.stage]
        return self.input[op.stage] + self.weight[op.stage]


class Clock:
    """Runs operations one after another, each when its rank and its inputs are there."""

    def __init__(self, homes: Mapping[int, int], costs: Costs) -> None:
        self.spans: list[list[Span]] = [[] for _ in range(1 + max(homes.values()))]
        self._homes, self._costs = homes, costs
        self._ends: dict[Op, float] = {}

    def free(self, rank: int) -> float:
        return self.spans[rank][-1].end if self.spans[rank] else 0.0

    def arrival(self, op: Op) -> float | None:
        """When its inputs are on its rank; None as long as one of them has not been made."""
        time = 0.0
        for need in self._needs(op):
            end = self._ends.get(need)
            if end is None:
                return None
            time = max(time, end + self._costs.transfer * (self._homes[need.stage] != self._homes[op.stage]))
        return time

    def run(self, op: Op, arrival: float) -> None:
        rank = self._homes[op.stage]
        start = max(self.free(rank), arrival)
        end = start + self._costs.seconds(op)
        self.spans[rank].append(Span(op, start, end))
        self._ends[_made(op)] = end

    def lacks(self, op: Op) -> Op:
        """The first of its inputs that has not been made."""
        return next(need for need in self._needs(op) if need not in self._ends)

    def _needs(self, op: Op) -> Iterator[Op]:
        stage, kind, micro_batch = op
        if kind == "F" and stage:
            yield Op(stage - 1, "F", micro_batch)
        if kind in "BI":
            yield Op(stage, "F", micro_batch)
            if stage + 1 in self._homes:
                yield Op(stage + 1, "I", micro_batch)
        if kind == "W":
            yield Op(stage, "I", micro_batch)


def _made(op: Op) -> Op:
    """A whole backward makes what the gradient of the input does, for those who wait for it."""
    return op._replace(kind="I") if op.kind == "B" else op


def check(schedule: Schedule) -> None:
    """Raises BadSchedule for a schedule that is not whole, or in which ranks wait for each other for ever."""
    _check_ranks(schedule)
    _walk(schedule, Costs.equal(schedule.stages))


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    _check_ranks(schedule)
    if len(costs.forward) != schedule.stages:
        raise UserError(f"schedule {schedule.name}: costs of {len(costs.forward)} stages for its {schedule.stages}")
    spans = tuple(map(tuple, _walk(schedule, costs)))
    peaks = tuple(max(value for _, value in memory(rank, costs)) for rank in spans)
    return Timeline(schedule.name, spans, peaks)


def memory(spans: Iterable[Span], costs: Costs) -> list[tuple[float, float]]:
    """A rank's (time, bytes) wherever what it holds changes."""
    now, found = 0.0, []
    for op, start, end in spans:
        now += {"F": costs.held, "B": -costs.held, "I": costs.stashed - costs.held, "W": -costs.stashed}[op.kind]
        found.append((start if op.kind == "F" else end, now))
    return found


def _walk(schedule: Schedule, costs: Costs) -> list[list[Span]]:
    """Every rank goes on as far as it can, until all have run everything or none can go on."""
    clock = Clock(schedule.homes, costs)
    left = [iter(ops) for ops in schedule.ranks]
    heads = [next(rest, None) for rest in left]
    moved = True
    while moved:
        moved = False
        for rank, rest in enumerate(left):
            while (op := heads[rank]) is not None and (arrival := clock.arrival(op)) is not None:
                clock.run(op, arrival)
                heads[rank] = next(rest, None)
                moved = True
    if any(heads):
        raise _deadlock(schedule, heads, clock)
    return clock.spans


def _deadlock(schedule: Schedule, heads: Sequence[Op | None], clock: Clock) -> BadSchedule:
    """Names the ranks of a circle, in which each waits for the next."""
    waits: dict[int, str] = {}
    rank = next(rank for rank, op in enumerate(heads) if op)
    while rank not in waits:
        op = heads[rank]
        assert op is not None
        need = clock.lacks(op)
        home = schedule.homes[need.stage]
        awaited = next(other for other in schedule.ranks[home] if _made(other) == need)
        waits[rank] = f"rank {rank} waits at {op} for {awaited} of rank {home}"
        rank = home
    said = list(waits.values())[list(waits).index(rank) :]
    return BadSchedule(f"schedule {schedule.name}: never ends: {', '.join(said)}")


def _check_ranks(schedule: Schedule) -> None:
    """Refuses what can be seen as wrong of every rank by itself."""
    for rank, fault in _faults(schedule):
        raise BadSchedule(f"schedule {schedule.name}: rank {rank}: {fault}")
    if not schedule.ranks:
        raise BadSchedule(f"schedule {schedule.name}: has no operations")


def _faults(schedule: Schedule) -> Iterator[tuple[int, str]]:
    homes: dict[int, int] = {}
    for rank, ops in enumerate(schedule.ranks):
        if not ops:
            yield rank, "has no operations"
        for op in ops:
            home = homes.setdefault(op.stage, rank)
            if home != rank:
                yield rank, f"{op}: stage {op.stage} is on rank {home} already"
        yield from ((rank, fault) for fault in _faults_in_order(ops))
    whole = schedule.micro_batches
    for stage, rank in homes.items():
        if stage and stage - 1 not in homes:
            yield rank, f"{Op(stage, 'F', 0)}: no rank has stage {stage - 1}"
        done = {op.micro_batch for op in schedule.ranks[rank] if op.stage == stage}
        if len(done) < whole:
            missing = Op(stage, "F", next(number for number in count() if number not in done))
            yield rank, f"{missing} is missing: every stage runs micro-batches 0 to {whole - 1}"


def _faults_in_order(ops: Sequence[Op]) -> Iterator[str]:
    seen: set[Op] = set()
    for op in ops:
        forward, whole, split = (op._replace(kind=kind) for kind in "FBI")
        if op in seen:
            yield f"{op} stands twice"
        if op.kind in "BI" and forward not in seen:
            yield f"{op} stands without {forward} before it"
        if op.kind in "BI" and (other := split if op.kind == "B" else whole) in seen:
            yield f"{op} after {other}: a backward is whole (B) or in two parts (I, W)"
        if op.kind == "W" and split not in seen:
            yield f"{op} stands without {split} before it"
        seen.add(op)
    for op in ops:
        whole, split, weight = (op._replace(kind=kind) for kind in "BIW")
        if op.kind == "F" and not {whole, split} & seen:
            yield f"{op} has no backward: write {whole}, or {split} and {weight}"
        if op.kind == "I" and weight not in seen:
            yield f"{op} has no {weight} after it"
