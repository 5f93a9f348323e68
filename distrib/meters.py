"""What a run costs. A value that cannot be measured here is None, never 0."""

from __future__ import annotations

import resource

import torch

from distrib.topology import Topology


def peak_bytes(topology: Topology) -> int:
    """CUDA: the allocator's peak since the start. CPU: the kernel's high-water mark of this process's memory."""
    if topology.device_type == "cuda":
        return torch.cuda.max_memory_allocated(topology.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
