"""The same schedules and stages by PyTorch's own runtime: a second opinion on ours.

`_PipelineScheduleRuntime` and its `_prepare_schedule_with_comms` are private: a test holds them to what is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _PipelineSchedule, _PipelineScheduleRuntime

from distrib.errors import Refused
from distrib.pipeline.executor import Stage
from distrib.pipeline.ops import Schedule


class TorchRuntime:
    """All ranks make it at once; a call is a step. `group` has the ranks of the pipeline, all where it is None; the
    micro-batches are all alike."""

    def __init__(
        self,
        schedule: Schedule,
        stages: Mapping[int, Stage],
        device: torch.device,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.count = schedule.micro_batches
        whole = {(op.stage, op.micro_batch) for ops in schedule.ranks for op in ops if op.kind == "B"}
        parts = torch_stages(stages, schedule.stages, self.count, device, whole, group)
        runtime: Any = _PipelineScheduleRuntime(parts, self.count, loss_fn=loss, scale_grads=False)  # type: ignore[no-untyped-call]
        actions = {rank: [_Action.from_str(str(op)) for op in ops] for rank, ops in enumerate(schedule.ranks)}
        runtime._prepare_schedule_with_comms(actions)
        self.runtime = runtime

    def __call__(self) -> None:
        step(self.runtime, self.count)


def torch_stages(
    stages: Mapping[int, Stage],
    count: int,
    micro_batches: int,
    device: torch.device,
    whole: set[tuple[int, int]],
    group: dist.ProcessGroup | None = None,
) -> list[PipelineStage]:
    """For any of PyTorch's schedules; `whole` has (stage, micro-batch) of the backwards that are not split."""
    if len({stage.border(i) for stage in stages.values() for i in range(micro_batches)}) > 1:
        raise Refused("micro-batches of different shapes: PyTorch's runtime takes equal ones only; use ours")
    return [_torch_stage(stage, index, count, device, whole, group) for index, stage in sorted(stages.items())]


def step(schedule: _PipelineSchedule, micro_batches: int) -> None:
    numbers = torch.arange(micro_batches)
    schedule.step(target=numbers, micro_batch=numbers, return_outputs=False)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Stages of ours have done with it."""
    return output


def _torch_stage(
    stage: Stage,
    index: int,
    count: int,
    device: torch.device,
    whole: set[tuple[int, int]],
    group: dist.ProcessGroup | None,
) -> PipelineStage:
    module = _Module(stage, {micro_batch for at, micro_batch in whole if at == index}, device)
    shape, dtype = stage.border(0)
    border = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
    last = torch.empty((), device="meta", requires_grad=True)
    return PipelineStage(
        module,
        index,
        count,
        device,
        input_args=border if index else (),
        output_args=border if index < count - 1 else last,
        group=group,
        dw_builder=module.later,
    )


class _Module(nn.Module):
    """A stage of ours as a module; its backward is what autograd runs."""

    def __init__(self, stage: Stage, whole: set[int], device: torch.device) -> None:
        super().__init__()
        self.stage, self.whole = stage, whole
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.behind = -1

    def forward(self, received: Tensor | None = None, *, micro_batch: Tensor) -> Any:
        return _Run.apply(self.anchor, received, self, int(micro_batch))  # type: ignore[no-untyped-call]

    def later(self) -> Any:
        """What is left of the backward that just ran."""
        return partial(self._weights, self.behind)

    def _weights(self, micro_batch: int) -> None:
        if micro_batch not in self.whole:
            self.stage.weights(micro_batch)


class _Run(torch.autograd.Function):
    """The anchor lets autograd come here also at stage 0, whose input needs no gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, received: Tensor | None, module: _Module, micro_batch: int) -> Tensor:
        ctx.module, ctx.micro_batch = module, micro_batch
        with torch.enable_grad():
            given = module.stage.forward(micro_batch, None if received is None else received.detach())
        return anchor.detach().clone() if given is None else given.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        module, i = ctx.module, ctx.micro_batch
        received = gradients[0] if gradients[0].dim() else None
        module.behind = i
        return None, module.stage.backward(i, received, whole=i in module.whole), None, None
