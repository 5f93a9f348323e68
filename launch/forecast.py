"""What a step holds in memory and computes, for a model of any depth and a sequence of any length.

The training code itself runs without data (`distrib/trace.py`) on the first few layers of the model, and once more on
one period of layers more. Layers of one kind take the same room, so each moment of the shorter run is carried on along
the difference to the same moment of the deeper one. In the length the peak of each segment is carried on along the
line through two lengths; strategies that work in chunks are run at a few whole chunks.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distrib.contracts import Context
from distrib.engines import Settings
from distrib.engines.torch_engine import TorchEngine
from distrib.topology import Topology
from distrib.trace import Place, Segment, Trace
from distrib.tracker import materialise, tracking
from launch.models import build
from launch.sides import edit, prepare, strategies_of
from strategies.streaming.backbone import find_layers
from strategies.streaming.step import ChunkedStep
from strategies.streaming.visibility import PART_KEYS, Visibility

if TYPE_CHECKING:
    from launch.recipe import Recipe
    from strategies.streaming.draws import Draw, Taken

WARM_UP_LENGTH = 32

Bytes = NDArray[Any]
"""Of each class, or of each class at many moments."""
Transform = Callable[[Place, Bytes], Bytes]
"""Turns a run's moments into those of one rank."""
Moments = dict[tuple[Place, bool], list[Bytes]]
"""Live bytes in each segment of the whole model; there are two ways to carry on the segments of a layer: layers are
added behind it, or before it."""


@dataclass(frozen=True)
class Regime:
    """How an engine has the model compute. `cast`: the weights are bf16 themselves, where others autocast. `held`:
    gradients are there from one micro-batch to the next."""

    cast: bool = False
    held: bool = False


@dataclass(frozen=True)
class Sample:
    """One length, at the model's whole depth."""

    length: int
    moments: Moments
    products: float
    """FLOPs of matrix products, which grow with the length; those of attention grow with its square."""
    attention: float


class Whole(TorchEngine):
    """The model as it is: what an engine shards is counted apart (`launch/shares.py`)."""

    name = "whole"

    def _place(self, fill: Any) -> nn.Module:
        return self.model


def chunk_of(side: str, rows: int, device_type: str) -> int | None:
    """Positions of a chunk of the side's strategy, if it has any."""
    from strategies.streaming.blocks import AUTO_POSITIONS

    for strategy in strategies_of(side):
        chunk = getattr(strategy, "chunk", None)
        if chunk is not None:
            return max(128, AUTO_POSITIONS[device_type] // rows) if chunk == "auto" else int(chunk)
    return None


@contextmanager
def as_on(device_type: str) -> Iterator[None]:
    """Sizes that depend on the device are those of another: tensors without data are always on the CPU."""
    from strategies.core.statistics import LEAST_ROWS
    from strategies.streaming.blocks import AUTO_POSITIONS

    with (
        patch.dict(AUTO_POSITIONS, cpu=AUTO_POSITIONS[device_type]),
        patch.dict(LEAST_ROWS, cpu=LEAST_ROWS[device_type]),
    ):
        yield


@dataclass(frozen=True)
class Depths:
    """The layers are alike with `period`, from layer `start` on; `short` of them stand for all `full`."""

    full: int
    short: int
    period: int
    start: int

    @property
    def times(self) -> int:
        return (self.full - self.short) // self.period if self.period else 0


def kinds_of(model: nn.Module, config: Any) -> list[Any]:
    """Of every layer something that is equal for layers that compute alike."""
    kinds = [_kind(layer) for _, layer in find_layers(model)]
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == len(kinds)]
    return [(kind, *(str(values[index]) for values in lists)) for index, kind in enumerate(kinds)]


