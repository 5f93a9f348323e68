"""What a run costs in memory. A value that cannot be measured here is None, never 0."""

from __future__ import annotations

import ctypes
import gc
import resource
from contextlib import suppress
from pathlib import Path

from distrib.topology import Topology

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_ARENA_MAX": "1"}
"""Set before a process starts, it makes the C library give freed blocks back at once: what is resident is what is live,
and every block costs its page faults again."""

MEMINFO = Path("/proc/meminfo")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(topology: Topology) -> int | None:
    """CUDA: the allocator's peak since the start. CPU: the kernel's high-water mark of this process's memory."""
    if topology.device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(topology.device)
    return _status_bytes("VmHWM")


def forget_peak(topology: Topology) -> None:
    """Peaks from here on."""
    if topology.device_type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(topology.device)
    else:
        _reset()


def free_bytes() -> int | None:
    """Of the host's memory, less what others use; None where the kernel does not tell."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def spare_the_machine() -> None:
    """From here on, a process that needs more than there is ends itself, not its neighbours."""
    if (free := free_bytes()) is None:
        return
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (free, most))
        Path("/proc/self/oom_score_adj").write_text("1000")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's allocator, or the host's, had no more to give."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


class Memory:
    """Peak memory above what is there when it is made: the allocator's on a GPU, the kernel's on a CPU.

    The kernel counts resident pages, those of mapped files and of freed blocks that the C library keeps too; under
    `EXACT_MALLOC` it keeps none.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        gc.collect()
        if topology.device_type == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start_bytes: int | None = torch.cuda.memory_allocated()
        else:
            self.start_bytes = _reset()

    def peak_bytes(self) -> int | None:
        peak = peak_bytes(self._topology)
        return None if peak is None or self.start_bytes is None else peak - self.start_bytes


def _reset() -> int | None:
    """Start the high-water mark anew from what is resident now; None where the kernel does not offer it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5")
    except (OSError, AttributeError):
        return None
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int | None:
    if not STATUS.exists():
        return None
    line = next((line for line in STATUS.read_text().splitlines() if line.startswith(key)), None)
    return None if line is None else int(line.split()[1]) * 1024
