"""One sequence over several ranks, and the exchange that attention needs ("DeepSpeed Ulysses", 2309.14509).

Of N ranks, rank r has the positions r, r + N, r + 2N, ... of every sequence: any stretch of them, whatever its bounds,
is of all ranks together one stretch of the sequence, and every rank has as much to do as the others.

    everything but attention       [B, H, T/N, D]   all heads of this rank's positions
    attention    exchange      ->  [B, H/N, T, D]   this rank's heads of all positions, in order
                 exchange back ->  [B, H, T/N, D]

An exchange moves each number once, so its gradient is the exchange back. The gradients of weights are sums over
positions: ranks add them up as they do for other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from distrib.topology import Topology


@dataclass(frozen=True)
class Stripes:
    """Which positions this rank has: each `ranks`-th from `rank` on. The default has all of them, and exchanges
    nothing."""

    ranks: int = 1
    rank: int = 0
    group: Any = None

    @classmethod
    def of(cls, topology: Topology) -> Stripes:
        """Every rank calls it."""
        if topology.context == 1:
            return ALONE
        return cls(topology.context, topology.part, _group(dist.group.WORLD, topology.context))

    def take(self, whole_BT: Tensor) -> Tensor:
        return whole_BT[:, self.rank :: self.ranks].contiguous() if self.ranks > 1 else whole_BT

    def queries(self, part_BHCD: Tensor) -> Tensor:
        """This rank's heads, [B, H/N, N * C, D]."""
        return _exchange(part_BHCD, self, True) if self.ranks > 1 else part_BHCD

    def keys(self, part_BHCD: Tensor) -> Tensor:
        """The same of keys or values; their heads are repeated where N does not divide them."""
        times = self.ranks // gcd(self.ranks, part_BHCD.shape[1])
        return self.queries(part_BHCD.repeat_interleave(times, 1) if times > 1 else part_BHCD)

    def own_heads(self, by_head_H: Tensor) -> Tensor:
        return by_head_H.chunk(self.ranks)[self.rank]

    def outputs(self, whole_BTHD: Tensor) -> Tensor:
        """All heads of this rank's positions, [B, T/N, N * H, D]."""
        if self.ranks == 1:
            return whole_BTHD
        return _exchange(whole_BTHD.transpose(1, 2), self, False).transpose(1, 2).contiguous()

    def sum(self, value: Tensor) -> Tensor:
        """Over the ranks of a sequence."""
        if self.ranks == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total


ALONE = Stripes()


@cache
def _group(world: Any, ranks: int) -> Any:
    """Not the world's own, even where it has the same ranks: what gradients do there may come in between."""
    group, _ = dist.new_subgroups(ranks)  # type: ignore[no-untyped-call]
    return group


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, stripes: Stripes, to_heads: bool) -> Tensor:
        ctx.stripes, ctx.to_heads = stripes, to_heads
        return (_to_heads if to_heads else _to_positions)(tensor, stripes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (_to_positions if ctx.to_heads else _to_heads)(gradient, ctx.stripes), None, None


def _exchange(tensor: Tensor, stripes: Stripes, to_heads: bool) -> Tensor:
    return _Exchange.apply(tensor, stripes, to_heads)  # type: ignore[no-untyped-call, no-any-return]


def _to_heads(part_BHCD: Tensor, stripes: Stripes) -> Tensor:
    rows, _, count, size = part_BHCD.shape
    sent = part_BHCD.reshape(rows, stripes.ranks, -1, count, size).movedim(1, 0).contiguous()
    # [N, B, H/N, C, D]: of position n of each rank, one after the other.
    return _received(sent, stripes).movedim(0, 3).reshape(rows, -1, count * stripes.ranks, size)


def _to_positions(whole_BHTD: Tensor, stripes: Stripes) -> Tensor:
    rows, heads, count, size = whole_BHTD.shape
    sent = whole_BHTD.reshape(rows, heads, -1, stripes.ranks, size).movedim(3, 0).contiguous()
    return _received(sent, stripes).movedim(0, 1).reshape(rows, -1, count // stripes.ranks, size)


def _received(sent: Tensor, stripes: Stripes) -> Tensor:
    # As an operator with a result, which whoever runs operators again can follow.
    received: Tensor = funcol.wait_tensor(  # type: ignore[no-untyped-call]
        funcol.all_to_all_single(sent, None, None, stripes.group)
    )
    return received
