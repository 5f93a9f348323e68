"""A global batch whose micro-batches go through the model chunk by chunk (`strategies/streaming/sequence.py`).

Gradients add up in the engine chunk by chunk and cross ranks in the last chunk of the last micro-batch. Every rank
runs the same number of chunks, since engines gather and reduce inside them.

Objectives that are no sum over tokens go in two phases: statistics without a graph, the objective's derivatives by
them, then the chunks with those derivatives as weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.contracts import IGNORE, Batch, Context, Engine, Result
from distrib.errors import Refused
from strategies.core.halves import Halfway
from strategies.core.objectives import Objective
from strategies.core.prepare import causal_lm
from strategies.core.steps import seeded
from strategies.streaming.accumulate import rounded_once
from strategies.streaming.backbone import find_layers
from strategies.streaming.draws import Draw, Taken, everything
from strategies.streaming.replay import Circumstances
from strategies.streaming.sequence import ChunkedBatch
from strategies.streaming.share import Collected, Share
from strategies.streaming.trial import try_model
from strategies.streaming.unshared import not_shared


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
        with rounded_once(self.model) if self.engine.name == "local" else nullcontext():
            return self._run(micro_batches, context)

    def _run(self, micro_batches: Sequence[Batch], context: Context) -> Result:
        losses, tokens = [], 0
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            chunked = self._chunked(batch)
            with seeded(context, self.engine, index):
                losses.append(self._one(chunked, context, index, last))
            tokens += batch["input_ids"].numel() // self.engine.stripes.ranks
        total = torch.stack(losses).sum()
        # Every rank has the whole of an objective that is no sum over tokens.
        return Result(self.engine.stripes.sum(total) if self.objective.separable else total, tokens)

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

    def rehearse(self, backbone: nn.Module) -> None:
        self._try(backbone)

    def halfway(self, forward: Callable[..., Any], inputs: Batch, context: Context, micro_batch: int) -> Halfway:
        ids_BT = inputs["input_ids"]
        chunked = self._chunked({**inputs, "shift_labels": torch.full_like(ids_BT, IGNORE)}, forward)
        circumstances = Circumstances.of(self.model, ids_BT.device)
        with torch.no_grad():
            outputs = [chunked.states(index) for index in range(len(chunked.bounds))]
        hidden_BTD = torch.cat([output.last_hidden_state for output in outputs], 1)

        def backward(by_BTD: Tensor) -> None:
            # A loop's loss says in no other way which of its tokens are learned.
            chunked.share.labels_BS = torch.where(by_BTD.any(-1), 0, IGNORE)
            taken = self.draw(len(chunked.bounds), self._must(chunked), context, micro_batch) or [Taken(0, own=0.0)]
            with rounded_once(self.model), circumstances.restored(self.model), torch.enable_grad():
                for chunk in reversed(taken):
                    chunked.compensate(chunk)
                    states_BCD = chunked.states(chunk.index, writes=chunk is taken[-1]).last_hidden_state
                    if states_BCD.requires_grad:
                        torch.autograd.backward(states_BCD, chunked.cut(by_BTD, chunk.index) * chunk.own)

        return Halfway(type(outputs[-1])(last_hidden_state=hidden_BTD), backward)

    def _chunked(self, batch: Batch, module: Callable[..., Any] | None = None) -> ChunkedBatch:
        self._try(self.engine.module)
        if any(getattr(part, "gradient_checkpointing", False) and part.training for part in self.model.modules()):
            raise Refused("gradient checkpointing is on, which drops recorded keys and values: switch it off")
        count = self._most(-(-batch["input_ids"].shape[1] // self.chunk))
        share = Share(batch, self.engine.stripes, count)
        bounds = [(index * share.length // count, (index + 1) * share.length // count) for index in range(count)]
        return ChunkedBatch(module or self.engine.module, self.model, self._attention, share, bounds, self.offload)

    def _most(self, count: int) -> int:
        """Over the ranks."""
        if self.engine.topology.world == 1:
            return count
        held = torch.tensor(count, device=self.engine.topology.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held.item())

    def _one(self, chunked: ChunkedBatch, context: Context, micro_batch: int, last: bool) -> Tensor:
        """Loss and gradients of a micro-batch."""
        # Without any, a chunk that weighs nothing still lets gradients cross ranks.
        taken = self.draw(len(chunked.bounds), self._must(chunked), context, micro_batch) or [Taken(0, own=0.0)]
        if self.objective.separable:
            # Nothing sees what comes after the last chunk that is taken, which records its own keys and values.
            self._record(chunked, range(taken[-1].index))
            return self._walk(chunked, taken, self.objective, context.weight, last)
        collected = self._collect(chunked, self.objective.needs)
        loss, linear = chunked.differentiate(self.objective, collected, context.weight)
        self._walk(chunked, taken, linear, 1.0, last)
        return loss

    def _walk(self, chunked: ChunkedBatch, taken: list[Taken], objective: Any, weight: float, last: bool) -> Tensor:
        """Backwards from the last chunk to the first; the sum of their losses, each with its factor."""
        losses = []
        for chunk in reversed(taken):
            crossing = last and chunk is taken[0]
            losses.append(self._backward(chunked, chunk, objective, weight, crossing, writes=chunk is taken[-1]))
        return torch.stack(losses).sum()

    def _backward(
        self, chunked: ChunkedBatch, chunk: Taken, objective: Any, weight: float, crossing: bool, writes: bool
    ) -> Tensor:
        chunked.compensate(chunk)
        with self.engine.micro_batch(crossing):
            loss = chunked.run(chunk.index, objective, weight, writes=writes) * chunk.own
            self.engine.backward(loss)
        return loss.detach()

    def _record(self, chunked: ChunkedBatch, indices: range) -> None:
        for index in indices:
            with torch.no_grad(), self.engine.micro_batch(last=False):
                chunked.run(index, self.objective, 1.0, learn=False)

    def _collect(self, chunked: ChunkedBatch, needs: frozenset[str]) -> Collected:
        """Every statistic of every learned token; keys and values are recorded on the way."""
        collected = Collected(chunked.share.whole["input_ids"].numel(), needs)
        for index in range(len(chunked.bounds)):
            with torch.no_grad(), self.engine.micro_batch(last=False):
                chunked.run(index, collected, 1.0)
        return collected.over_ranks(self.engine.stripes)

    def _must(self, chunked: ChunkedBatch) -> list[bool]:
        if self.must is None:
            return [False] * len(chunked.bounds)
        wanted = torch.tensor(self.must(chunked), dtype=torch.int32, device=self.engine.topology.device)
        if self.engine.topology.world > 1:
            dist.all_reduce(wanted, op=dist.ReduceOp.MAX)
        return [bool(x) for x in wanted.tolist()]

    def _try(self, module: nn.Module) -> None:
        """Before the first batch: can this model be run so?"""
        if not self._tried:
            layers = [block for _, block in find_layers(self.model)]
            with torch.no_grad(), self.engine.micro_batch(last=False):
                self._attention = try_model(module, self.model, layers)
            if self.engine.stripes.ranks > 1 and self._attention is None:
                raise not_shared(self.model, self.engine.stripes.ranks)
            self._tried = True
