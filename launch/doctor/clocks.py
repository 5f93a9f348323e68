"""Clocks: how far those of the ranks are apart, and how fine this machine's are."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from distrib.heartbeat import HERE

if TYPE_CHECKING:
    from distrib.topology import Topology

ROUNDS = 10
Facts = dict[str, Any]


def resolution() -> Facts:
    """Seconds: what the system promises of the clock that steps are timed with, and the smallest step seen."""
    ticks = [time.perf_counter() for _ in range(1000)]
    steps = [after - before for before, after in pairwise(ticks) if after > before]
    promised = time.get_clock_info("perf_counter")
    return {
        "monotonic": promised.monotonic,
        "resolution_s": promised.resolution,
        "smallest_step_s": min(steps, default=None),
    }


def differences(topology: Topology) -> list[Facts]:
    """Rank 0 asks each of the others what time it is, and takes its quickest answer. All ranks call it; rank 0 gets
    what came of it."""
    import torch
    import torch.distributed as dist

    HERE.at("comparing clocks")
    found = []
    told = torch.zeros(1, dtype=torch.float64)
    for other in range(1, topology.world):
        if topology.main:
            found.append(
                {"rank": other, **min((_asked(other) for _ in range(ROUNDS)), key=lambda one: one["give_or_take_s"])}
            )
        elif topology.rank == other:
            for _ in range(ROUNDS):
                dist.recv(told, 0)
                told[0] = time.time()
                dist.send(told, 0)
    return found


def _asked(other: int) -> Facts:
    import torch
    import torch.distributed as dist

    told = torch.zeros(1, dtype=torch.float64)
    before = time.time()
    dist.send(told, other)
    dist.recv(told, other)
    after = time.time()
    return {"ahead_s": float(told) - (before + after) / 2, "give_or_take_s": (after - before) / 2}
