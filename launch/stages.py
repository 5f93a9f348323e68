"""One stage of a pipeline alone in this process, as a rank would run it: what its operations take of a machine, timed
with random weights, and what they hold, counted without data.

A layer is timed as a stage of its own; a stage of several takes the sum of theirs, less what every stage takes but
once (masks, positions, calls), which a stage without layers shows. The first layer is timed with the embedding, the
last one with the head, as they always stand.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import strategies
from distrib.contracts import Batch, Context
from distrib.engines import Settings
from distrib.topology import Topology
from distrib.tracker import Tracker, materialise, tracking
from launch.forecast import Whole, as_on, several_documents
from launch.models import build
from strategies.core.edits import Drop
from strategies.core.prepare import causal_lm
from strategies.pipelining.partition import Partition
from strategies.pipelining.stage import Part, Run
from strategies.pipelining.store import Store

if TYPE_CHECKING:
    from launch.recipe import Recipe

WARM_UP_LENGTH = 32
BUDGET_S = 5.0
"""For the repetitions of all stages."""
LEAST, MOST = 5, 25
"""Repetitions."""
KINDS = "FIW"

Border = tuple[torch.Size, torch.dtype]
Clock = Callable[[], float]


class Seconds(NamedTuple):
    """Of a stage and one micro-batch: the forward, the gradient of the input, those of the weights."""

    forward: float
    input: float
    weight: float

    def less(self, other: Seconds) -> Seconds:
        return Seconds(*(max(0.0, a - b) for a, b in zip(self, other, strict=True)))

    @classmethod
    def sum(cls, parts: Iterable[Seconds]) -> Seconds:
        return cls(*map(sum, zip(*parts, strict=True)))


@dataclass(frozen=True)
class Held:
    """Bytes of a stage and one micro-batch: after the forward, after the gradient of the input; what an operation (F,
    B, I, W) has at most above what was there before it; and what stays from the first micro-batch on, beside
    gradients."""

    forward: int
    stashed: int
    within: dict[str, int]
    lasting: int


@dataclass(frozen=True)
class Lone(strategies.Strategy):
    """Drops what the stage does not have."""

    partition: Partition
    stage: int

    def drops(self, model: nn.Module, topology: Topology) -> Iterable[Drop]:
        return self.partition.drops((self.stage,))


@dataclass(frozen=True)
class Workshop:
    """Makes stages of the recipe's model, with `beside` (its strategies but the pipeline) applied to them."""

    recipe: Recipe
    config: Any
    beside: tuple[strategies.Strategy, ...] = ()

    @property
    def cast(self) -> bool:
        """The engine has the weights themselves in bf16, where `ddp` autocasts."""
        return self.recipe.bf16 and self.recipe.engine.name != "ddp"

    def edited(self, partition: Partition, stage: int) -> nn.Module:
        model = build(self.recipe, self.config, torch.bfloat16 if self.cast else None).train()
        # A stage without layers has nothing to edit.
        beside = self.beside if partition.layers_of(stage) else ()
        strategies.edit(model, [Lone(partition, stage), *beside])
        return model

    def part(self, model: nn.Module, partition: Partition, stage: int, device_type: str = "cpu") -> Part:
        settings = Settings(optimizer=None, bf16=self.recipe.bf16 and not self.cast)
        engine = Whole(model, lambda *_: None, Topology(device_type=device_type), settings)
        return Part(stage, partition, causal_lm(model), engine, Store(), {})

    def run(self, border: Border, rows: int, length: int, count: int = 1, device_type: str = "cpu") -> Run:
        """`count` micro-batches of `rows`; packed rows hold two documents."""
        ids = torch.zeros(rows, length, dtype=torch.int64, device=device_type)
        batch: Batch = {"input_ids": ids, "labels": ids}
        if self.recipe.packing:
            half = torch.arange(length, device=device_type) % -(-length // 2)
            batch["position_ids"] = half.expand(rows, length).contiguous()
        inner, dtype = border
        return Run([batch] * count, Context(0, 0, 1.0), [strategies.SFT()] * count, True, inner, dtype)

    def border(self, partition: Partition) -> Border:
        """What a hidden state between two stages has beside rows and tokens."""
        fake = FakeTensorMode()
        model = self.edited(partition, 0)
        materialise(model, fake)
        part = self.part(model, partition, 0)
        with tracking(fake, Tracker()):
            run = self.run((torch.Size(), torch.float32), 1, WARM_UP_LENGTH)
            part.rehearse(run.micro_batches[0], run.context)
            hidden = part.hidden(run.micro_batches[0], run.context)
        return hidden.shape[2:], hidden.dtype

    def held(self, partition: Partition, stage: int, border: Border, rows: int, device_type: str) -> Held:
        """Three micro-batches run without data: the first leaves what lasts; then a backward in two parts, a whole
        one."""
        fake, tracker = FakeTensorMode(), Tracker()
        model = self.edited(partition, stage)
        materialise(model, fake)
        part = self.part(model, partition, stage)
        documents = several_documents() if self.recipe.packing else nullcontext()
        with as_on(device_type), documents, tracking(fake, tracker):
            short = self.run(border, rows, WARM_UP_LENGTH)
            part.rehearse(short.micro_batches[0], short.context)
            part.begin(self.run(border, rows, self.recipe.max_length, 3))
            for tensor in {id(x.untyped_storage()): x for x in (*model.parameters(), *model.buffers())}.values():
                tracker.count(tensor)
            gc.collect()
            before = tracker.live_bytes
            for kind in KINDS:
                _within(tracker, part, kind, 0)
            gc.collect()
            gradients = sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)
            start = tracker.live_bytes
            lasting = start - before - gradients
            within = {"F": _within(tracker, part, "F", 1)}
            forward = tracker.live_bytes - start
            within["I"] = _within(tracker, part, "I", 1)
            stashed = tracker.live_bytes - start
            within["W"] = _within(tracker, part, "W", 1)
            perform(part, "F", 2, sent(part, "F", 2))
            within["B"] = _within(tracker, part, "B", 2)
        return Held(forward, stashed, within, max(0, lasting))

    def ready(self, partition: Partition, stage: int, border: Border, rows: int, device_type: str) -> Part:
        """With random weights, and run once at a short length and at its own."""
        model = self.edited(partition, stage)
        draw(model, device_type)
        part = self.part(model, partition, stage, device_type)
        short = self.run(border, rows, min(WARM_UP_LENGTH, self.recipe.max_length), 1, device_type)
        part.rehearse(short.micro_batches[0], short.context)
        for run in (short, self.run(border, rows, self.recipe.max_length, 1, device_type)):
            part.begin(run)
            between(repeat(part))
        return part


