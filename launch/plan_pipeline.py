"""The plan of a pipeline: which schedule, which layers a stage, how many micro-batches; how fast, and what fits.

Stages are timed here, layer by layer, and run without data to count what they hold (`launch/stages.py`). Every schedule
is then simulated with that. What it says of speed holds for this machine's devices, and leaves out the optimizer, data
parallelism's exchange and the loading of data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import strategies
from distrib.engines import check as check_engine
from distrib.errors import Refused, UserError
from distrib.pipeline.channels import AHEAD, traffic
from distrib.pipeline.ops import Op, Schedule
from distrib.pipeline.schedules import NAMES, make
from distrib.pipeline.simulate import Costs, simulate
from distrib.topology import Topology
from launch.forecast import kinds_of
from launch.models import build, load_config, refuse_packing
from launch.recipe_file import global_batch
from launch.settings import settings_of
from launch.shares import SINGLE, optimizer_bytes
from launch.stages import Border, Held, Places, Workshop, measure
from strategies.core.prepare import causal_lm
from strategies.pipelining.partition import Partition, balance, partition

if TYPE_CHECKING:
    from launch.device import Device
    from launch.recipe import Recipe

CLASSES = ("weights", "gradients", "optimizer", "activations", "waiting", "workspace")
"""As elsewhere; `activations` are those of micro-batches between their forward and the gradient of their input,
`waiting` is what gradients of weights are made of later."""
BASELINE = "1f1b"
ALIKE = 1.01
"""Steps whose times are this near each other are equally fast."""
MOST_OPS = 2**15
SIZES = 3
"""Micro-batch sizes that are looked at."""

Row = dict[str, Any]


def pipelined(chosen: Sequence[strategies.Strategy], world: int) -> bool:
    return max((strategy.pipeline(world) for strategy in chosen), default=1) > 1


@dataclass
class PipelinePlanner:
    """One recipe, whose strategies are `chosen`, on `device.count` devices."""

    recipe: Recipe
    device: Device
    chosen: Sequence[strategies.Strategy]

    def __post_init__(self) -> None:
        recipe, world = self.recipe, self.device.count
        self.config = load_config(recipe)
        if recipe.packing:
            refuse_packing(self.config)
        if recipe.objective.name != "sft":
            raise Refused(f"objective={recipe.objective.name}: a plan counts sft only; set objective=sft")
        self.ranks = max(strategy.pipeline(world) for strategy in self.chosen)
        self.topology = Topology(
            world=world,
            device_type=self.device.type,
            tensor=recipe.engine.tensor_parallel,
            stages=self.ranks,
            context=recipe.engine.context_parallel,
        )
        strategies.check(self.chosen, self.config, self.topology, recipe.compile)
        settings = settings_of(recipe)
        check_engine(recipe.engine.name, settings, self.topology)
        assert settings.optimizer is not None
        self.spec = settings.optimizer
        self.replicas = self.topology.data_world
        self.rows = global_batch(recipe, self.replicas) // self.replicas
        beside = tuple(strategy for strategy in self.chosen if strategy.pipeline(world) == 1)
        self.workshop = Workshop(recipe, self.config, beside)
        self.model = build(recipe, self.config)
        self.whole = partition(causal_lm(self.model), self.ranks)
        self._places: dict[int, Places] = {}
        self._held: dict[Any, Held] = {}
        self._static: dict[Any, list[dict[str, int]]] = {}

    def on(self, device: Device) -> PipelinePlanner:
        """The same for another number of the same devices, with what was measured and counted so far."""
        other = PipelinePlanner(self.recipe, device, self.chosen)
        if other.ranks == self.ranks:
            other._places, other._held = self._places, self._held
        return other

    @cached_property
    def kinds(self) -> list[Any]:
        return kinds_of(self.model, self.config)

    @cached_property
    def border(self) -> Border:
        return self.workshop.border(self.whole)

    def border_bytes(self, rows: int) -> int:
        inner, dtype = self.border
        return rows * self.recipe.max_length * inner.numel() * dtype.itemsize

    def sizes(self) -> list[int]:
        """Rows of a micro-batch: the recipe's, and smaller ones that make the same global batch."""
        most = self.recipe.per_device_train_batch_size
        return [rows for rows in range(most, 0, -1) if most % rows == 0][:SIZES]

    def places(self, rows: int) -> Places | None:
        """None for a device that is elsewhere."""
        if not self.device.here:
            return None
        if rows not in self._places:
            kind = self.device.type
            self._places[rows] = measure(self.workshop, self.whole, self.kinds, self.border, rows, kind)
        return self._places[rows]

    def partition(self, stages: int, rows: int) -> Partition:
        """Balanced by what layers take here; else by the number of their weights, as in training."""
        places = self.places(rows)
        if places is None:
            return partition(causal_lm(self.model), stages)
        if stages > len(self.whole.layers):
            raise Refused(f"{stages} stages for {len(self.whole.layers)} layers: each stage needs one")
        return replace(self.whole, bounds=balance(places.weights, stages, 0.0))

    def held(self, parts: Partition, rows: int) -> list[Held]:
        """Of every stage; those of the same layers are counted once."""
        found = []
        for stage in range(parts.stages):
            start, stop = parts.bounds[stage : stage + 2]
            key = (rows, start == 0, stop == len(parts.layers), *self.kinds[start:stop])
            if key not in self._held:
                self._held[key] = self.workshop.held(parts, stage, self.border, rows, self.device.type)
            found.append(self._held[key])
        return found

    def costs(self, parts: Partition, rows: int) -> Costs | None:
        places = self.places(rows)
        if places is None:
            return None
        stages = [places.stage(*parts.bounds[stage : stage + 2]) for stage in range(parts.stages)]
        transfer = self.border_bytes(rows) / self.device.link if self.device.link else 0.0
        forward, input, weight = zip(*stages, strict=True)
        return Costs(forward, input, weight, transfer)

    def row(self, name: str, micro_batches: int, rows: int) -> Row:
        row: Row = {"schedule": name, "micro_batches": micro_batches, "rows": rows}
        row["global_batch"] = micro_batches * rows * self.replicas
        try:
            form = make(name, self.ranks, 1)
            parts = self.partition(form.stages, rows)
            costs, held = self.costs(parts, rows), self.held(parts, rows)
            static = self.static(parts, held, form.homes)
            schedule = self._schedule(name, micro_batches, costs, held, static)
        except UserError as error:
            return row | {"status": "refused", "why": str(error)}
        if schedule is None:
            return row | {
                "status": "unknown",
                "why": "it follows from the stages' times, which are not known",
            }
        peaks = [self.peak(rank, schedule, held, static[rank], rows) for rank in range(self.ranks)]
        total = max(sum(peak.values()) for peak in peaks)
        return row | {
            "status": "fits" if total <= self.device.usable_bytes else "too large",
            "layers": [stop - start for start, stop in zip(parts.bounds, parts.bounds[1:], strict=False)],
            "ranks": peaks,
            "peak_bytes": total,
            **self._speed(schedule, costs, rows),
            "text": schedule.text() if name == "greedy" else None,
        }

    def _schedule(
        self,
        name: str,
        micro_batches: int,
        costs: Costs | None,
        held: Sequence[Held],
        static: Sequence[Mapping[str, int]],
    ) -> Schedule | None:
        if name != "greedy":
            return make(name, self.ranks, micro_batches)
        if costs is None:
            return None
        # One figure for all stages: the dearest one's.
        room = self.device.usable_bytes - max(sum(one.values()) for one in static)
        room -= max(max(one.within["I"], one.within["W"], one.within["F"] - one.forward) for one in held)
        forward, stashed = max(one.forward for one in held), max(one.stashed for one in held)
        if room < max(forward, stashed):
            raise Refused("not even one micro-batch fits")
        costs = replace(costs, held=forward, stashed=stashed)
        return make(name, self.ranks, micro_batches, costs, memory=room)

    def _speed(self, schedule: Schedule, costs: Costs | None, rows: int) -> Row:
        """Against 1F1B with whole backwards, and against a device that has the whole model."""
        if costs is None:
            return dict.fromkeys(("seconds", "bubble", "speedup_1f1b", "speedup_device", "tokens_per_s"))
        line, places, count = simulate(schedule, costs), self.places(rows), schedule.micro_batches
        plain_costs = self.costs(self.partition(self.ranks, rows), rows)
        assert places is not None
        assert plain_costs is not None
        plain = simulate(make(BASELINE, self.ranks, count), plain_costs)
        return {
            "seconds": line.seconds,
            "bubble": line.bubble,
            "speedup_1f1b": plain.seconds / line.seconds,
            "speedup_device": count * sum(places.whole) / line.seconds,
            "tokens_per_s": count * rows * self.replicas * self.recipe.max_length / line.seconds,
        }

    def static(self, parts: Partition, held: Sequence[Held], homes: Mapping[int, int]) -> list[dict[str, int]]:
        """What a rank has all the time, by rank; one that has both ends has what they share once."""
        key = (parts.bounds, *sorted(homes.items()), *(one.lasting for one in held))
        if key not in self._static:
            self._static[key] = [self._of_rank(rank, parts, held, homes) for rank in range(self.ranks)]
        return self._static[key]

    def _of_rank(self, rank: int, parts: Partition, held: Sequence[Held], homes: Mapping[int, int]) -> dict[str, int]:
        inner = causal_lm(self.model)
        own = [stage for stage, home in homes.items() if home == rank]
        names = dict.fromkeys(name for stage in own for name in parts.names(stage))
        parameters = {id(p): p for name in names for p in inner.get_submodule(name).parameters()}
        return self._shares(list(parameters.values()), sum(held[stage].lasting for stage in own))

    def _shares(self, parameters: Sequence[Any], lasting: int) -> dict[str, int]:
        """Under fsdp2 a stage's weights stay gathered through a step, in the precision of the products, and its
        gradients are whole in float32 until the end."""
        trained = [p for p in parameters if p.requires_grad]
        width, weights = 1, sum(p.nbytes for p in parameters) + lasting
        if self.recipe.engine.name == "fsdp2":
            width, element = self.replicas, 2 if self.recipe.bf16 else SINGLE
            weights = -(-sum(p.nbytes for p in parameters) // width) + lasting
            weights += sum(p.numel() * (element if p.is_floating_point() else p.itemsize) for p in parameters)
        shapes = [(-(-p.shape[0] // width), *p.shape[1:]) for p in trained if p.ndim]
        states, temporary = optimizer_bytes(self.spec, shapes, self.device.type)
        gradients = SINGLE * sum(p.numel() for p in trained)
        return {"weights": weights, "gradients": gradients, "optimizer": states, "update": temporary}

    def peak(
        self, rank: int, schedule: Schedule, held: Sequence[Held], static: Mapping[str, int], rows: int
    ) -> dict[str, int]:
        """The classes at the moment at which the rank holds most, in its operations or in the update after them."""
        channels = sum(rank in (channel.sender, channel.receiver) for channel in traffic(schedule))
        mail = AHEAD * channels * self.border_bytes(rows)
        there = {"weights": static["weights"], "gradients": 0, "optimizer": static["optimizer"]}
        at_end = there | {"gradients": static["gradients"], "activations": 0, "waiting": 0}
        highest = at_end | {"workspace": static["update"]}
        for op, activations, waiting in moments(schedule.ranks[rank], held):
            if op.kind != "F":
                there["gradients"] = static["gradients"]
            now = there | {"activations": activations, "waiting": waiting}
            now["workspace"] = held[op.stage].within[op.kind] + mail
            highest = max(highest, now, key=lambda one: sum(one.values()))
        return highest


def moments(ops: Sequence[Op], held: Sequence[Held]) -> Iterator[tuple[Op, int, int]]:
    """Every operation of a rank, with the bytes of activations and of what waits before it."""
    activations = waiting = 0
    for op in ops:
        one = held[op.stage]
        yield op, activations, waiting
        activations += one.forward if op.kind == "F" else -one.forward if op.kind in "BI" else 0
        waiting += {"I": one.stashed, "W": -one.stashed}.get(op.kind, 0)


def plan_pipeline(recipe: Recipe, device: Device, sections: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows for every schedule and micro-batch size, others with more micro-batches, and the recommendation."""
    planner = PipelinePlanner(recipe, device, strategies.build(sections))
    size, ranks = recipe.per_device_train_batch_size, planner.ranks
    now = planner.rows // size
    if now * ranks > MOST_OPS:
        raise Refused(f"{now} micro-batches on {ranks} ranks: a plan simulates at most {MOST_OPS} of all ranks")
    rows = [planner.row(name, planner.rows // rows, rows) for rows in planner.sizes() for name in NAMES]
    counts = [count for count in (ranks, 2 * ranks, 4 * ranks) if count > now]
    return {
        "model": recipe.model_name_or_path,
        "max_length": recipe.max_length,
        "device": device.as_dict(),
        "pipeline": {
            "engine": recipe.engine.name,
            "ranks": ranks,
            "replicas": planner.replicas,
            "global_batch": planner.rows * planner.replicas,
            "transfer_bytes": planner.border_bytes(size),
            "link_bytes_per_s": device.link,
            "costs": [_costs(rows, planner.places(rows)) for rows in planner.sizes()],
        },
        "rows": rows,
        "more_micro_batches": [planner.row(name, count, size) for count in counts for name in (BASELINE, "h1")],
        "recommendation": _advice(planner, rows, [one for one in sections if one["name"] not in ("twobp", "plain")]),
    }


def _advice(planner: PipelinePlanner, rows: Sequence[Row], beside: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With the recipe's keys that follow it."""
    best, reason = recommend(rows)
    if best is None:
        return {"schedule": None, "reason": reason, "recipe": None}
    pipeline = {"name": "twobp", "stages": planner.ranks, "schedule": best["schedule"], "layers": best["layers"]}
    found = {"strategy": [pipeline, *beside], "per_device_train_batch_size": best["rows"]}
    found["gradient_accumulation_steps"] = best["micro_batches"]
    kept = ("schedule", "layers", "micro_batches", "rows", "text")
    return {key: best[key] for key in kept} | {"reason": reason, "recipe": found}


def _costs(rows: int, places: Places | None) -> dict[str, Any]:
    """Seconds of forward, gradient of the input, gradients of the weights, at each layer's place."""
    if places is None:
        return {"rows": rows, "layers": None, "empty": None, "repetitions": None}
    return {
        "rows": rows,
        "layers": [list(one) for one in places.layers],
        "empty": list(places.empty),
        "repetitions": places.repetitions,
    }


def recommend(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """Of what fits and is as fast as the fastest, what holds least; and why."""
    fitting = [row for row in rows if row["status"] == "fits"]
    timed = [row for row in fitting if row["seconds"] is not None]
    if not fitting:
        return None, "no schedule fits: more stages, shorter rows, a smaller micro-batch, recompute or bf16 are left"
    if not timed:
        return (
            None,
            "times are measured on the device itself, which is not here; begin with h1",
        )
    # Micro-batches of another size have another baseline: what counts are tokens.
    fastest = max(row["tokens_per_s"] for row in timed)
    alike = [row for row in timed if row["tokens_per_s"] * ALIKE >= fastest]
    best = min(alike, key=lambda row: (row["peak_bytes"], NAMES.index(row["schedule"])))
    others = f", and of {len(alike)} as fast the one that holds least" if len(alike) > 1 else ""
    return best, f"the fastest of {len(timed)} that fit{others}"
