"""Peak memory of a process above what it holds at one moment."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

# Blocks of this size and more are mappings of their own, given back when freed.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**18), "MALLOC_ARENA_MAX": "1"}


class Memory:
    """Made where the measured part starts. `peak_bytes` is the allocator's high-water mark on a GPU, the kernel's on a
    CPU, less what was there at the start.

    The kernel counts resident pages, those of mapped files and of freed blocks that the C library keeps too; under
    `EXACT_MALLOC` it keeps none.
    """

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda.is_available()
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start_bytes = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.start_bytes = _status_bytes("VmRSS")

    def peak_bytes(self) -> int:
        import torch

        peak = torch.cuda.max_memory_allocated() if self.cuda else _status_bytes("VmHWM")
        return peak - self.start_bytes


def _status_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
