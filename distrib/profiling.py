"""What happened inside: a trace of some steps, and what filled the memory when it ran out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from distrib.topology import Topology

HISTORY = 100_000
"""Allocations whose origin a snapshot remembers."""


class Profiler:
    """Traces the steps `first` to `last`, one file a rank, which chrome://tracing and Perfetto open.

    While a trace is asked for, a GPU's allocator also notes where its memory comes from, for a snapshot.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, topology: Topology) -> None:
        self.folder = folder
        self.first, self.last = steps or (0, -1)
        self.topology = topology
        self._trace: Any = None
        if steps and topology.device_type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)

    def begin(self, step: int) -> None:
        if self._trace is None and self.first <= step <= self.last:
            self._begun = step
            self._trace = torch.profiler.profile(record_shapes=True, profile_memory=True)
            self._trace.start()

    def end(self, step: int, early: bool = False) -> Path | None:
        """The file, when this step was the last one to trace, or is the last one there is."""
        if self._trace is None or (step < self.last and not early):
            return None
        self._trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"steps-{self._begun}-{max(step, self._begun)}-rank-{self.topology.rank}.json"
        self._trace.export_chrome_trace(str(path))
        self._trace = None
        return path


def snapshot(folder: Path, topology: Topology) -> Path | None:
    """What a GPU's allocator holds, for https://pytorch.org/memory_viz; None where there is no such record."""
    if topology.device_type != "cuda":
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"memory-rank-{topology.rank}.pickle"
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
    return path
