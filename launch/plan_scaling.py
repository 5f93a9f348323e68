"""A plan over nodes: what a step takes under every engine, on 1, 2, ... nodes of the devices that are described.

It is arithmetic on what is known. Messages follow from the engines (`launch/scaling.py`), their times from stated links
(`launch/scaling_time.py`), computing from layers that are timed here or from a stated rate, pipelines from their
simulation, memory from `launch/plan.py` and `launch/plan_pipeline.py`. What is not known is null.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from distrib.errors import Refused, UserError
from distrib.pipeline.simulate import Costs
from launch import sides
from launch.device import Device
from launch.forecast import Regime
from launch.layer_times import LayerTimes, layer_times, update_s
from launch.machine import host
from launch.models import build
from launch.plan import Planner, engines_of, label_of, refuse_split, unheard
from launch.plan_pipeline import PipelinePlanner, pipelined
from launch.recipe import Engine, Recipe
from launch.recipe_file import global_batch
from launch.scaling import Group, Message, Part, Script, ddp, fsdp2, parts_of, sent_bytes, together, zero
from launch.scaling_pipeline import Pipeline, beside
from launch.scaling_time import Computes, Link, Links, Spent, spent
from launch.shares import SINGLE, share_of
from strategies.core.contract import overrides

ENGINES = "ddp,fsdp2,zero1,zero2,zero3"
FORWARD = 1 / 3
"""Of the operations of a forward and its backward."""

Row = dict[str, Any]


def nodes_of(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise UserError(f"--nodes {text}: numbers of nodes divided by commas, as 1,2,4,64")
    found = [int(part) for part in text.split(",")]
    if twice := [one for one in found if found.count(one) > 1]:
        raise UserError(f"--nodes {text}: {twice[0]} is listed twice; name each once")
    return found


def links_of(device: Device) -> Links:
    """A link has a rate and a latency: with one of them alone it is not known."""

    def link(rate: float | None, latency: float | None) -> Link | None:
        return None if rate is None or latency is None else Link(rate, latency)

    within, between = link(device.link, device.latency), link(device.node_link, device.node_latency)
    return Links(within, between, gloo=device.type == "cpu")


def script_of(
    engine: Engine, recipe: Recipe, parts: Sequence[Part], group: Group, micro_batches: int, hides: bool
) -> Script:
    element = 2 if recipe.bf16 else SINGLE
    if engine.name == "ddp":
        return ddp(parts, group, micro_batches, hides)
    if engine.name == "fsdp2":
        return fsdp2(parts, element, group, micro_batches, hides)
    return zero(parts, engine.stage, element, group, micro_batches, hides)


def hides(engine: Engine, device_type: str) -> bool:
    """Whether what is exchanged goes on beside the computing: on a CPU only DDP does not wait for it."""
    return device_type == "cuda" or engine.name == "ddp"


@dataclass
class Scale:
    """One recipe on nodes of `node.count` devices. What is timed and traced is so once, for all numbers of nodes."""

    recipe: Recipe
    node: Device

    def __post_init__(self) -> None:
        self.planner = Planner(self.recipe, self.node)
        self.parts = parts_of(build(self.recipe, self.planner.config))
        self.links = links_of(self.node)
        self._times: dict[Any, LayerTimes] = {}
        self._pipelines: dict[tuple[str, str], PipelinePlanner] = {}

    def row(self, nodes: int, side: str, engine: Engine) -> Row:
        device = replace(self.node, count=nodes * self.node.count)
        row: Row = {"nodes": nodes, "devices": device.count, "strategy": side, "engine": label_of(engine)}
        try:
            if side in sides.BASELINES:
                raise Refused("its exchanges are not predicted; name a strategy")
            if pipelined(sides.strategies_of(side), device.count):
                return row | self._pipelined(device, side, engine)
            return row | self._flat(device, side, engine)
        except UserError as refusal:
            return row | {"status": "refused", "why": str(refusal)}

    def _flat(self, device: Device, side: str, engine: Engine) -> Row:
        """Every device has the whole of the model, or a share of all of it."""
        recipe, planner = self.recipe.model_copy(update={"engine": engine}), self.planner.on(device)
        if any(overrides(strategy, "step") for strategy in sides.strategies_of(side)):
            raise Refused("its passes are its own, and what they exchange is not predicted")
        if engine.offload:
            raise Refused("engine.offload=true: what goes to host memory and back is not predicted; set it to false")
        rows = global_batch(recipe, device.count)
        planned = planner.row(side, engine)
        if "why" in planned:
            return {"status": planned["status"], "why": planned["why"]}
        count = rows // (device.count * recipe.per_device_train_batch_size)
        group = together([range(device.count)], self.node.count)
        script = script_of(engine, recipe, self.parts, group, count, hides(engine, device.type))
        computes = self._computes(side, engine, planned["flops"])
        share = share_of(engine, recipe, planner.sizes, planner.spec, device.count, device.type)
        updated = planner.sizes.trainable / (1 if engine.name == "ddp" else device.count)
        held = planned["bytes"] | {"gathered": 0}
        if not share.as_run:
            held["gathered"] = max(0, round(held["weights"] - share.weights))
            held["weights"] -= held["gathered"]
        return {
            "status": planned["status"],
            "global_batch": rows,
            "micro_batches": count,
            "stages": None,
            "bytes": held,
            "total_bytes": planned["total_bytes"],
        } | self._figures(device, rows, list(script.messages()), spent(script, computes, self.links.seconds), updated)

    def _figures(
        self,
        device: Device,
        rows: int,
        messages: Sequence[Message],
        time: Spent,
        updated: float,
        idle_s: float | None = 0.0,
    ) -> Row:
        """`updated` are the elements that a rank's optimizer has. The efficiency is against one device that does its
        share of the rows alone, with the whole optimizer."""
        tokens = rows * self.recipe.max_length
        each_s = self.update_s
        optimizer_s = None if each_s is None else each_s * updated
        step_s = None
        if time.compute_s is not None and time.exposed_s is not None and idle_s is not None:
            step_s = time.compute_s + time.exposed_s + idle_s + (optimizer_s or 0.0)
        alone_s = None if time.compute_s is None else time.compute_s + (each_s or 0.0) * self.planner.sizes.trainable
        joules = self.node.power * device.count * step_s if self.node.power and step_s else None
        return {
            "sent_bytes": sent_bytes(messages, self.links.gloo),
            "messages": sum(message.times for message in messages),
            "compute_s": time.compute_s,
            "exchange_s": time.exchange_s,
            "exposed_s": time.exposed_s,
            "hidden_s": time.hidden_s,
            "idle_s": idle_s,
            "optimizer_s": optimizer_s,
            "step_s": step_s,
            "tokens_per_s": tokens / step_s if step_s else None,
            "efficiency": alone_s / step_s if step_s and alone_s is not None else None,
            "joules_per_token": joules / tokens if joules else None,
        }

    def _pipelined(self, device: Device, side: str, engine: Engine) -> Row:
        found = Pipeline(self._planner(device, side, engine), self.node.count)
        if self.node.flops:
            inner = sides.side_of(beside(sides.sections(side)))
            flops = self.planner.forecast(inner, self._regime(engine)).flops(self.recipe.max_length)
            costs: Costs | None = found.reckoned(self._by_rate(flops, self.node.flops))
        else:
            costs = found.timed(self.crowding)
        time, idle_s = found.spent(costs, self.links.seconds)
        every = [sum(found.messages(rank), ()) for rank in range(found.planner.ranks)]
        busiest = max(every, key=lambda one: sum(sent_bytes(one, self.links.gloo).values()))
        total, rows = sum(found.peak.values()), found.planner.rows * found.planner.replicas
        return {
            "status": "fits" if total <= device.usable_bytes else "too large",
            "global_batch": rows,
            "micro_batches": found.schedule.micro_batches,
            "stages": {"count": found.planner.ranks, "across_nodes": found.neighbours.nodes > 1},
            "bytes": found.peak,
            "total_bytes": total,
        } | self._figures(device, rows, busiest, time, found.updated, idle_s)

    def _planner(self, device: Device, side: str, engine: Engine) -> PipelinePlanner:
        key = (side, label_of(engine))
        if key not in self._pipelines:
            recipe = self.recipe.model_copy(update={"engine": engine})
            self._pipelines[key] = PipelinePlanner(recipe, device, sides.strategies_of(side))
            return self._pipelines[key]
        return self._pipelines[key].on(device)

    def _by_rate(self, flops: float, flops_per_s: float) -> Computes:
        """Of a micro-batch: layers and head take as their weights."""
        layers = [part for part in self.parts if part.role == "layer"]
        head = next(part for part in self.parts if part.role in ("head", "tied"))
        sizes = {"layer": _elements(layers) / len(layers), "head": _elements([head])}
        each_s = flops / flops_per_s / (len(layers) * sizes["layer"] + sizes["head"])
        return {role: (FORWARD * each_s * size, (1 - FORWARD) * each_s * size) for role, size in sizes.items()}

    def _computes(self, side: str, engine: Engine, flops: float | None) -> Computes | None:
        """Of a micro-batch, by a stated rate, else timed here."""
        if self.node.flops:
            return None if flops is None else self._by_rate(flops, self.node.flops)
        if not self.node.here:
            return None
        regime = self._regime(engine)
        if (side, regime) not in self._times:
            planner, kind = self.planner, self.node.type
            self._times[side, regime] = layer_times(self.recipe, planner.config, side, regime, planner.depths, kind)
        times = self._times[side, regime]
        return {
            "layer": (times.layer[0] * self.crowding, times.layer[1] * self.crowding),
            "head": (times.rest[0] * self.crowding, times.rest[1] * self.crowding),
        }

    def _regime(self, engine: Engine) -> Regime:
        return Regime(cast=self.recipe.bf16 and engine.name != "ddp")

    @cached_property
    def crowding(self) -> float:
        """How many times as long computing takes where the ranks of a node share a machine's cores."""
        if self.node.type != "cpu":
            return 1.0
        import torch

        return max(1.0, self.node.count * torch.get_num_threads() / (host()["cores"] or 1))

    @cached_property
    def update_s(self) -> float | None:
        """Of an element; not known of a device that is elsewhere."""
        if not self.node.here:
            return None
        return self.crowding * update_s(self.planner.spec, list(self.planner.sizes.shapes), self.node.type)


