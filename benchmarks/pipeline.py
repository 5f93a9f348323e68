"""Schedules of a pipeline side by side: step time, what they hold, and how near they come to what they promise.

    python benchmarks/pipeline.py [--micro-batches 4,8] [--repeats 11] [--sides "torch 1f1b,h1"]
    python benchmarks/pipeline.py --real [--model 512x8] [--length 256]

Ranks on this machine over gloo, with stages that sleep and send real tensors, so that no rank needs a core: what is
measured is the order and the runtime, not the arithmetic. A rank has as much to do on every side; with two stages
each does half. Sides are schedules of ours, `X by torch` in PyTorch's runtime, and PyTorch's own: `torch 1f1b`
(Schedule1F1B), `torch zb1p` (ScheduleInterleavedZeroBubble). Each repeat runs all sides in turn, the first one
rotating, and ratios pair what one repeat measured.

`own 1f1b` is 1F1B in the same runtime, `fastest` the same of the fastest repeats; `bound` is that ratio on paper, with
equal costs and transfers that take no time. `simulated` is the step time on paper, with what operations took in this
run and what a transfer took before it in this runtime, when there was nothing to do; `off` is how far that is from the
run. `held` is the most that a rank's stages held, in activations of one micro-batch: what waits for the weights'
gradients counts 0.78 (66.4 of 85.5 MB, as measured on a Llama's layers). The table goes to stderr, JSON to stdout.

With `--real`, two ranks train a Llama over bytes by the step of `twobp`, each on a core of its own: on a busy machine
look at `fastest`. `bound` is then for the medians of what F, I and W took on all sides, which stand below the table
with B beside them; `held` is in MiB, above weights and gradients, and other sides than ours run our stages.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from real_pipeline import Model, Trained
from streaming import machine, spread, whole_numbers, with_quartiles
from torch import Tensor
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleavedZeroBubble

from distrib.pipeline.executor import Links, Stage, run
from distrib.pipeline.ops import Schedule, parse
from distrib.pipeline.schedules import make
from distrib.pipeline.simulate import Costs, simulate
from distrib.pipeline.torch_runtime import TorchRuntime, loss, step, torch_stages
from distrib.topology import Topology, connect, read_environment
from launch.spawn import started

ROOT = Path(__file__).resolve().parent.parent
BASE, ZB1P, BY_TORCH, OURS = "torch 1f1b", "torch zb1p", " by torch", "naive"
SIDES = (
    f"{BASE},1f1b,naive,naive+2bp,gpipe,gpipe+2bp,1f1b+2bp,h1,{ZB1P},h1{BY_TORCH},interleaved,interleaved+2bp,v,greedy"
)
REAL_SIDES = "1f1b,1f1b+2bp,h1,gpipe,gpipe+2bp"
STASHED = 66.4 / 85.5

Row = dict[str, Any]
Took = dict[int, dict[str, list[float]]]
"""Seconds of the operations of every stage, by kind."""


def main() -> None:
    options = parse_options()
    if options.result:
        measure(options)
        return
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {"PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        arguments = [*sys.argv[1:], "--result", str(result)]
        with started("pipeline", arguments, options.ranks, environment=environment) as job, job.signals():
            job.wait()
        if job.exit_code():
            sys.exit(job.exit_code())
        found = json.loads(result.read_text())
    for compared in found["tables"]:
        print(table(compared) + "\n", file=sys.stderr)
    print(json.dumps({"machine": machine(), **found}, indent=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=SIDES, help="separated by commas")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--micro-batches", type=whole_numbers, default=[4, 8])
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument(
        "--cost-ms", type=float, default=20.0, help="of a rank's forward, and each half of its backward"
    )
    parser.add_argument("--border-kib", type=int, default=1024, help="of a micro-batch's hidden state (1024)")
    parser.add_argument("--real", action="store_true", help="stages of a real model")
    parser.add_argument("--model", default="512x8", help="with --real: hidden size x layers of a Llama (512x8)")
    parser.add_argument("--length", type=int, default=256, help="with --real: tokens of a micro-batch (256)")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    if parser.parse_known_args()[0].real:
        parser.set_defaults(sides=REAL_SIDES, ranks=2, micro_batches=[2])
    options = parser.parse_args()
    if options.real:
        if ZB1P in options.sides.split(","):
            parser.error(f"--sides {ZB1P}: not with --real")
        options.border_kib = Model.read(options.model, options.length).border_kib
    return options


class Held:
    """What the stages of a rank hold, in activations of a micro-batch."""

    def __init__(self) -> None:
        self.now: dict[tuple[int, int], float] = {}
        self.peak = 0.0

    def put(self, stage: int, micro_batch: int, share: float) -> None:
        self.now[stage, micro_batch] = share
        self.peak = max(self.peak, sum(self.now.values()))


class Sleeper:
    """A stage that takes its time, and notes how much it took."""

    def __init__(self, index: int, count: int, cost_s: float, border: Tensor, held: Held, share: float) -> None:
        self.index, self.last, self.cost_s, self.given = index, index == count - 1, cost_s, border
        self.held, self.share = held, share
        self.took: dict[str, list[float]] = defaultdict(list)

    def border(self, micro_batch: int) -> tuple[torch.Size, torch.dtype]:
        return self.given.shape, self.given.dtype

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        self.held.put(self.index, micro_batch, self.share)
        self._work("F", 1)
        return None if self.last else self.given

    def backward(self, micro_batch: int, received: Tensor | None, whole: bool) -> Tensor | None:
        self._work("B" if whole else "I", 2 if whole else 1)
        self.held.put(self.index, micro_batch, 0 if whole else self.share * STASHED)
        return self.given if self.index else None

    def weights(self, micro_batch: int) -> None:
        self._work("W", 1)
        self.held.put(self.index, micro_batch, 0)

    def _work(self, kind: str, times: int) -> None:
        start = perf_counter()
        sleep(times * self.cost_s)
        self.took[kind].append(perf_counter() - start)


class Side(Protocol):
    """One row on this rank."""

    @property
    def schedule(self) -> Schedule: ...

    def ready(self) -> None:
        """Before each run."""

    def run(self) -> None: ...

    def took(self) -> Took: ...

    def held(self) -> float: ...


@dataclass
class Scripted:
    schedule: Schedule
    stages: dict[int, Sleeper]
    holds: Held
    execute: Callable[[], None]

    def ready(self) -> None: ...

    def run(self) -> None:
        self.execute()

    def took(self) -> Took:
        return {index: dict(stage.took) for index, stage in self.stages.items()}

    def held(self) -> float:
        return self.holds.peak


class Measured(NamedTuple):
    """A row on one rank: when each run began and ended, and what the side says of itself."""

    moments: list[tuple[float, float]]
    took: Took
    held: float


def measure(options: argparse.Namespace) -> None:
    """On every rank."""
    topology = read_environment()
    connect(topology)
    transfer_s = {name: transfer(topology, options, name) for name in (OURS, OURS + BY_TORCH)}
    tables = [compare(topology, options, micro_batches, transfer_s) for micro_batches in options.micro_batches]
    if topology.main:
        known = {"ranks": topology.world, "cost_s": options.cost_ms / 1e3, "border_kib": options.border_kib}
        known |= {"repeats": options.repeats, "transfer_s": transfer_s, "tables": tables}
        Path(options.result).write_text(json.dumps(known))
    dist.destroy_process_group()


def transfer(topology: Topology, options: argparse.Namespace, name: str) -> float:
    """Seconds from the end of an operation to the next one's beginning on another rank, known to all: of a pipeline
    that has one micro-batch on the way and nothing to do."""
    idle = scripted(name, topology, argparse.Namespace(**(vars(options) | {"cost_ms": 0.0})), 1, {})
    hops, took = 2 * (topology.world - 1), []
    for _ in range(20):
        dist.barrier()
        start = perf_counter()
        idle.run()
        took.append((perf_counter() - start) / hops)
    found = [median(took)]
    dist.broadcast_object_list(found)
    return found[0]


def runtime(name: str) -> str:
    """The side that measures its transfers."""
    return OURS + BY_TORCH if name in (BASE, ZB1P) or name.endswith(BY_TORCH) else OURS


def border(kib: int) -> Tensor:
    return torch.zeros(kib, 512, dtype=torch.bfloat16)


def compare(topology: Topology, options: argparse.Namespace, micro_batches: int, transfer_s: dict[str, float]) -> Row:
    names = options.sides.split(",")
    make_side = trained if options.real else scripted
    sides: dict[str, Side] = {name: make_side(name, topology, options, micro_batches, transfer_s) for name in names}
    moments: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for index in range(-1, options.repeats):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            sides[name].ready()
            dist.barrier()
            start = perf_counter()
            sides[name].run()
            moments[name].append((start, perf_counter()))
    mine = {name: Measured(moments[name][1:], sides[name].took(), sides[name].held()) for name in names}
    ranks: list[Any] = [None] * topology.world
    dist.all_gather_object(ranks, mine)
    alike: dict[int, list[Took]] = defaultdict(list)
    for name, side in sides.items():
        alike[side.schedule.stages] += [rank[name].took for rank in ranks]
    ideals = {stages: paper(stages, topology.world / stages, 0.0) for stages in alike}
    found: Row = {"micro_batches": micro_batches}
    if options.real:
        ideals = {stages: measured_costs(tooks, 0.0) for stages, tooks in alike.items()}
        found["took"] = medians(alike[topology.world])
    rows = [
        row(name, sides[name].schedule, [rank[name] for rank in ranks], ideals, transfer_s[runtime(name)])
        for name in names
    ]
    return found | {"rows": against(rows)}


def trained(
    name: str, topology: Topology, options: argparse.Namespace, micro_batches: int, _: dict[str, float]
) -> Trained:
    model = Model.read(options.model, options.length)
    found = Trained("1f1b" if name == BASE else name.removesuffix(BY_TORCH), topology, model, micro_batches)
    if runtime(name) != OURS:
        found.execute = execution(name, found.schedule, found.begun(), topology)
    return found


def scripted(
    name: str, topology: Topology, options: argparse.Namespace, micro_batches: int, transfer_s: dict[str, float]
) -> Scripted:
    schedule = schedule_of(name, topology, options, micro_batches, transfer_s)
    mine = [stage for stage, rank in sorted(schedule.homes.items()) if rank == topology.rank]
    held, share = Held(), 1 / len(mine)
    cost_s, tensor = options.cost_ms / 1e3 * share, border(options.border_kib)
    stages = {index: Sleeper(index, schedule.stages, cost_s, tensor, held, share) for index in mine}
    return Scripted(schedule, stages, held, execution(name, schedule, stages, topology))


def execution(name: str, schedule: Schedule, stages: Mapping[int, Stage], topology: Topology) -> Callable[[], None]:
    """Runs the schedule in the runtime that the side's name says."""
    if name in (BASE, ZB1P):
        whole = {(op.stage, op.micro_batch) for ops in schedule.ranks for op in ops if op.kind == "B"}
        parts = torch_stages(stages, schedule.stages, schedule.micro_batches, topology.device, whole)
        return partial(step, torch_own(name, parts, schedule.micro_batches), schedule.micro_batches)
    if name.endswith(BY_TORCH):
        return TorchRuntime(schedule, stages, topology.device)
    return partial(run, schedule, stages, Links.make(schedule, [range(topology.world)], topology.device))