def depths_of(model: nn.Module, config: Any) -> Depths:
    kinds = kinds_of(model, config)
    full = len(kinds)
    for period in range(1, full // 2):
        alike = [kinds[index] == kinds[index + period] for index in range(full - period)]
        start = next(index for index in range(full) if all(alike[index:]))
        short = start + period + 1
        short += (full - short) % period
        if short + period < full:
            return Depths(full, short, period, start)
    return Depths(full, full, 0, 0)


def _kind(layer: nn.Module) -> Any:
    return str(layer), tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


def shallow(config: Any, full: int, layers: int) -> Any:
    """The configuration of the first layers alone."""
    made = copy.deepcopy(config)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == full:
            setattr(made, key, value[:layers])
    made.num_hidden_layers = layers
    return made


def by_place(segments: Sequence[Segment]) -> dict[Place, list[Bytes]]:
    found: dict[Place, list[Bytes]] = {}
    for segment in segments:
        found.setdefault(segment.place, []).append(segment.bytes_NC)
    return found


def carried_on(short: dict[Place, list[Bytes]], deep: dict[Place, list[Bytes]], depths: Depths) -> Moments:
    moments: Moments = {}
    for place, runs in short.items():
        behind = place.layer < depths.short - 1
        before = place.layer < 0 or place.layer > depths.start
        partners = [(True, 0)] * behind + [(False, depths.period)] * (before and place.layer >= 0)
        for is_behind, shift in partners:
            others = deep[replace(place, layer=place.layer + shift)]
            moments[place, is_behind] = [
                rows + depths.times * (more - rows) for rows, more in zip(runs, others, strict=True)
            ]
    return moments


class Run:
    """A model of a few layers that trains without data as a side does; `trace` may be asked again and again."""

    def __init__(self, recipe: Recipe, config: Any, side: str, regime: Regime, device_type: str) -> None:
        self.recipe = recipe
        self.regime = regime
        self.device_type = device_type
        self._fake = FakeTensorMode()
        self._trace = Trace()
        self.model = build(recipe, config, torch.bfloat16 if regime.cast else None).train()
        edit(side, self.model)
        materialise(self.model, self._fake)
        settings = Settings(optimizer=None, bf16=recipe.bf16 and not regime.cast)
        # Outside of the mode: what a strategy tries on small tensors of its own needs their values.
        self.step = prepare(side, self.model, engine=Whole(self.model, lambda *_: None, Topology(), settings))
        if isinstance(self.step.step, ChunkedStep):
            self.step.step.draw = _long_draw(self.step.step.draw)
        # Whether a model keeps documents apart is a question about values.
        self.step._packing_seen = True
        with as_on(device_type), tracking(self._fake, self._trace):
            self._trace.watch(self.model, [layer for _, layer in find_layers(self.model)])
            self._step(WARM_UP_LENGTH)

    def trace(self, length: int) -> tuple[list[Segment], int, int]:
        """The segments of one forward and backward, FLOPs of its products and of its attention."""
        with as_on(self.device_type), tracking(self._fake, self._trace):
            if not self.regime.held:
                self.model.zero_grad(set_to_none=True)
            gc.collect()
            self._trace.begin(self.model)
            self._step(length)
            return self._trace.end(self.model), self._trace.products, self._trace.attention

    def _step(self, length: int) -> None:
        ids = torch.zeros(self.recipe.per_device_train_batch_size, length, dtype=torch.int64)
        batch = {"input_ids": ids, "labels": ids}
        if self.recipe.packing:
            batch["position_ids"] = torch.zeros_like(ids)
        with several_documents() if self.recipe.packing else nullcontext():
            self.step(batch, Context(0, 0, 1.0))


@contextmanager
def several_documents() -> Iterator[None]:
    """In every packed row. Transformers looks for them among values, which are not there; nor can streamed layers see
    among them that no position sees later ones, without which they would take whole masks."""
    with (
        patch("transformers.masking_utils.find_packed_sequence_indices", torch.zeros_like),
        patch.object(Visibility, "_refuse_future", lambda *_: None),
    ):
        yield


def _long_draw(draw: Draw) -> Draw:
    """Of many draws one that holds the most, since it begins with the last two chunks, and takes as many as usual."""

    def drawn(count: int, must: Sequence[bool], context: Context, micro_batch: int) -> list[Taken]:
        tried = [draw(count, must, replace(context, step=step), micro_batch) for step in range(200)]
        usual = sum(map(len, tried)) / len(tried)
        late = [taken for taken in tried if {chunk.index for chunk in taken} >= {count - 1, max(0, count - 2)}]
        return min(late or tried, key=lambda taken: abs(len(taken) - usual))

    return drawn


class Forecast:
    """One side under one regime, from the lengths that were looked at."""

    def __init__(
        self, recipe: Recipe, config: Any, side: str, regime: Regime, depths: Depths, device_type: str
    ) -> None:
        self.depths = depths
        self.chunk = chunk_of(side, recipe.per_device_train_batch_size, device_type)
        # Transformers' masks of packed documents.
        self.square = recipe.packing and self.chunk is None
        layers = [depths.short] + [depths.short + depths.period] * bool(depths.times)
        configs = [shallow(config, depths.full, count) for count in layers]
        self.runs = [Run(recipe, made, side, regime, device_type) for made in configs]
        self.samples: dict[int, Sample] = {}

    def look_at(self, length: int) -> None:
        """Run this length if it is short, and two others, so that there is a line to longer ones."""
        for wanted in self._lengths(length):
            if wanted not in self.samples:
                self.samples[wanted] = self._sample(wanted)

    def _lengths(self, length: int) -> list[int]:
        if self.chunk is None:
            return [length, 2 * length] + [3 * length] * self.square
        # From here on a chunk more is like the one before: it reads the longest parts of earlier keys.
        few = 1 + -(-PART_KEYS // self.chunk)
        line = [few * self.chunk, (few + 1) * self.chunk]
        return [length, *line] if length < line[0] else line

    def _sample(self, length: int) -> Sample:
        segments, *flops = self.runs[0].trace(length)
        if len(self.runs) == 1:
            return Sample(length, {(place, True): rows for place, rows in by_place(segments).items()}, *flops)
        deeper, *more = self.runs[1].trace(length)
        moments = carried_on(by_place(segments), by_place(deeper), self.depths)
        return Sample(length, moments, *(a + self.depths.times * (b - a) for a, b in zip(flops, more, strict=True)))

    def under(self, share: Transform) -> Peaks:
        return Peaks({length: _peaks(sample, share) for length, sample in self.samples.items()}, self.square)

    def flops(self, length: int) -> float:
        known = self.samples.get(length) or self.samples[max(self.samples)]
        times = length / known.length
        return known.products * times + known.attention * times**2


@dataclass(frozen=True)
class Peaks:
    """The classes at each segment's peak, by length."""

    known: dict[int, dict[Any, Bytes]]
    square: bool = False
    """Whether bytes grow with the square of the length."""

    def at(self, length: int) -> Bytes:
        """The classes at the peak of all, on the curves through the lengths around or next to this one."""
        if length in self.known:
            return _highest(list(self.known[length].values()))
        lengths = sorted(self.known)
        count = 3 if self.square else 2
        later = next((index for index, known in enumerate(lengths) if known > length), len(lengths) - 1)
        first = min(max(0, later - 1), len(lengths) - count)
        through = lengths[first : first + count]
        factors = [
            math.prod((length - other) / (known - other) for other in through if other != known) for known in through
        ]
        curves = [
            sum(factor * self.known[known][key] for factor, known in zip(factors, through, strict=True))
            for key in self.known[through[0]]
        ]
        highest: Bytes = np.maximum(_highest(curves), 0)
        return highest


def _peaks(sample: Sample, share: Transform) -> dict[Any, Bytes]:
    return {
        (place, behind): _highest([_highest(share(place, rows)) for rows in runs])
        for (place, behind), runs in sample.moments.items()
    }


def _highest(rows: Any) -> Bytes:
    held: Bytes = np.asarray(rows)
    highest: Bytes = held[held.sum(1).argmax()]
    return highest
