"""The schedules that have a name, as pure functions of ranks and micro-batches.

`+2bp` is the order of 2BP (2405.18047): gradients of weights wait until a rank would idle, or all else is done. `h1`
has the same step time for no more memory than 1F1B (2401.10241 has its like), and is the one to use. `interleaved` and
`v` have two stages a rank: rank r of N holds stages r and N+r, or r and 2N-1-r. `greedy` is the one that looks at
costs and memory; the others are fixed orders. All run with any number of ranks and micro-batches.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

from distrib.errors import UserError, choose
from distrib.pipeline.ops import Op, Schedule
from distrib.pipeline.simulate import Clock, Costs, simulate

Ranks = list[list[Op]]
_ROUNDING = 1e-9


def make(
    name: str,
    ranks: int,
    micro_batches: int,
    costs: Costs | None = None,
    memory: float | None = None,
    pending: int | None = None,
) -> Schedule:
    """The schedule of that name.

    `greedy` arranges for `costs` (equal ones) within `memory` a rank, in the units of `costs.held` (what 1F1B takes);
    `h1` delays at most `pending` gradients of weights on a rank, which lowers its memory and lengthens its step.
    """
    if name not in NAMES:
        raise choose("schedule", name, NAMES)
    if ranks < 1 or micro_batches < 1:
        raise UserError(f"schedule {name}: {ranks} ranks and {micro_batches} micro-batches: must be at least 1 each")
    for field, value, owner in (("pending", pending, "h1"), ("memory", memory, "greedy")):
        if value is not None and name != owner:
            raise UserError(f"{field}={value} with schedule {name}: only {owner} has it")
    if pending is not None and pending < 0:
        raise UserError(f"pending={pending}: must be 0 or more")
    if name == "greedy":
        return _greedy(ranks, micro_batches, costs or Costs.equal(ranks), memory)
    if name == "h1":
        return _named(name, _h1(ranks, micro_batches, pending))
    order = _ORDERS[name.removesuffix("+2bp")](ranks, micro_batches)
    return _named(name, _two_stage(order) if name.endswith("+2bp") else order)


def _named(name: str, ranks: Ranks) -> Schedule:
    return Schedule(name, tuple(tuple(_whole(ops)) for ops in ranks))


def _whole(ops: Iterable[Op]) -> Iterator[Op]:
    """A split backward whose parts meet is a whole one, which is cheaper to run, where no rank waits for its first."""
    rest = deque(ops)
    while rest:
        op = rest.popleft()
        if rest and op.stage == 0 and op.kind == "I" and rest[0] == op._replace(kind="W"):
            rest.popleft()
            op = op._replace(kind="B")
        yield op


def _naive(ranks: int, micro_batches: int) -> Ranks:
    return [[Op(rank, kind, number) for number in range(micro_batches) for kind in "FB"] for rank in range(ranks)]


def _gpipe(ranks: int, micro_batches: int) -> Ranks:
    return [[Op(rank, kind, number) for kind in "FB" for number in range(micro_batches)] for rank in range(ranks)]


def _1f1b(ranks: int, micro_batches: int) -> Ranks:
    """As many forwards ahead as there are ranks behind, then a forward, a backward."""
    made = []
    for rank in range(ranks):
        forwards, backwards = ([Op(rank, kind, number) for number in range(micro_batches)] for kind in "FB")
        made.append(_in_turn(forwards, backwards, ranks - rank - 1))
    return made


def _in_turn(forwards: Sequence[Op], backwards: Sequence[Op], ahead: int) -> list[Op]:
    pairs = zip_longest(forwards[ahead:], backwards)
    return [*forwards[:ahead], *(op for pair in pairs for op in pair if op)]


def _h1(ranks: int, micro_batches: int, pending: int | None = None) -> Ranks:
    """1F1B in which rank r, with r forwards fewer ahead than rank 0, has up to r gradients of weights wait instead."""
    made: Ranks = []
    for rank, ops in enumerate(_1f1b(ranks, micro_batches)):
        waiting: deque[Op] = deque()
        made.append([])
        for op in ops:
            made[rank].append(op._replace(kind="I") if op.kind == "B" else op)
            if op.kind == "B":
                waiting.append(op._replace(kind="W"))
            if len(waiting) > (rank if pending is None else min(rank, pending)):
                made[rank].append(waiting.popleft())
        made[rank] += waiting
    return made


def _interleaved(ranks: int, micro_batches: int) -> Ranks:
    """1F1B over two stages a rank, which take turns by as many micro-batches as there are ranks (2104.04473)."""
    rounds = range(-(-micro_batches // ranks))
    made = []
    for rank in range(ranks):
        turns = [(part, turn * ranks + number) for turn in rounds for part in (0, 1) for number in range(ranks)]
        forwards = [Op(part * ranks + rank, "F", number) for part, number in turns]
        backwards = [Op((1 - part) * ranks + rank, "B", number) for part, number in turns]
        ops = _in_turn(forwards, backwards, 2 * (ranks - rank - 1) + ranks)
        made.append([op for op in ops if op.micro_batch < micro_batches])
    return made


def _v(ranks: int, micro_batches: int) -> Ranks:
    """ZB-V (2401.10241, section 6): the stages go down the ranks and back up, so that rank 0 has the first and last."""
    most = max(micro_batches, 2 * ranks - 1)
    made = []
    for rank in range(ranks):
        row = _Row()
        down, up = rank, 2 * ranks - 1 - rank
        row.add(down, "F", 2 * (ranks - rank) - 1)
        for _ in range(rank):
            row.add(up, "F")
            row.add(down, "F")
        row.add(up, "FIW", ranks - rank)
        while row.runs[up, "F"] < most:
            row.add(down, "FIW" if row.runs[down, "F"] < most else "IW")
            row.add(up, "FIW")
        for _ in range(rank):
            row.add(down, "I")
            row.add(up, "I")
        row.add(down, "IW", ranks - rank)
        row.add(up, "W", rank)
        row.add(down, "W", rank)
        made.append([op for op in row.ops if op.micro_batch < micro_batches])
    return made


class _Row:
    """A rank's operations, each kind of a stage going through the micro-batches in order."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.runs: Counter[tuple[int, str]] = Counter()

    def add(self, stage: int, kinds: str, times: int = 1) -> None:
        for kind in kinds * times:
            self.ops.append(Op(stage, kind, self.runs[stage, kind]))
            self.runs[stage, kind] += 1


