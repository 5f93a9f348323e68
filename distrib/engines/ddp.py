"""Data parallelism: every rank holds the model, gradients are summed. With one rank, just the model.

bf16: autocast over fp32 parameters, which are the master weights themselves; gradients and their sum are fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distrib.engines import Fill
from distrib.engines.torch_engine import TorchEngine
from distrib.units import units


class DDP(TorchEngine):
    name = "ddp"

    def _place(self, fill: Fill) -> nn.Module:
        for name, unit in units(self.model):
            fill(self.model, name)
            unit.to(self.topology.device)
        self.model.to(self.topology.device)
        if self.topology.world == 1 or self.settings.optimizer is None or self.staged:
            return self.model
        wrapped = DistributedDataParallel(
            self.model,
            device_ids=[self.topology.local_rank] if self.topology.device_type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        wrapped.broadcast_buffers = False
        # DDP averages; every engine sums.
        wrapped.register_comm_hook(None, _sum)
        return wrapped

    @contextmanager
    def stages(self, trains: bool) -> Iterator[None]:
        # DDP counts the gradients of a backward, and a stage has those of its weights later.
        with super().stages(trains):
            yield
            if self.staged and trains:
                self.staged.sum_over_replicas(p for p in self.model.parameters() if p.requires_grad)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        alone = last or not isinstance(self.module, DistributedDataParallel)
        with super().micro_batch(last), nullcontext() if alone else self.module.no_sync():  # type: ignore[operator]
            yield


def _sum(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    future: Any = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])  # type: ignore[no-any-return]