def schedule_of(
    name: str, topology: Topology, options: argparse.Namespace, micro_batches: int, transfer_s: dict[str, float]
) -> Schedule:
    ranks = topology.world
    if name == ZB1P:
        sleeper = Sleeper(topology.rank, ranks, 0, border(options.border_kib), Held(), 1)
        parts = torch_stages({topology.rank: sleeper}, ranks, micro_batches, topology.device, set())
        order = torch_own(name, parts, micro_batches).pipeline_order
        return parse("\n".join(",".join(str(op or "") for op in order[rank]) for rank in range(ranks)), name)
    name = "1f1b" if name == BASE else name.removesuffix(BY_TORCH)
    costs = None
    if name == "greedy":
        costs = paper(ranks, options.cost_ms / 1e3, transfer_s[OURS])
    return make(name, ranks, micro_batches, costs)


def torch_own(name: str, parts: list[Any], micro_batches: int) -> Any:
    if name == BASE:
        return Schedule1F1B(parts[0], micro_batches, loss_fn=loss, scale_grads=False)
    return ScheduleInterleavedZeroBubble(parts, micro_batches, loss_fn=loss, scale_grads=False)


def paper(stages: int, cost_s: float, transfer_s: float) -> Costs:
    every = (cost_s,) * stages
    return Costs(every, every, every, transfer_s, stashed=STASHED)


