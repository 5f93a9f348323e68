"""What `ebbtide plan --nodes` says of a step against steps of real ranks, over gloo on this machine's loopback.

    python benchmarks/scaling.py [--ranks 2] [--repeats 9] [--model 256x4] [--length 128]
    unshare -n sh -c 'ip link set lo up; python benchmarks/scaling.py'      # as root: a loopback of its own

Each repeat measures, in the ranks that then train: layers on one rank while the others are idle, and on all at once,
which then share the cores; the optimizer; an all-reduce, an all-gather, a reduce-scatter and a send of two sizes, from
which a latency and a rate follow. The step is predicted from layers on all ranks at once and from these links, and run.
Ratios pair what one repeat measured; `cores` is the same with the layers of the one rank times ranks / cores, which is
what the plan has. Bytes sent are those of a counted step (benchmarks/wire.py), on a ring; `loopback` is what the kernel
counted of all ranks in the step that had least of it, against what they should send: nothing else may use the loopback.
Memory is the most that live storages held in a step. JSON goes to stdout, a table to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import warnings
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from streaming import machine, spread, with_quartiles
from torch import Tensor
from wire import Wire, loopback_bytes

import strategies
from distrib.contracts import Batch, Context
from distrib.engines import make
from distrib.topology import Topology, connect, read_environment
from distrib.tracker import Tracker
from launch.device import Device
from launch.layer_times import Layers, LayerTimes, update_s
from launch.models import Weights, build
from launch.plan import Planner
from launch.plan_pipeline import PipelinePlanner
from launch.plan_scaling import Scale, hides, script_of
from launch.recipe import Recipe
from launch.scaling import KINDS, Group, Message, sent_bytes, wire_bytes
from launch.scaling_pipeline import Pipeline
from launch.scaling_time import Computes, Link, spent
from launch.settings import settings_of
from launch.shares import Regime
from launch.spawn import started

ROOT = Path(__file__).resolve().parent.parent
SIDES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2"},
    "zero1": {"engine": {"name": "zero", "stage": 1}},
    "zero3": {"engine": {"name": "zero", "stage": 3}},
    "twobp": {"engine": "ddp", "strategy": {"name": "twobp", "stages": 2}},
}
SIZES = (2**12, 2**22)
"""Bytes of the messages that a link is measured with."""
CONTROL_BYTES = 8

Row = dict[str, Any]


def main() -> None:
    options = parse_options()
    if options.result:
        measure(options)
        return
    with TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {"PYTHONPATH": f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        arguments = [*sys.argv[1:], "--result", str(result)]
        with started("scaling", arguments, options.ranks, environment=environment) as job, job.signals():
            job.wait()
        if job.exit_code():
            sys.exit(job.exit_code())
        found = json.loads(result.read_text())
    print(table(found), file=sys.stderr)
    print(json.dumps({"machine": machine(), **found}, indent=1))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="256x4", help="hidden size x layers of a Llama (256x4)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a micro-batch, of which a step has 4 (128)")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    return parser.parse_args()


def recipe_of(options: argparse.Namespace, side: str) -> Recipe:
    hidden, layers = map(int, options.model.split("x"))
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "head_dim": 64}
    shape |= {"vocab_size": 2048}
    return Recipe(config_overrides=shape, max_length=options.length, gradient_accumulation_steps=4, **SIDES[side])


def device(topology: Topology) -> Device:
    return Device("cpu", 2**36, topology.world, None, here=True)


class Side:
    """A recipe that trains on these ranks."""

    def __init__(self, topology: Topology, recipe: Recipe) -> None:
        chosen = strategies.build([section.model_dump() for section in recipe.strategy])
        self.topology = strategies.staged(chosen, topology)
        self.scale = Scale(recipe, device(topology))
        config = self.scale.planner.config
        model = build(recipe, config)
        strategies.edit(model, chosen, self.topology)
        fill = Weights(recipe, config, self.topology).fill
        self.engine = make(recipe.engine.name, model, fill, self.topology, settings_of(recipe))
        self.prepared = strategies.prepare(model, chosen, engine=self.engine)
        ids = torch.randint(config.vocab_size, (1, recipe.max_length))
        self.batches: list[Batch] = [{"input_ids": ids, "labels": ids}] * recipe.gradient_accumulation_steps
        self.index = 0
        self.pipeline = None
        if self.topology.stages > 1:
            self.pipeline = Pipeline(PipelinePlanner(recipe, device(topology), chosen), topology.world)

    def step(self) -> None:
        weight = float(self.topology.data_world * sum(batch["input_ids"].numel() for batch in self.batches))
        self.prepared(self.batches, Context(0, self.index, weight))
        self.engine.step(1e-4, 1.0)
        self.index += 1

    def predicted(self, times: LayerTimes, each_s: float, links: Measured) -> float:
        """Seconds of a step, by what this repeat measured."""
        scale, recipe, world = self.scale, self.scale.recipe, self.topology.world
        computes: Computes = {"layer": times.layer, "head": times.rest}
        if self.pipeline:
            time, idle_s = self.pipeline.spent(self.pipeline.reckoned(computes), links.seconds)
            updated = self.pipeline.updated
        else:
            count, hidden = recipe.gradient_accumulation_steps, hides(recipe.engine, "cpu")
            script = script_of(recipe.engine, recipe, scale.parts, Group(world), count, hidden)
            time, idle_s = spent(script, computes, links.seconds), 0.0
            updated = scale.planner.sizes.trainable / (1 if recipe.engine.name == "ddp" else world)
        return sum(map(float, (time.compute_s, time.exposed_s, idle_s))) + each_s * updated

    def on_paper(self) -> Row:
        """The messages of the rank that sends most, and what a device holds."""
        recipe, world = self.scale.recipe, self.topology.world
        if self.pipeline:
            every = [sum(self.pipeline.messages(place), ()) for place in range(2)]
            return {"messages": every[self.topology.stage], "bytes": sum(self.pipeline.peak.values())}
        script = script_of(
            recipe.engine, recipe, self.scale.parts, Group(world), recipe.gradient_accumulation_steps, True
        )
        row = self.scale.planner.row("plain", recipe.engine)
        return {"messages": tuple(script.messages()), "bytes": row["total_bytes"]}


class Measured:
    """Links by kind and ranks."""

    def __init__(self, links: dict[tuple[str, int], Link]) -> None:
        self.links = links

    def seconds(self, message: Message) -> float:
        kind, payload_bytes, (ranks, *_), times = message
        if ranks == 1:
            return 0.0
        link = self.links[kind, ranks]
        return times * (link.latency_s + wire_bytes(kind, payload_bytes, ranks) / link.bytes_per_s)


class Held(Tracker):
    """Live bytes of tensors with values, whose storages engines make smaller and larger."""

    def __init__(self) -> None:
        super().__init__(fake=False)
        for found in gc.get_objects():
            real = type(found) in (Tensor, torch.nn.Parameter) and found.device.type == "cpu"
            if real and id(found.untyped_storage()) not in self._known:
                self.count(found)
        self.peak = self.now()

    def now(self) -> int:
        """DTensors' parts are tensors of their own."""
        storages = (reference() for reference in list(self._known.values()))
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.now())
        return out


