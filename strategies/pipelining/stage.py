"""One stage of a model, as the executor runs it: its layers alone, between what came and what goes on.

The model's own forward runs, so masks, positions and whatever else it makes of a batch are made as ever. Modules of
other stages pass on what they are given; the last of them before this stage gives the hidden states that were received.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distrib.contracts import MODEL_INPUTS, Batch, Context
from distrib.engines.torch_engine import TorchEngine
from strategies.core.edits import Elsewhere
from strategies.core.objectives import Objective
from strategies.core.steps import arguments, seeded
from strategies.pipelining.partition import Partition
from strategies.pipelining.store import Store


@dataclass(frozen=True)
class Run:
    """What a step, or an evaluation, does with its micro-batches."""

    micro_batches: Sequence[Batch]
    context: Context
    objectives: Sequence[Objective]
    """One a micro-batch: those of an evaluation keep what they see."""
    trains: bool
    inner: torch.Size
    """What a hidden state between two stages has beside rows and tokens."""
    dtype: torch.dtype


@dataclass
class Part:
    """Stage `number` of the model on this rank."""

    number: int
    partition: Partition
    model: Any
    engine: TorchEngine
    store: Store
    others: dict[str, Elsewhere]
    """What stands for the modules of this rank's other stages while this one runs."""
    run: Run | None = None
    losses: list[Tensor] = field(default_factory=list)
    _graphs: dict[int, tuple[Tensor | None, Tensor]] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        return self.number == self.partition.stages - 1

    def begin(self, run: Run) -> None:
        self.run, self.losses = run, []
        self._graphs.clear()

    def border(self, micro_batch: int) -> tuple[torch.Size, torch.dtype]:
        assert self.run is not None
        shape = self.run.micro_batches[micro_batch]["input_ids"].shape
        return shape + self.run.inner, self.run.dtype

    def rehearse(self, batch: Batch, context: Context) -> int | None:
        """All stages of this rank, as if there were no others. How many things a layer gives, if not one."""
        values = None

        def note(_: nn.Module, __: Any, given: Any) -> None:
            nonlocal values
            values = len(given) if isinstance(given, tuple) else None
            self.stand_in(values)

        first = [self.model.get_submodule(name) for name in self.partition.layers_of(self.number)[:1]]
        hooks = [layer.register_forward_hook(note) for layer in first]
        try:
            with torch.enable_grad(), self._calling(context, 0), self.store.discarding():
                self.engine.module(**_inputs(batch), hidden_only=True)
        finally:
            for hook in hooks:
                hook.remove()
        return values

    def stand_in(self, values: int | None) -> None:
        """Other stages' layers give as many things as this model's layers do."""
        for name in self.partition.layers:
            for module in (self.others.get(name), self.model.get_submodule(name)):
                if isinstance(module, Elsewhere):
                    module.values = values

    def hidden(self, batch: Batch, context: Context) -> Tensor:
        """What the first stage makes."""
        with torch.no_grad(), self._calling(context, 0), self._alone(None):
            return self.engine.module(**_inputs(batch), hidden_only=True)  # type: ignore[no-any-return]

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        run = self.run
        assert run is not None
        if received is not None:
            received = received.detach().requires_grad_(run.trains)
        with torch.set_grad_enabled(run.trains), self._calling(run.context, micro_batch), self._alone(received):
            found: Tensor = self._call(run, micro_batch)
        if self.last:
            self.losses.append(found.detach())
        if run.trains:
            self._graphs[micro_batch] = (received, found)
        return None if self.last else found.detach()

    def _call(self, run: Run, micro_batch: int) -> Any:
        batch = run.micro_batches[micro_batch]
        if self.last:
            return self.engine.module(**arguments(batch, run.objectives[micro_batch], run.context.weight)).loss
        return self.engine.module(**_inputs(batch), hidden_only=True)

    def backward(self, micro_batch: int, received: Tensor | None, whole: bool) -> Tensor | None:
        came, left = self._graphs.pop(micro_batch)
        if left.requires_grad:
            waiting = nullcontext() if whole else self.store.deferring((self.number, micro_batch))
            with self.store, waiting:
                if self.last:
                    self.engine.backward(left)
                else:
                    torch.autograd.backward(left, received)
            self.engine.settle()
        return None if came is None else came.grad

    def weights(self, micro_batch: int) -> None:
        self.store.run((self.number, micro_batch))
        self.engine.settle()

    @contextmanager
    def _calling(self, context: Context, micro_batch: int) -> Iterator[None]:
        with (
            seeded(context, self.engine, micro_batch, self.number),
            self.engine.micro_batch(last=False),
            self.store,
        ):
            yield

    @contextmanager
    def _alone(self, received: Tensor | None) -> Iterator[None]:
        """Without the layers of this rank's other stages, and with what was received in the place of the one before."""
        own = self.partition.names(self.number)
        lent = [(name, place_in(self.model, name, other)) for name, other in self.others.items() if name not in own]
        name = self.partition.entrance(self.number)
        entrance = self.model.get_submodule(name) if name else None
        if entrance is not None:
            entrance.received = received
        try:
            yield
        finally:
            if entrance is not None:
                entrance.received = None
            for name, module in lent:
                place_in(self.model, name, module)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}


def place_in(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts `module` in the place of `name`; what was there."""
    parent, _, leaf = name.rpartition(".")
    modules = model.get_submodule(parent)._modules
    before = modules[leaf]
    assert before is not None
    modules[leaf] = module
    return before
