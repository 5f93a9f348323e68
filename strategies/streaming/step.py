"""A global batch whose micro-batches go through the model chunk by chunk (`strategies/streaming/sequence.py`).

Gradients add up in the engine chunk by chunk and cross ranks in the last chunk of the last micro-batch. Every rank
runs the same number of chunks, since engines gather and reduce inside them.

Objectives that are no sum over tokens go in two phases: statistics without a graph, the objective's derivatives by
them, then the chunks with those derivatives as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.contracts import IGNORE, Batch, Context, Engine, Result
from distrib.errors import Refused
from distrib.units import blocks
from strategies.core.objectives import Objective
from strategies.core.prepare import causal_lm
from strategies.core.steps import seeded
from strategies.streaming.sequence import ChunkedBatch, Collected
from strategies.streaming.trial import try_model


@dataclass(frozen=True)
class Taken:
    """A chunk that is walked back: the factor of its own loss, and of what later chunks left on its keys and values."""

    index: int
    own: float = 1.0
    left: float = 1.0


Draw = Callable[[int, Sequence[bool], Context, int], list[Taken]]
"""(chunks, which of them must be taken, context, micro-batch) -> those taken, in order; the same on every rank."""


def everything(count: int, must: Sequence[bool], context: Context, micro_batch: int) -> list[Taken]:
    return [Taken(index) for index in range(count)]


class ChunkedStep:
    """SeCO's step, and with another `draw` SpaCO's. `must` says which chunks a draw may not leave out."""

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        objective: Objective,
        chunk: int,
        offload: bool,
        draw: Draw = everything,
        must: Callable[[ChunkedBatch], list[bool]] | None = None,
    ) -> None:
        self.model = causal_lm(model)
        self.engine = engine
        self.objective = objective
        self.chunk = chunk
        self.offload = offload
        self.draw = draw
        self.must = must
        self._tried = False
        self._attention: str | None = None

    def __call__(self, micro_batches: Sequence[Batch], context: Context) -> Result:
        losses, tokens = [], 0
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            chunked = self._chunked(batch)
            with seeded(context, self.engine, index):
                losses.append(self._one(chunked, context, index, last))
            tokens += batch["input_ids"].numel()
        return Result(loss=torch.stack(losses).sum(), tokens=tokens)

    def logprobs(self, micro_batches: Sequence[Batch], context: Context) -> list[Tensor]:
        """[B, T] a micro-batch, as the default step's."""
        kept = []
        for index, batch in enumerate(micro_batches):
            chunked = self._chunked(batch)
            with seeded(context, self.engine, index):
                found = self._collect(chunked, frozenset())
            width = batch["input_ids"].shape[1]
            kept.append(found.values["logprob"].view(batch["input_ids"].shape[0], -1)[:, :width])
        return kept

    def _chunked(self, batch: Batch) -> ChunkedBatch:
        self._try()
        if any(getattr(part, "gradient_checkpointing", False) and part.training for part in self.model.modules()):
            raise Refused("gradient checkpointing is on, which drops recorded keys and values: switch it off")
        length = batch["input_ids"].shape[1]
        count = self._most(-(-length // self.chunk))
        batch = padded(batch, count)
        length = batch["input_ids"].shape[1]
        bounds = [(index * length // count, (index + 1) * length // count) for index in range(count)]
        return ChunkedBatch(self.engine.module, self.model, self._attention, batch, bounds, self.offload)

    def _most(self, count: int) -> int:
        """Over the ranks."""
        if self.engine.topology.world == 1:
            return count
        held = torch.tensor(count, device=self.engine.topology.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held.item())

    def _one(self, chunked: ChunkedBatch, context: Context, micro_batch: int, last: bool) -> Tensor:
        """Loss and gradients of a micro-batch."""
        loss, objective = None, self.objective
        count = len(chunked.bounds)
        if objective.separable:
            self._record(chunked, range(count - 1))
        else:
            collected = self._collect(chunked, objective.needs)
            loss, objective = chunked.differentiate(objective, collected, context.weight)
        losses = []
        taken = self.draw(count, self._must(chunked), context, micro_batch)
        for position, chunk in enumerate(reversed(taken)):
            crossing = last and position == len(taken) - 1
            weight = context.weight if loss is None else 1.0
            losses.append(self._backward(chunked, chunk, objective, weight, crossing))
        return torch.stack(losses).sum() if loss is None else loss

    def _backward(
        self, chunked: ChunkedBatch, chunk: Taken, objective: Any, weight: float, crossing: bool
    ) -> Tensor:
        writes = chunk.index == len(chunked.bounds) - 1
        chunked.cache.scale(chunk.left)
        with self.engine.micro_batch(crossing):
            loss = chunked.run(chunk.index, objective, weight, writes=writes)
            self.engine.backward(loss * chunk.own)
        return loss.detach()

    def _record(self, chunked: ChunkedBatch, indices: range) -> None:
        for index in indices:
            with torch.no_grad(), self.engine.micro_batch(last=False):
                chunked.run(index, self.objective, 1.0, learn=False)

    def _collect(self, chunked: ChunkedBatch, needs: frozenset[str]) -> Collected:
        """Every statistic of every learned token; keys and values are recorded on the way."""
        collected = Collected(chunked.batch["input_ids"].numel(), needs)
        for index in range(len(chunked.bounds)):
            with torch.no_grad(), self.engine.micro_batch(last=False):
                chunked.run(index, collected, 1.0)
        return collected

    def _must(self, chunked: ChunkedBatch) -> list[bool]:
        if self.must is None:
            return [False] * len(chunked.bounds)
        wanted = torch.tensor(self.must(chunked), dtype=torch.int32, device=self.engine.topology.device)
        if self.engine.topology.world > 1:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return [bool(x) for x in wanted.tolist()]

    def _try(self) -> None:
        """Before the first batch: can this model be run so?"""
        if not self._tried:
            layers = [block for _, block in blocks(self.model)]
            with torch.no_grad(), self.engine.micro_batch(last=False):
                self._attention = try_model(self.engine.module, self.model, layers)
            self._tried = True


def padded(batch: Batch, length: int) -> Batch:
    """At least `length` positions, the new ones on the right and not learned: nothing looks at them."""
    missing = length - batch["input_ids"].shape[1]
    if missing <= 0:
        return batch
    shape = batch["input_ids"].shape
    made = dict(batch)
    for name, value in batch.items():
        if value.shape[:2] == shape:
            fill = IGNORE if name in ("labels", "shift_labels") else 0
            made[name] = torch.nn.functional.pad(value, (0, missing), value=fill)
    if "position_ids" in batch:
        # A document of its own.
        made["position_ids"][:, -missing:] = torch.arange(missing, device=batch["position_ids"].device)
    return made
