"""The default step: plain forward and backward of each micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy
import torch
from torch import Tensor

from distrib.contracts import MODEL_INPUTS, Batch, Context, Engine, Result
from strategies.core.objectives import Objective, Stats, learned

LABELS = ("labels", "shift_labels")


class PlainStep:
    """Forward and backward per micro-batch; gradients cross ranks in the last one."""

    def __init__(self, engine: Engine, objective: Objective) -> None:
        self.engine = engine
        self.objective = objective

    def __call__(self, micro_batches: Sequence[Batch], context: Context) -> Result:
        losses, tokens = [], 0
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with seeded(context, self.engine, index), self.engine.micro_batch(last):
                loss = self.engine.module(**arguments(batch, self.objective, context.weight)).loss
                self.engine.backward(loss)
            losses.append(loss.detach())
            tokens += batch["input_ids"].numel()
        return Result(loss=torch.stack(losses).sum(), tokens=tokens)

    def logprobs(self, micro_batches: Sequence[Batch], context: Context) -> list[Tensor]:
        """[B, T] a micro-batch, aligned with input_ids (with shift_labels where given), 0 where not learned.
        Whether dropout is on is the caller's `train()` or `eval()`."""
        kept = []
        for index, batch in enumerate(micro_batches):
            recorder = Recorder(learned(batch).shape)
            # Not the last: nothing is backpropagated, so nothing may be exchanged.
            with torch.no_grad(), seeded(context, self.engine, index), self.engine.micro_batch(last=False):
                self.engine.module(**arguments(batch, recorder, weight=1.0))
            assert recorder.logprobs_BT is not None
            kept.append(recorder.logprobs_BT)
        return kept


def arguments(batch: Batch, objective: Objective, weight: float) -> dict[str, Any]:
    """What the model's forward takes of a batch. The extras travel in a view that engines do not look into:
    they would round what the objective compares to the precision of the weights."""
    passed: dict[str, Any] = {name: batch[name] for name in (*MODEL_INPUTS, *LABELS) if name in batch}
    extras = {name: value for name, value in batch.items() if name not in passed}
    return {**passed, "objective": objective, "weight": weight, "extras": MappingProxyType(extras)}


@contextmanager
def seeded(context: Context, engine: Engine, index: int, stage: int = 0) -> Iterator[None]:
    """Randomness from (seed, step, data-parallel rank, micro-batch, stage or part of the sequences) alone; the caller's
    own is as before after.

    The preflight's step is -1.
    """
    topology = engine.topology
    place = stage or topology.part
    entropy = [context.seed % 2**63, context.step + 1, topology.data_rank, index, *([place] if place else [])]
    devices = [topology.device] if topology.device_type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(numpy.random.SeedSequence(entropy).generate_state(1, numpy.uint64)[0]))
        yield


class Recorder:
    """An objective that minimises nothing and keeps the log-probabilities."""

    separable = False
    needs = frozenset[str]()

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.logprobs_BT: Tensor | None = None

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return 0.0

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        flat = stats.logprob_n.new_zeros(self.shape.numel())
        self.logprobs_BT = flat.index_copy_(0, stats.token_n, stats.logprob_n).view(self.shape)
        return stats.logprob_n.sum()