def _elements(parts: Sequence[Part]) -> int:
    return sum(weight.elements for part in parts for weight in part.weights)


@unheard("torch._subclasses.fake_tensor")
def plan_scaling(recipe: Recipe, node: Device, nodes: str, wanted: str | None, engines: str | None) -> dict[str, Any]:
    """Rows for all nodes, strategies (the recipe's own) and engines."""
    from tqdm import tqdm

    counts = nodes_of(nodes)
    own = sides.side_of([section.model_dump() for section in recipe.strategy])
    chosen = sides.sides_of(wanted) if wanted else [own]
    for side in chosen:
        sides.strategies_of(side)
    kinds = engines_of(recipe, engines or ENGINES)
    refuse_split(kinds)
    scale = Scale(recipe, node)
    cases = [(count, side, engine) for side in chosen for engine in kinds for count in counts]
    with unheard("ebbtide"):
        rows = [scale.row(*case) for case in tqdm(cases, desc="plan", unit="row", leave=False, file=sys.stderr)]
    rate = "timed here" if node.here else None
    return {
        "model": recipe.model_name_or_path,
        "max_length": recipe.max_length,
        "device": node.as_dict(),
        "links": {
            "bytes_per_s": node.link,
            "latency_s": node.latency,
            "node_bytes_per_s": node.node_link,
            "node_latency_s": node.node_latency,
        },
        "power_w": node.power,
        "compute_source": "given" if node.flops else rate,
        "crowding": scale.crowding if node.here and not node.flops else None,
        "rows": rows,
    }
