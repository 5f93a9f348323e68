"""How fast the ranks there are talk to each other: all-reduces, and from each rank to the next.

Every time is the slowest rank's. How often a size is run follows from how long it takes, on all ranks alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from distrib.heartbeat import HERE

if TYPE_CHECKING:
    from torch import Tensor

    from distrib.topology import Topology

SMALL, MEDIUM, LARGE = 4 * 2**10, 2**20, 64 * 2**20
LEAST, MOST = 5, 200
BUDGET_S = 0.7
"""Of one size, as long as `LEAST` runs are in it."""
LONGEST_S = 4.0
"""Of the largest size, which is halved until it fits."""
Facts = dict[str, Any]


def measure(topology: Topology) -> Facts:
    """All ranks call it, and all get what came of it."""
    import torch.distributed as dist

    small, medium = (_all_reduce(topology, size) for size in (SMALL, MEDIUM))
    largest = LARGE
    while largest > MEDIUM and medium["seconds"] * largest / MEDIUM * (LEAST + 1) > LONGEST_S:
        largest //= 2
    sizes = [small, medium, *([_all_reduce(topology, largest)] if largest > MEDIUM else [])]
    return {
        "backend": "nccl" if topology.device_type == "cuda" else dist.get_backend(),
        "ranks": topology.world,
        "all_reduce": sizes,
        "neighbours": _neighbours(topology, min(largest, LARGE // 16)),
    }


def _all_reduce(topology: Topology, size: int) -> Facts:
    """Algorithm bandwidth is bytes by time; bus bandwidth, what each link had to carry, compares over numbers of
    ranks."""
    import torch
    import torch.distributed as dist

    HERE.at(f"measuring an all-reduce of {size} bytes")
    data = torch.zeros(size // 4, device=topology.device)
    found = _spread(_runs(topology, lambda: dist.all_reduce(data)))
    rate = size / found["seconds"]
    return {
        "bytes": size,
        **found,
        "bytes_per_s": rate,
        "bus_bytes_per_s": rate * 2 * (topology.world - 1) / topology.world,
    }


def _runs(topology: Topology, run: Callable[[], object]) -> list[float]:
    """Seconds of each run; the first, which makes connections, is not among them."""
    _timed(topology, run)
    (once_s,) = _slowest(topology, [_timed(topology, run)])
    times = max(LEAST, min(MOST, int(BUDGET_S / once_s)))
    return _slowest(topology, [_timed(topology, run) for _ in range(times)])


def _timed(topology: Topology, run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if topology.device_type == "cuda":
        import torch

        torch.cuda.synchronize(topology.device)
    return time.perf_counter() - start


def _slowest(topology: Topology, seconds: list[float]) -> list[float]:
    import torch
    import torch.distributed as dist

    held = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return [float(one) for one in held]


def _spread(seconds: list[float]) -> Facts:
    low, middle, high = quantiles(seconds, n=4)
    return {"runs": len(seconds), "seconds": middle, "seconds_iqr": [low, high]}


def _neighbours(topology: Topology, size: int) -> list[Facts]:
    """From each rank to the next: first the pairs that begin with an even rank, all at once, then the others."""
    import torch.distributed as dist

    mine = []
    for first in (0, 1):
        HERE.at("measuring links between neighbours")
        after = (topology.rank - first) % 2
        other = topology.rank - 1 if after else topology.rank + 1
        low = min(topology.rank, other)
        if first <= low and max(topology.rank, other) < topology.world:
            found: Facts = {"from": low, "to": low + 1}
            for name, bytes in (("latency", SMALL), ("large", size)):
                found |= {name: _spread(_round_trips(topology, other, bytes)) | {"bytes": bytes}}
            if not after:
                mine.append(_one_way(found))
        dist.barrier()
    everyone: list[list[Facts]] = [[]] * topology.world
    dist.all_gather_object(everyone, mine)
    return [pair for theirs in everyone for pair in theirs]


def _round_trips(topology: Topology, other: int, size: int) -> list[float]:
    import torch
    import torch.distributed as dist

    data = torch.zeros(size // 4, device=topology.device)

    def there_and_back() -> None:
        turns: list[Callable[[Tensor, int], object]] = [dist.send, dist.recv]
        for turn in turns if topology.rank < other else reversed(turns):
            turn(data, other)

    return [_timed(topology, there_and_back) for _ in range(LEAST + 1)][1:]


def _one_way(found: Facts) -> Facts:
    large = found["large"]
    return {
        "from": found["from"],
        "to": found["to"],
        "latency_s": found["latency"]["seconds"] / 2,
        "bytes": large["bytes"],
        "bytes_per_s": 2 * large["bytes"] / large["seconds"],
    }