def row(name: str, schedule: Schedule, ranks: list[Measured], ideals: dict[int, Costs], transfer_s: float) -> Row:
    """Of what every rank measured; `ideals` are the costs of the bound, by the number of stages."""
    steps = zip(*(rank.moments for rank in ranks), strict=True)
    step_s = [max(end for _, end in step) - min(start for start, _ in step) for step in steps]
    tooks, ideal = [rank.took for rank in ranks], ideals[schedule.stages]
    costs = measured_costs(tooks, transfer_s) if any(tooks) else replace(ideal, transfer=transfer_s)
    on_paper = simulate(schedule, costs)
    plain = simulate(make("1f1b", len(ranks), schedule.micro_batches), ideals[len(ranks)])
    return {
        "side": name,
        "step_s": step_s,
        "simulated_s": on_paper.seconds,
        "error": on_paper.seconds / median(step_s) - 1,
        "bound": plain.seconds / simulate(schedule, ideal).seconds,
        "held": max(rank.held for rank in ranks),
    }


def medians(tooks: Sequence[Took]) -> dict[int, dict[str, float]]:
    seconds: Took = {}
    for took in tooks:
        for stage, kinds in took.items():
            for kind, values in kinds.items():
                seconds.setdefault(stage, {}).setdefault(kind, []).extend(values)
    return {stage: {kind: median(values) for kind, values in seconds[stage].items()} for stage in sorted(seconds)}


