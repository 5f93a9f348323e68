"""A global batch whose sequences lie over several ranks, by plain forward and backward of each rank's share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from distrib.contracts import Batch, Context, Engine, Result
from strategies.core.objectives import Objective
from strategies.core.prepare import causal_lm
from strategies.core.steps import seeded
from strategies.streaming.implementation import NAME, using_attention
from strategies.streaming.share import Collected, Gathered, Part, Share
from strategies.streaming.visibility import within


class SharedStep:
    """The default step under context parallelism. A model with layers that stream switches their attention itself."""

    def __init__(self, model: nn.Module, engine: Engine, objective: Objective) -> None:
        self.model = causal_lm(model)
        self.engine = engine
        self.objective = objective
        streams = any("_ebbtide_streaming" in vars(part) for part in self.model.modules())
        self._attention = None if streams else NAME

    def __call__(self, micro_batches: Sequence[Batch], context: Context) -> Result:
        losses, tokens = [], 0
        kind = Part if self.objective.separable else Gathered
        for index, batch in enumerate(micro_batches):
            share = Share(batch, self.engine.stripes)
            last = index == len(micro_batches) - 1
            with seeded(context, self.engine, index), self.engine.micro_batch(last), self._sharing(share):
                loss = self._forward(share, kind(self.objective, share, 0, share.length), context.weight)
                self.engine.backward(loss)
            losses.append(loss.detach())
            tokens += batch["input_ids"].numel() // self.engine.stripes.ranks
        total = torch.stack(losses).sum()
        # Every rank has the whole of an objective that is no sum over tokens.
        return Result(self.engine.stripes.sum(total) if self.objective.separable else total, tokens)

    def logprobs(self, micro_batches: Sequence[Batch], context: Context) -> list[Tensor]:
        """[B, T] a micro-batch, as the default step's."""
        kept = []
        for index, batch in enumerate(micro_batches):
            share = Share(batch, self.engine.stripes)
            collected = Collected(share.whole["input_ids"].numel(), frozenset())
            with self._unlearned(context, index), self._sharing(share):
                self._forward(share, Part(collected, share, 0, share.length), 1.0)
            rows, width = batch["input_ids"].shape
            kept.append(collected.over_ranks(self.engine.stripes).values["logprob"].view(rows, -1)[:, :width])
        return kept

    @contextmanager
    def _unlearned(self, context: Context, index: int) -> Iterator[None]:
        with torch.no_grad(), seeded(context, self.engine, index), self.engine.micro_batch(last=False):
            yield

    @contextmanager
    def _sharing(self, share: Share) -> Iterator[None]:
        with within(share.spread), using_attention(self.model, self._attention):
            yield

    def _forward(self, share: Share, objective: Part, weight: float) -> Tensor:
        passed: dict[str, Any] = {**share.inputs, "shift_labels": share.labels_BS, "objective": objective}
        loss: Tensor = self.engine.module(**passed, weight=weight, extras=MappingProxyType({}), use_cache=False).loss
        return loss
