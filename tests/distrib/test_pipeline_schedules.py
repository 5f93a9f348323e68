"""Schedules against closed forms, PyTorch's own, and a simulation written anew as a graph."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distrib.errors import UserError
from distrib.pipeline import record
from distrib.pipeline.ops import Op, Schedule, parse
from distrib.pipeline.schedules import NAMES, TWO_STAGE, make
from distrib.pipeline.simulate import BadSchedule, Costs, check, memory, simulate

SIZES = [(ranks, count) for ranks in (1, 2, 3, 4, 5, 8) for count in (1, 2, 3, 4, 5, 7, 8, 12, 16)]
STASH = 66.4 / 85.5


def equal(schedule: Schedule, ranks: int, **changed: float) -> Costs:
    """Costs of 1 for what a rank has of the model, however many stages it is in."""
    share = ranks / schedule.stages
    costs = Costs.equal(schedule.stages, share, share, share)
    return replace(costs, held=share, stashed=share * changed.pop("stash", 1.0), **changed)


def needs(op: Op, stages: int) -> Iterator[tuple[int, str, int]]:
    stage, kind, number = op
    if kind == "F":
        yield from [(stage - 1, "F", number)] * (stage > 0)
    elif kind == "W":
        yield stage, "I", number
    else:
        yield stage, "F", number
        yield from [(stage + 1, "I", number)] * (stage + 1 < stages)


def reference(schedule: Schedule, costs: Costs) -> dict[Op, tuple[float, float]]:
    """(start, end) of every operation: the longest path of the graph; a CycleError where there is no way."""
    key = {(op.stage, "I" if op.kind == "B" else op.kind, op.micro_batch): op for ops in schedule.ranks for op in ops}
    home = {op: rank for rank, ops in enumerate(schedule.ranks) for op in ops}
    before = {ops[place]: ops[place - 1] for ops in schedule.ranks for place in range(1, len(ops))}
    graph = {op: {key[need] for need in needs(op, schedule.stages)} for op in home}
    after = {op: found | ({before[op]} if op in before else set()) for op, found in graph.items()}
    found: dict[Op, tuple[float, float]] = {}
    for op in TopologicalSorter(after).static_order():
        waits = [found[need][1] + costs.transfer * (home[need] != home[op]) for need in graph[op]]
        waits += [found[before[op]][1]] if op in before else []
        seconds = {"F": costs.forward, "I": costs.input, "W": costs.weight}.get(op.kind)
        took = seconds[op.stage] if seconds else costs.input[op.stage] + costs.weight[op.stage]
        found[op] = (max(waits, default=0.0), max(waits, default=0.0) + took)
    return found


@pytest.mark.parametrize("ranks", [4, 8])
@pytest.mark.parametrize(
    ("name", "count", "bubble"),
    [
        ("naive", lambda n: 1, lambda n: (n - 1) / n),
        ("naive+2bp", lambda n: 1, lambda n: 2 * (n - 1) / (2 * n + 1)),
        ("gpipe", lambda n: n, lambda n: (n - 1) / (2 * n - 1)),
        ("gpipe+2bp", lambda n: n, lambda n: 2 * (n - 1) / (5 * n - 2)),
        ("1f1b", lambda n: n, lambda n: (n - 1) / (2 * n - 1)),
        ("1f1b+2bp", lambda n: n, lambda n: (n - 1) / (4 * n - 1)),
        ("h1", lambda n: n, lambda n: (n - 1) / (4 * n - 1)),
        ("1f1b", lambda n: 2 * n, lambda n: (n - 1) / (3 * n - 1)),
        ("1f1b+2bp", lambda n: 2 * n, lambda n: (n - 1) / (7 * n - 1)),
        ("h1", lambda n: 2 * n, lambda n: (n - 1) / (7 * n - 1)),
    ],
)
def test_bubbles_are_the_closed_forms(ranks: int, name: str, count: Any, bubble: Any) -> None:
    schedule = make(name, ranks, count(ranks))
    assert simulate(schedule, Costs.equal(ranks)).bubble == pytest.approx(bubble(ranks))


@pytest.mark.parametrize(
    ("ranks", "count", "name", "split", "gain"),
    [
        (4, 1, "naive", "naive+2bp", 1.33),
        (8, 1, "naive", "naive+2bp", 1.41),
        (4, 4, "gpipe", "gpipe+2bp", 1.17),
        (8, 8, "gpipe", "gpipe+2bp", 1.18),
        (4, 4, "1f1b", "h1", 1.40),
        (8, 8, "1f1b", "h1", 1.45),
        (4, 8, "1f1b", "h1", 1.22),
        (8, 16, "1f1b", "h1", 1.25),
    ],
)
def test_what_two_stages_gain(ranks: int, count: int, name: str, split: str, gain: float) -> None:
    seconds = [simulate(make(which, ranks, count), Costs.equal(ranks)).seconds for which in (name, split)]
    assert round(seconds[0] / seconds[1], 2) == gain


@pytest.mark.parametrize("count", [8, 16])
def test_h1_takes_the_time_of_2bp_and_the_memory_of_1f1b(count: int) -> None:
    h1, paper = make("h1", 4, count), make("1f1b+2bp", 4, count)
    costs = replace(Costs.equal(4), stashed=STASH)
    assert simulate(h1, costs).seconds == simulate(paper, costs).seconds
    assert max(simulate(h1, costs).peak_bytes) == 4.0
    # when the first rank has run its last forward, it still holds four, and the stashes of all before
    assert max(simulate(paper, costs).peak_bytes) == pytest.approx(4 + (count - 4) * STASH)


def test_at_measured_costs_the_gain_is_less() -> None:
    costs = Costs.equal(4, 1.0, 1.17, 0.68)
    gains = [simulate(make("1f1b", 4, m), costs).seconds / simulate(make("h1", 4, m), costs).seconds for m in (4, 8)]
    assert [round(gain, 2) for gain in gains] == [1.26, 1.15]


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_runs_everything_at_every_size(name: str) -> None:
    for ranks, count in SIZES:
        schedule = make(name, ranks, count)
        check(schedule)
        assert parse(schedule.text(), name) == schedule
        stages = 2 * ranks if name in ("interleaved", "interleaved+2bp", "v") else ranks
        assert (len(schedule.ranks), schedule.stages, schedule.micro_batches) == (ranks, stages, count)
        splits = any(op.kind == "W" for ops in schedule.ranks for op in ops)
        assert splits == (name in TWO_STAGE) or ranks == 1


@pytest.mark.parametrize(("ranks", "count"), SIZES)
def test_h1_is_fast_in_little_memory(ranks: int, count: int) -> None:
    plain, h1 = make("1f1b", ranks, count), make("h1", ranks, count)
    for stash in (0.3, STASH, 1.0):
        before, after = (simulate(which, equal(which, ranks, stash=stash)) for which in (plain, h1))
        assert before.peak_bytes == tuple(min(ranks - rank, count) for rank in range(ranks))
        assert max(after.peak_bytes) <= max(before.peak_bytes)
        assert after.seconds <= before.seconds
        if count >= ranks:
            assert before.seconds / after.seconds == pytest.approx(
                (3 * count + 3 * ranks - 3) / (3 * count + ranks - 1)
            )


@pytest.mark.parametrize(("ranks", "count"), [(4, 8), (3, 7), (5, 2)])
def test_fewer_pending_take_less_memory_and_no_less_time(ranks: int, count: int) -> None:
    costs = Costs.equal(ranks)
    found = [simulate(make("h1", ranks, count, pending=pending), costs) for pending in range(ranks)]
    for less, more in pairwise(found):
        assert less.seconds >= more.seconds
        assert all(a <= b for a, b in zip(less.peak_bytes, more.peak_bytes, strict=True))
    assert make("h1", ranks, count, pending=ranks - 1) == make("h1", ranks, count)


@pytest.mark.parametrize("seed", range(60))
def test_greedy_is_never_slower_than_h1_under_the_same_cap(seed: int) -> None:
    rng = random.Random(seed)
    ranks, count = rng.randint(1, 6), rng.randint(1, 10)
    forward, input, weight = (tuple(rng.uniform(0.2, 2.0) for _ in range(ranks)) for _ in range(3))
    costs = Costs(forward, input, weight, rng.choice([0.0, 0.1, 1.0]), 1.0, rng.choice([0.3, STASH, 1.0, 1.7]))
    for pending in range(ranks):
        h1 = simulate(make("h1", ranks, count, pending=pending), costs)
        cap = max(max(h1.peak_bytes), costs.stashed)
        greedy = simulate(make("greedy", ranks, count, costs, cap), costs)
        assert greedy.seconds <= h1.seconds
        assert max(greedy.peak_bytes) <= cap * (1 + 1e-9)
    least = max(costs.held, costs.stashed)
    assert max(simulate(make("greedy", ranks, count, costs, least), costs).peak_bytes) <= least * (1 + 1e-9)


def test_greedy_uses_room_and_costs() -> None:
    costs = Costs.equal(4)
    seconds = [simulate(make("greedy", 4, 8, costs, cap), costs).seconds for cap in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[1] > seconds[2]
    # the last rank waits for three forwards; no order of one stage a rank can be faster
    assert seconds[2] == seconds[3] == 3 + 3 * 8
    uneven = Costs((1.0,) * 4, (1.0, 2.0, 1.0, 1.0), (0.6,) * 4, 0.1)
    greedy, *fixed = (simulate(make(name, 4, 8, uneven), uneven).seconds for name in ("greedy", "h1", "1f1b"))
    assert greedy < min(fixed)


@pytest.mark.parametrize("seed", range(40))
def test_times_and_memory_are_those_of_a_graph(seed: int) -> None:
    rng = random.Random(seed)
    ranks, count = rng.randint(1, 5), rng.randint(1, 7)
    schedule = make(rng.choice(NAMES), ranks, count)
    costs = Costs(*(tuple(rng.uniform(0.1, 2.0) for _ in range(schedule.stages)) for _ in range(3)), 0.3, 5.0, 2.0)
    times, timeline = reference(schedule, costs), simulate(schedule, costs)
    spans = [span for rank in timeline.ranks for span in rank]
    for place in (0, 1):
        assert {str(span.op): span[1 + place] for span in spans} == pytest.approx(
            {str(op): time[place] for op, time in times.items()}
        )
    assert timeline.seconds == pytest.approx(max(end for _, end in times.values()))
    busy = sum(end - start for start, end in times.values())
    assert timeline.bubble == pytest.approx(1 - busy / (ranks * timeline.seconds))
    for rank, peak in zip(timeline.ranks, timeline.peak_bytes, strict=True):
        at = {op: (start, end) for op, start, end in rank}
        lives = [
            (at[op][0], at[back][1], 5.0)
            for op in at
            if op.kind == "F"
            for back in at
            if back.kind in "BI" and back[::2] == op[::2]
        ]
        lives += [(at[op][1], at[op._replace(kind="W")][1], 2.0) for op in at if op.kind == "I"]
        # what ends where another thing begins has ended
        held = [sum(size for first, last, size in lives if first <= time < last) for time, _, _ in lives]
        assert peak == pytest.approx(max(held))
        assert memory(rank, costs)[-1][1] == pytest.approx(0)


def test_a_transfer_is_waited_for_between_ranks_alone() -> None:
    costs = replace(Costs.equal(2), transfer=0.5)
    assert simulate(make("naive", 2, 1), costs).seconds == 7.0
    assert simulate(make("v", 1, 1), costs).seconds == 6.0


def torch_orders(schedule: Any, name: str, ranks: int, count: int) -> list[list[str]]:
    told = SimpleNamespace(
        pp_group_size=ranks,
        num_stages=2 * ranks,
        n_local_stages=2,
        _n_microbatches=count,
        number_of_rounds=max(1, count // ranks),
        microbatches_per_round=ranks,
    )
    made = [getattr(schedule, name)._calculate_single_rank_operations(told, rank) for rank in range(ranks)]
    return [[str(action) for action in ops if action is not None] for ops in made]


@pytest.mark.parametrize(("ranks", "count"), [(1, 3), (2, 4), (3, 6), (4, 4), (4, 8), (4, 12)])
@pytest.mark.parametrize(
    ("name", "theirs"), [("interleaved", "ScheduleInterleaved1F1B"), ("v", "ScheduleZBVZeroBubble")]
)
def test_orders_are_pytorchs(name: str, theirs: str, ranks: int, count: int) -> None:
    from torch.distributed.pipelining import schedules

    ours = [[part for op in ops for part in _parts(op, split=name == "v")] for ops in make(name, ranks, count).ranks]
    assert ours == torch_orders(schedules, theirs, ranks, count)


def _parts(op: Op, split: bool) -> list[str]:
    return [f"{op.stage}{kind}{op.micro_batch}" for kind in ("IW" if split and op.kind == "B" else op.kind)]


@pytest.mark.parametrize(("ranks", "count"), [(1, 2), (2, 3), (4, 2), (4, 8)])
@pytest.mark.parametrize("name", NAMES)
def test_pytorchs_runtime_loads_every_text(name: str, ranks: int, count: int, tmp_path: Path) -> None:
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    schedule = make(name, ranks, count)
    runtime: Any = _PipelineScheduleRuntime.__new__(_PipelineScheduleRuntime)
    runtime.pp_group_size, runtime._num_stages, runtime._n_microbatches = ranks, schedule.stages, count
    runtime._stages, runtime._defer_pp_recv, runtime.pipeline_order = [], False, {}
    (tmp_path / "schedule.csv").write_text(schedule.text())
    runtime._load_csv(str(tmp_path / "schedule.csv"))
    assert [list(map(str, runtime.pipeline_order[rank])) for rank in range(ranks)] == [
        list(map(str, ops)) for ops in schedule.ranks
    ]
    assert runtime.stage_index_to_group_rank == schedule.homes


BROKEN = {
    "0F0,0B0\n0F1,0B1\n": "rank 1: 0F1: stage 0 is on rank 0 already",
    "0F0,0F0,0B0\n": "rank 0: 0F0 stands twice",
    "0B0,0F0\n": "rank 0: 0B0 stands without 0F0 before it",
    "0F0,0W0,0I0\n": "rank 0: 0W0 stands without 0I0 before it",
    "0F0,0B0,0I0,0W0\n": "rank 0: 0I0 after 0B0: a backward is whole (B) or in two parts (I, W)",
    "0F0,0I0,0B0,0W0\n": "rank 0: 0B0 after 0I0: a backward is whole (B) or in two parts (I, W)",
    "0F0,0I0\n": "rank 0: 0I0 has no 0W0 after it",
    "0F0,0F1,0B0\n": "rank 0: 0F1 has no backward: write 0B1, or 0I1 and 0W1",
    "0F0,0B0\n2F0,2B0\n": "rank 1: 2F0: no rank has stage 1",
    "1F0,1B0\n": "rank 0: 1F0: no rank has stage 0",
    "0F0,0B0,0F1,0B1\n1F0,1B0\n": "rank 1: 1F1 is missing: every stage runs micro-batches 0 to 1",
    "0F999999999,0B999999999\n": "rank 0: 0F0 is missing: every stage runs micro-batches 0 to 999999999",
    ",\n0F0,0B0\n": "rank 0: has no operations",
    "": "has no operations",
    "0F0,0F1,0B1,0B0\n1F0,1B0,1F1,1B1\n": None,
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n": (
        "never ends: rank 0 waits at 0B0 for 1B0 of rank 1, rank 1 waits at 1F1 for 0F1 of rank 0"
    ),
    "1F0,0F0,0B0,1B0\n": "never ends: rank 0 waits at 1F0 for 0F0 of rank 0",
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_wrong_is_said_in_one_line(text: str) -> None:
    schedule = parse(text, "mine")
    if BROKEN[text] is None:
        check(schedule)
        return
    for way in (check, lambda schedule: simulate(schedule, Costs.equal(2))):
        with pytest.raises(BadSchedule) as refusal:
            way(schedule)
        assert str(refusal.value) == f"schedule mine: {BROKEN[text]}"


def mutated(schedule: Schedule, rng: random.Random) -> Schedule:
    """With an operation gone, one twice, or two swapped of which one needs the other."""
    rank = rng.randrange(len(schedule.ranks))
    ops = list(schedule.ranks[rank])
    place = rng.randrange(len(ops))
    match rng.choice(["gone", "twice", "swapped", "elsewhere"]):
        case "gone":
            del ops[place]
        case "twice":
            ops.insert(rng.randint(0, len(ops)), ops[place])
        case "elsewhere":
            ops[place] = ops[place]._replace(micro_batch=rng.randrange(99))
            ops = ops if ops[place] != schedule.ranks[rank][place] else ops[:-1]
        case _:
            kin = [other for other, op in enumerate(ops) if op[::2] == ops[place][::2]]
            one, two = rng.sample(kin, 2)
            ops[one], ops[two] = ops[two], ops[one]
    return Schedule("mutated", (*schedule.ranks[:rank], tuple(ops), *schedule.ranks[rank + 1 :]))


@pytest.mark.parametrize("name", NAMES)
def test_broken_schedules_are_refused(name: str) -> None:
    rng = random.Random(name)
    for _ in range(60):
        schedule = mutated(make(name, rng.randint(1, 5), rng.randint(1, 6)), rng)
        with pytest.raises(BadSchedule, match=r"^schedule mutated: rank \d+: .*[0-9][FBIW][0-9].*$|operations"):
            check(schedule)


@pytest.mark.parametrize("name", NAMES)
def test_circles_over_ranks_are_those_of_the_graph(name: str) -> None:
    """Orders that are right on every rank by itself: refused where, and only where, the graph has a circle."""
    rng = random.Random(name)
    outcomes = set()
    for _ in range(120):
        schedule = make(name, rng.randint(2, 4), rng.randint(2, 5))
        rows = [list(ops) for ops in schedule.ranks]
        for _ in range(rng.randint(1, 8)):
            ops = rng.choice(rows)
            place = rng.randrange(len(ops) - 1)
            if ops[place][::2] != ops[place + 1][::2]:
                ops[place : place + 2] = ops[place + 1], ops[place]
        shuffled = Schedule("shuffled", tuple(map(tuple, rows)))
        try:
            reference(shuffled, Costs.equal(shuffled.stages))
            runs = True
        except CycleError:
            runs = False
        outcomes.add(runs)
        if runs:
            check(shuffled)
        else:
            with pytest.raises(BadSchedule, match=r"never ends: rank \d waits at \d[FBI]\d for \d[FBI]\d of rank \d"):
                check(shuffled)
    assert outcomes == {True, False}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "h2"}, "schedule='h2': choose naive, gpipe, 1f1b"),
        ({"ranks": 0}, "0 ranks and 4 micro-batches: must be at least 1 each"),
        ({"micro_batches": 0}, "4 ranks and 0 micro-batches"),
        ({"pending": -1}, "pending=-1: must be 0 or more"),
        ({"name": "1f1b", "pending": 1}, "pending=1 with schedule 1f1b: only h1 has it"),
        ({"memory": 2.0}, "memory=2.0 with schedule h1: only greedy has it"),
        ({"name": "greedy", "memory": 0.5}, "memory=0.5 with schedule greedy: one micro-batch takes 1"),
        ({"name": "greedy", "costs": Costs.equal(3)}, "costs of 3 stages for 4 ranks"),
    ],
)
def test_what_cannot_be_made_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        make(**{"name": "h1", "ranks": 4, "micro_batches": 4, **asked})
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_costs_of_other_stages_are_refused() -> None:
    with pytest.raises(UserError, match="costs of 4 stages for its 8"):
        simulate(make("v", 4, 4), Costs.equal(4))


def test_a_recording_comes_back(tmp_path: Path) -> None:
    made = simulate(make("h1", 3, 4), Costs.equal(3))
    recorded = replace(made, step=7, peak_bytes=(12, None, 34))
    record.write(tmp_path / record.FILE, recorded)
    assert record.read(tmp_path) == record.read(tmp_path / record.FILE) == recorded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("[]", "kind"),
        ("{", "Expecting property name"),
        ({"kind": "other"}, "kind"),
        ({"schedule": None}, "schedule must be a name"),
        ({"ranks": 3}, "ranks must be a list"),
        ({"ranks": []}, "no operation in it took any time"),
        ({"ranks": [{"ops": None}]}, "rank 0: ops must be a list"),
        ({"ranks": [{"ops": [["0X0", 0, 1]]}]}, "must be [operation, start, end]"),
        ({"ranks": [{"ops": [["0F0", 2, 1]]}]}, "must be [operation, start, end]"),
        ({"ranks": [{"ops": [["0F0", 0, float("nan")]]}]}, "must be [operation, start, end]"),
        ({"ranks": [{"ops": [["0F0", 1, 2], ["0B0", 0, 1]]}]}, "0B0 starts before 0F0"),
        ({"ranks": [{"peak_bytes": "1", "ops": []}]}, "peak_bytes must be a number of bytes, or null"),
    ],
)
def test_what_is_no_recording_is_said_so(change: Any, said: str, tmp_path: Path) -> None:
    tree = {"kind": record.KIND, "schedule": "h1", "ranks": [{"ops": [["0F0", 0, 1]]}]}
    path = tmp_path / "one.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**tree, **change}))
    with pytest.raises(UserError) as refusal:
        record.read(path)
    assert str(refusal.value).startswith(f"{path}: not a recorded timeline: ")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="no such recording"):
        record.read(tmp_path / "none.json")
