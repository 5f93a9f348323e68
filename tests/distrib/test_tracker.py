"""Live bytes of runs without data."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distrib.tracker import Tracker, tracking

MIB = 2**20


class Squared(torch.autograd.Function):
    """Writes into a buffer in place, keeps its input, and holds a temporary of one MiB in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        out.copy_(x).mul_(x)
        return out

    @staticmethod
    def backward(ctx: Any, by_out: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        twice = x * 2
        return twice.mul_(by_out)


def test_tracker_counts_storages_until_their_last_reference_is_gone() -> None:
    tracker = Tracker()
    with tracking(FakeTensorMode(), tracker):
        x = torch.zeros(MIB // 4, requires_grad=True)
        assert tracker.live_bytes == MIB
        half = x.detach()[: MIB // 8].view(2, -1)
        assert tracker.live_bytes == MIB
        del half
        y = Squared.apply(Squared.apply(x))
        # The first output is held by the graph alone.
        assert tracker.live_bytes == 3 * MIB
        tracker.restart()
        y.backward(torch.ones_like(y))
        # The gradient of y, that of the first output while it is made; x's own is what is left.
        assert tracker.peak_bytes() == 2 * MIB
        del y
        assert tracker.live_bytes == 2 * MIB
        del x
        assert tracker.live_bytes == 0