def measured_costs(tooks: Sequence[Took], transfer_s: float) -> Costs:
    """Where a stage only has whole backwards, half of one is each part's."""
    stages = medians(tooks).values()
    parts = [[stage.get(kind, stage.get("B", 0.0) / 2) for stage in stages] for kind in "FIW"]
    forward, inputs, weights = map(tuple, parts)
    return Costs(forward, inputs, weights, transfer_s, stashed=STASHED)


def against(rows: list[Row]) -> list[Row]:
    """With ratios to other rows, those there are: how many times as fast."""
    named = {row["side"]: row for row in rows}
    for row in rows:
        own = "1f1b" if runtime(row["side"]) == OURS else BASE
        others = {"torch_1f1b": BASE, "torch_zb1p": ZB1P, "own_1f1b": own}
        for key, other in others.items():
            if other in named:
                pairs = zip(row["step_s"], named[other]["step_s"], strict=True)
                row[key] = spread([theirs / ours for ours, theirs in pairs])
                row[key]["fastest"] = min(named[other]["step_s"]) / min(row["step_s"])
    return rows


OTHERS = ("torch_1f1b", "torch_zb1p", "own_1f1b")
COLUMNS = (
    *("step ms", "x torch 1f1b", "x torch zb1p", "x own 1f1b", "fastest", "bound", "of bound"),
    *("simulated ms", "off", "held"),
)


def table(compared: Row) -> str:
    lines = [f"| M={compared['micro_batches']} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [line(row) for row in compared["rows"]]
    return "\n".join([*lines, *(f"stage {number}: {parts(took)}" for number, took in compared.get("took", {}).items())])


def parts(took: dict[str, float]) -> str:
    """What the operations of a stage took."""
    said = ", ".join(f"{kind} {1e3 * took[kind]:.1f} ms" for kind in "FIWB" if kind in took)
    whole = {"I", "W", "B"} <= took.keys() and f", B/(I+W) {took['B'] / (took['I'] + took['W']):.2f}"
    return said + (whole or "")


def line(row: Row) -> str:
    steps = spread([1e3 * seconds for seconds in row["step_s"]])
    low, high = steps["quartiles"]
    cells = [row["side"], f"{steps['median']:.0f}" + ("" if low is None else f" [{low:.0f}, {high:.0f}]")]
    cells += [with_quartiles(row[key]) if key in row else "-" for key in OTHERS]
    own = row.get("own_1f1b")
    cells += [f"{own['fastest']:.2f}" if own else "-", f"{row['bound']:.2f}"]
    cells += [f"{100 * own['median'] / row['bound']:.0f}%" if own else "-", f"{1e3 * row['simulated_s']:.0f}"]
    return "| " + " | ".join([*cells, f"{100 * row['error']:+.1f}%", f"{row['held']:.2f}"]) + " |"


if __name__ == "__main__":
    main()