def draw(model: nn.Module, device_type: str) -> None:
    """Random weights in the place of those on the meta device, tied ones still tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    values = torch.empty(old.shape, dtype=old.dtype, device=device_type).normal_(std=0.02)
                    made[id(old)] = nn.Parameter(values, old.requires_grad)
                module._parameters[name] = made[id(old)]
    model.to(device_type)


def received(part: Part, micro_batch: int) -> Tensor | None:
    """Something like what another stage sends."""
    shape, dtype = part.border(micro_batch)
    return torch.ones(shape, dtype=dtype, device=part.engine.topology.device)


def sent(part: Part, kind: str, micro_batch: int) -> Tensor | None:
    """What an operation gets from another stage."""
    alone = kind == "W" or (part.number == 0 if kind == "F" else part.last)
    return None if alone else received(part, micro_batch)


def perform(part: Part, kind: str, micro_batch: int, given: Tensor | None) -> None:
    if kind == "F":
        part.forward(micro_batch, given)
    elif kind == "W":
        part.weights(micro_batch)
    else:
        part.backward(micro_batch, given, whole=kind == "B")


def _within(tracker: Tracker, part: Part, kind: str, micro_batch: int) -> int:
    tracker.restart()
    perform(part, kind, micro_batch, sent(part, kind, micro_batch))
    return tracker.peak_bytes()


def repeat(part: Part, kinds: str = KINDS, clock: Clock = perf_counter) -> list[Any]:
    """The moments around its operations; a GPU notes them when it comes to them."""
    inputs = {kind: sent(part, kind, 0) for kind in kinds}
    moments = [moment(part, clock)]
    for kind in kinds:
        perform(part, kind, 0, inputs[kind])
        moments.append(moment(part, clock))
    return moments


def moment(part: Part, clock: Clock = perf_counter) -> Any:
    if part.engine.topology.device_type != "cuda":
        return clock()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def between(moments: Sequence[Any]) -> list[float]:
    """Seconds from each to the next."""
    if isinstance(moments[0], float):
        return [after - before for before, after in pairwise(moments)]
    moments[-1].synchronize()
    return [before.elapsed_time(after) / 1000 for before, after in pairwise(moments)]


@dataclass(frozen=True)
class Places:
    """What each layer costs where it stands: the first with the embedding, the last with the head. `empty` is what a
    stage costs without any, and is in each of them."""

    layers: tuple[Seconds, ...]
    empty: Seconds
    repetitions: int

    @property
    def weights(self) -> list[float]:
        """For a balance of stages."""
        return [sum(one.less(self.empty)) for one in self.layers]

    @property
    def whole(self) -> Seconds:
        return self.stage(0, len(self.layers))

    def stage(self, start: int, stop: int) -> Seconds:
        return Seconds.sum([self.empty, *(one.less(self.empty) for one in self.layers[start:stop])])


def measure(
    workshop: Workshop,
    whole: Partition,
    kinds: Sequence[Any],
    border: Border,
    rows: int,
    device_type: str,
    clock: Clock = perf_counter,
) -> Places:
    """Each place, and each kind of layer between the ends, is timed once. `whole` is a partition of the model, whatever
    its bounds."""
    last = len(whole.layers) - 1
    inner = {kinds[index]: index for index in reversed(range(1, last))}
    bounds = [(0, 1, last + 1), *((0, index, index + 1, last + 1) for index in inner.values()), (0, last, last + 1)]
    cases = [(0, bounds[0]), *((1, one) for one in bounds[1:]), (1, (0, 1, 1, last + 1))]
    parts = [workshop.ready(replace(whole, bounds=given), stage, border, rows, device_type) for stage, given in cases]
    first, *between_ends, end, empty = in_turn(parts, clock)
    found = {kind: middle(one) for kind, one in zip(inner, between_ends, strict=True)}
    layers = (middle(first), *(found[kinds[index]] for index in range(1, last)), middle(end))
    return Places(layers, middle(empty), len(first))


def in_turn(parts: Sequence[Part], clock: Clock) -> list[list[Seconds]]:
    """The repetitions of every stage, one stage after the other: what else the machine does meets them all."""
    start = perf_counter()
    rounds = [[repeat(part, clock=clock) for part in parts]]
    between(rounds[0][-1])
    times = max(LEAST, min(MOST, int(BUDGET_S / (perf_counter() - start))))
    rounds += [[repeat(part, clock=clock) for part in parts] for _ in range(times - 1)]
    return [[Seconds(*between(one[index])) for one in rounds] for index in range(len(parts))]


def middle(found: Sequence[Seconds]) -> Seconds:
    return Seconds(*map(median, zip(*found, strict=True)))