def _two_stage(ranks: Ranks) -> Ranks:
    """Gradients of weights where the rank would idle if they took no time, and the others at the end."""
    whole = Schedule("", tuple(map(tuple, ranks)))
    made: Ranks = []
    for spans in simulate(whole, Costs.equal(whole.stages, weight=0.0)).ranks:
        waiting: deque[Op] = deque()
        ops: list[Op] = []
        time = 0.0
        for op, start, end in spans:
            while waiting and time + 1 <= start:
                ops.append(waiting.popleft())
                time += 1
            ops.append(op._replace(kind="I") if op.kind == "B" else op)
            if op.kind == "B":
                waiting.append(op._replace(kind="W"))
            time = end
        made.append([*ops, *waiting])
    return made


def _greedy(ranks: int, micro_batches: int, costs: Costs, memory: float | None) -> Schedule:
    """The fastest of what fits: h1 with fewer and fewer pending, and several ways of taking what can run next."""
    if len(costs.forward) != ranks:
        raise UserError(f"schedule greedy: costs of {len(costs.forward)} stages for {ranks} ranks: give one a rank")
    least = max(costs.held, costs.stashed)
    cap = min(ranks, micro_batches) * least if memory is None else memory
    if cap < least:
        raise UserError(f"memory={cap:g} with schedule greedy: one micro-batch takes {least:g}")
    tried = [_h1(ranks, micro_batches, pending) for pending in range(ranks)]
    tried += [_Taking(costs, cap, micro_batches, eager).ranks() for eager in (False, True)]
    found = []
    for schedule in (_named("greedy", ops) for ops in tried):
        timeline = simulate(schedule, costs)
        found.append((timeline.seconds, max(peak or 0.0 for peak in timeline.peak_bytes), schedule))
    return min((one for one in found if one[1] <= cap * (1 + _ROUNDING)), key=lambda one: one[:2])[2]


class _Taking:
    """Each rank takes what can start first: of several a gradient of an input, then a forward that fits the cap.

    An eager rank has as many forwards ahead as fit and never idles; another has as many as in 1F1B, and rather waits
    for what is about to arrive than delay it by a gradient of weights.
    """

    def __init__(self, costs: Costs, cap: float, micro_batches: int, eager: bool) -> None:
        self._costs, self._micro_batches, self._eager = costs, micro_batches, eager
        self._cap = cap * (1 + _ROUNDING)
        self._rows = [_Row() for _ in costs.forward]
        self._clock = Clock({rank: rank for rank in range(len(self._rows))}, costs)

    def ranks(self) -> Ranks:
        everything = 3 * len(self._rows) * self._micro_batches
        for _ in range(everything):
            start, _, op = min(filter(None, map(self._next, range(len(self._rows)))))
            self._clock.run(op, start)
            self._rows[op.stage].add(op.stage, op.kind)
        return [row.ops for row in self._rows]

    def _next(self, rank: int) -> tuple[float, int, Op] | None:
        starts: dict[str, float] = {}
        for kind in self._possible(rank):
            if (arrival := self._clock.arrival(self._op(rank, kind))) is not None:
                starts[kind] = max(arrival, self._clock.free(rank))
        if not starts:
            return None
        if not self._eager and "W" in starts:
            end = starts["W"] + self._costs.weight[rank]
            starts = {kind: start for kind, start in starts.items() if kind != "W" and start < end} or starts
        first = min(starts, key=lambda kind: starts[kind])
        return starts[first], rank, self._op(rank, first)

    def _possible(self, rank: int) -> Iterator[str]:
        forward, input, weight = (self._rows[rank].runs[rank, kind] for kind in "FIW")
        ahead, waiting = forward - input, input - weight
        held, stashed = self._costs.held, self._costs.stashed
        taken = held * ahead + stashed * waiting
        if ahead and taken - held + stashed <= self._cap:
            yield "I"
        # room for a forward is room for its stash, so that the rank can always get on
        fits = taken + max(held, stashed) <= self._cap
        if forward < self._micro_batches and fits and (self._eager or ahead < len(self._rows) - rank):
            yield "F"
        if waiting:
            yield "W"

    def _op(self, rank: int, kind: str) -> Op:
        return Op(rank, kind, self._rows[rank].runs[rank, kind])


_ORDERS: dict[str, Callable[[int, int], Ranks]] = {
    "naive": _naive,
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved": _interleaved,
    "v": _v,
}
TWO_STAGE = ("naive+2bp", "gpipe+2bp", "1f1b+2bp", "h1", "interleaved+2bp", "v", "greedy")
"""Those that run the backward in two parts."""
NAMES = ("naive", "gpipe", "1f1b", "interleaved", *TWO_STAGE)
