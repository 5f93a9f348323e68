"""A global batch through a pipeline: the schedule's operations on this rank's stages, gradients with the engine at the
end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.contracts import Batch, Context, Result
from distrib.engines.torch_engine import TorchEngine
from distrib.errors import Refused, UserError
from distrib.meters import is_out_of_memory, peak_bytes
from distrib.pipeline.executor import Links, run
from distrib.pipeline.ops import Schedule
from distrib.pipeline.record import Span, Timeline
from strategies.core.edits import Elsewhere
from strategies.core.halves import Halfway
from strategies.core.objectives import Objective, learned
from strategies.core.steps import Recorder
from strategies.pipelining.partition import Partition
from strategies.pipelining.schedule import Source
from strategies.pipelining.stage import Part, Run
from strategies.pipelining.store import Store


class PipelineStep:
    """Every rank of a pipeline has the same micro-batches; what is exchanged are hidden states and their gradients."""

    def __init__(
        self,
        model: Any,
        engine: TorchEngine,
        objective: Objective,
        partition: Partition,
        source: Source,
        by_torch: bool,
    ) -> None:
        topology = engine.topology
        self.engine = engine
        self.objective = objective
        self.partition = partition
        self.source = source
        self.by_torch = by_torch
        own = source.own(topology.stage)
        others = {name: Elsewhere(model.get_submodule(name)) for stage in own for name in partition.names(stage)}
        store = Store()
        parts = [Part(stage, partition, model, engine, store, others if len(own) > 1 else {}) for stage in own]
        self.parts = {part.number: part for part in parts}
        self.model_type = model.config.model_type
        self.links = self._links(source.made(1))
        self.spans: list[Span] = []
        self._schedule: Schedule | None = None
        self._border: tuple[torch.Size, torch.dtype] | None = None

    def _links(self, schedule: Schedule) -> Links:
        topology = self.engine.topology
        if topology.stages == 1:
            return Links((topology.rank,), 0, topology.device, {})
        width = topology.data_world
        pipelines = [[stage * width + replica for stage in range(topology.stages)] for replica in range(width)]
        return Links.make(schedule, pipelines, topology.device)

    def __call__(self, micro_batches: Sequence[Batch], context: Context) -> Result:
        self.spans, self._schedule = [], self.source.made(len(micro_batches))
        with self.engine.stages(trains=True):
            self._run(self._schedule, micro_batches, context, [self.objective] * len(micro_batches), trains=True)
        losses = [loss for part in self.parts.values() for loss in part.losses]
        device = self.engine.topology.device
        loss = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64, device=device)
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches)
        return Result(self._from_last(loss.double()), tokens)

    def logprobs(self, micro_batches: Sequence[Batch], context: Context) -> list[Tensor]:
        recorders = [Recorder(learned(batch).shape) for batch in micro_batches]
        schedule = self.source.forwards(len(micro_batches))
        with self.engine.stages(trains=False):
            self._run(schedule, micro_batches, context, recorders, trains=False)
        found = []
        for recorder, batch in zip(recorders, micro_batches, strict=True):
            logprobs_BT = recorder.logprobs_BT
            if logprobs_BT is None:
                logprobs_BT = torch.zeros(learned(batch).shape, dtype=torch.float64, device=batch["input_ids"].device)
            found.append(self._from_last(logprobs_BT.double()))
        return found

    def rehearse(self, backbone: nn.Module) -> None:
        """With one stage there is nothing to try."""

    def halfway(self, forward: Callable[..., Any], inputs: Batch, context: Context, micro_batch: int) -> Halfway:
        store = next(iter(self.parts.values())).store
        with store:
            output = forward(**inputs, use_cache=False, return_dict=True)
        graph_BTD = output.last_hidden_state

        def backward(by_BTD: Tensor) -> None:
            if not graph_BTD.requires_grad:
                return
            with store, store.deferring(micro_batch):
                torch.autograd.backward(graph_BTD, by_BTD)
            store.run(micro_batch)
            store.forget()

        return Halfway(type(output)(last_hidden_state=graph_BTD.detach()), backward)

    def account(self) -> dict[str, Any]:
        """Of the latest step, if there was one."""
        bounds = self.partition.bounds
        return {
            "schedule": self.source.made(1).name,
            "ranks": self.source.ranks,
            "micro_batches": self._schedule.micro_batches if self._schedule else None,
            "layers": [stop - start for start, stop in itertools.pairwise(bounds)],
        }

    def timeline(self, step: int) -> Timeline | None:
        """PyTorch's runtime does not say when it did what."""
        if self.by_torch or self._schedule is None:
            return None
        mine = (tuple(self.spans), peak_bytes(self.engine.topology))
        everyone: list[Any] = [mine]
        if self.engine.staged:
            everyone = [None] * self.source.ranks
            dist.all_gather_object(everyone, mine, group=self.engine.staged.pipeline)
        spans, peaks = zip(*everyone, strict=True)
        return Timeline(self._schedule.name, spans, peaks, step)

    def _run(
        self,
        schedule: Schedule,
        micro_batches: Sequence[Batch],
        context: Context,
        objectives: Sequence[Objective],
        trains: bool,
    ) -> None:
        if self._border is None:
            self._border = self._rehearse(micro_batches[0], context)
        work = Run(micro_batches, context, objectives, trains, *self._border)
        for part in self.parts.values():
            part.begin(work)
        if trains and self.by_torch:
            # It hangs on private parts of PyTorch, which a newer version may not have.
            from distrib.pipeline.torch_runtime import TorchRuntime

            group = self.engine.staged.pipeline if self.engine.staged else None
            TorchRuntime(schedule, self.parts, self.engine.topology.device, group)()
        else:
            run(schedule, self.parts, self.links, self.spans if trains else None)
        for part in self.parts.values():
            part.store.forget()

    def _rehearse(self, batch: Batch, context: Context) -> tuple[torch.Size, torch.dtype]:
        """Every rank by itself, on made-up states: what edits want to try first is tried here. What the first stage
        makes is told to the others: a model may carry more than one state a token, in another precision than its
        weights, and its layers may give other things beside."""
        part = next(iter(self.parts.values()))

        def first() -> tuple[torch.Size, torch.dtype, int | None] | None:
            if part.number:
                return None
            values, hidden = part.rehearse(batch, context), part.hidden(batch, context)
            return hidden.shape[2:], hidden.dtype, values

        inner, dtype, values = self._together(first)

        def others() -> None:
            if part.number:
                part.stand_in(values)
                part.rehearse(batch, context)

        self._together(others)
        return inner, dtype

    def _together(self, work: Callable[[], Any]) -> Any:
        """What the first rank finds, on every rank. If one of them fails none waits for it."""
        said: list[tuple[str | None, Any]] = [self._tried(work)]
        if self.engine.staged:
            mine, said = said[0], said * self.engine.topology.stages
            dist.all_gather_object(said, mine, group=self.engine.staged.pipeline)
        if failure := next((failure for failure, _ in said if failure), None):
            raise Refused(failure)
        return said[0][1]

    def _tried(self, work: Callable[[], Any]) -> tuple[str | None, Any]:
        try:
            return None, work()
        except UserError as error:
            return str(error), None
        except Exception as error:
            if is_out_of_memory(error):
                raise
            name, stages = self.model_type, " and ".join(map(str, self.parts))
            why = " ".join(f"{type(error).__name__}: {error}".split())
            return f"model type {name!r}: stage {stages} cannot run alone: {why[:200]}", None

    def _from_last(self, value: Tensor) -> Tensor:
        """What the last stage has, on every rank of the pipeline; the others' is 0."""
        if self.engine.staged:
            dist.all_reduce(value, group=self.engine.staged.pipeline)
        return value
