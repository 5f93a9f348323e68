"""What ranks really exchange: every collective and send that PyTorch is asked for, on this rank."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "send": "send",
}
OURS = ("recv_",)
"""Whose bytes another rank counts."""


class Wire(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`seen` counts (kind, bytes of the whole tensor, ranks); of kinds that a script does not have, under their names
    in torch. CommDebugMode would fail in layers that are autograd functions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[tuple[str, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        if func.namespace in ("c10d", "_c10d_functional") and name not in OURS:
            leaves = tree_leaves((args, kwargs))
            # The whole tensor is the larger one of the two that a gather or a scatter has.
            payload_bytes = max((leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)), default=0)
            self.seen[KINDS.get(name, name), payload_bytes, _ranks(leaves)] += 1
        return func(*args, **(kwargs or {}))


def _ranks(leaves: list[Any]) -> int:
    for leaf in leaves:
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return int(dist.ProcessGroup.unbox(leaf).size())
    return 0


def loopback_bytes() -> int:
    """Sent over this machine's loopback interface so far, by everyone who sees it."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError("no loopback interface in /proc/self/net/dev")