def measure(options: argparse.Namespace) -> None:
    """On every rank."""
    # Newer versions of torch have other names for what older ones know.
    warnings.simplefilter("ignore", FutureWarning)
    topology = read_environment()
    connect(topology)
    torch.manual_seed(0)
    pairs = [dist.new_group([rank, rank + 1]) for rank in range(0, topology.world, 2)]
    groups = {2: pairs[topology.rank // 2], topology.world: dist.group.WORLD}
    planner = Planner(recipe_of(options, "ddp"), device(topology))
    layers = Layers(planner.recipe, planner.config, "plain", Regime(), planner.depths, "cpu")
    rows = []
    for name in SIDES:
        gc.collect()
        held_before = Held().peak
        side = Side(topology, recipe_of(options, name))
        rows.append({"side": name} | compared(side, layers, groups, options.repeats, held_before))
        del side
    if topology.main:
        known = {"ranks": topology.world, "cores": os.cpu_count(), "model": options.model, "length": options.length}
        Path(options.result).write_text(json.dumps(known | {"repeats": options.repeats, "rows": rows}))
    dist.destroy_process_group()


def compared(side: Side, layers: Layers, groups: dict[int, Any], repeats: int, held_before: int) -> Row:
    topology, elements = side.topology, side.scale.planner.sizes
    for _ in range(3):
        side.step()
    wire = Wire()
    with wire:
        side.step()
    paper = side.on_paper()
    held = Held()
    with held:
        side.step()
    found: Row = {"step_s": [], "ratio": [], "cores": [], "sharing": [], "links": []}
    loopback = []
    for _ in range(repeats):
        alone = [layers.seconds() for _ in range(2)] if topology.main else []
        dist.barrier()
        shared = layers.times([layers.seconds() for _ in range(2)])
        each_s = update_s(side.scale.planner.spec, list(elements.shapes)[:12], "cpu")
        links = Measured({(kind, ranks): link(kind, group) for ranks, group in groups.items() for kind in KINDS})
        dist.barrier()
        before, start = loopback_bytes(), perf_counter()
        side.step()
        dist.barrier()
        step_s = perf_counter() - start
        loopback.append(loopback_bytes() - before)
        if topology.main:
            rule = topology.world / min(topology.world, os.cpu_count() or 1)
            lone = layers.times(alone)
            crowded = LayerTimes(*(tuple(rule * one for one in part) for part in lone))
            found["step_s"].append(step_s)
            found["ratio"].append(side.predicted(shared, each_s, links) / step_s)
            found["cores"].append(side.predicted(crowded, each_s, links) / step_s)
            found["sharing"].append(sum(shared.layer) / max(1e-9, sum(lone.layer)))
            found["links"].append({kind: links.links[kind, topology.world] for kind in KINDS if kind != "send"})
    should = sum(sent_bytes(paper["messages"], gloo=True).values())
    did = sum(
        times * wire_bytes(kind, payload_bytes, ranks, gloo=True)
        for (kind, payload_bytes, ranks), times in wire.seen.items()
        if payload_bytes > CONTROL_BYTES
    )
    memory = torch.tensor([held.peak - held_before, paper["bytes"], should, did], dtype=torch.float64)
    every = [torch.empty_like(memory) for _ in range(topology.world)]
    dist.all_gather(every, memory)
    most = max(every, key=lambda one: float(one[0]))
    sums = torch.stack(every).sum(0).tolist()
    found |= {"held_bytes": most[0].item(), "planned_bytes": max(float(one[1]) for one in every)}
    return found | {"sent_bytes": sums[3], "planned_sent_bytes": sums[2], "loopback_bytes": min(loopback)}


def link(kind: str, group: Any) -> Link:
    """A latency, and bytes a second on the ring beyond it."""
    took = [median(once(kind, size, group) for _ in range(3)) for size in SIZES]
    sent = [wire_bytes(kind, size, group.size()) for size in SIZES]
    rate = (sent[1] - sent[0]) / max(1e-9, took[1] - took[0])
    return Link(rate, max(0.0, took[0] - sent[0] / rate))


def once(kind: str, size: int, group: Any) -> float:
    """Seconds; a send is half of a way to the neighbour and back."""
    whole = torch.zeros(size, dtype=torch.uint8)
    part, rank = whole[: size // group.size()].clone(), dist.get_rank(group)
    dist.barrier(group)
    start = perf_counter()
    match kind:
        case "all_reduce":
            dist.all_reduce(whole.view(torch.float32), group=group)
        case "all_gather":
            dist.all_gather_into_tensor(whole, part, group=group)
        case "reduce_scatter":
            dist.reduce_scatter_tensor(part.view(torch.float32), whole.view(torch.float32), group=group)
        case "send":
            other = rank ^ 1
            for sender in (0, 1):
                if rank % 2 == sender:
                    dist.send(whole, group=group, group_dst=other)
                else:
                    dist.recv(whole, group=group, group_src=other)
    return (perf_counter() - start) / (2 if kind == "send" else 1)


COLUMNS = ("step ms", "predicted / measured", "by cores", "sent", "loopback", "memory MiB", "predicted / held")


def table(found: Row) -> str:
    ranks = found["ranks"]
    lines = [f"| {ranks} ranks | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in found["rows"]:
        sent = row["planned_sent_bytes"]
        cells = [
            row["side"],
            with_quartiles(spread([1e3 * one for one in row["step_s"]])),
            with_quartiles(spread(row["ratio"])),
            with_quartiles(spread(row["cores"])),
            f"{sent / row['sent_bytes']:.4f}",
            f"{sent / row['loopback_bytes']:.3f}",
            f"{row['held_bytes'] / 2**20:.1f}",
            f"{row['planned_bytes'] / row['held_bytes']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    sharing = spread([one for row in found["rows"] for one in row["sharing"]])
    return "\n".join([*lines, f"layers on all ranks at once take {with_quartiles(sharing)} times as long as on one"])


if __name__ == "__main__":
    main()
