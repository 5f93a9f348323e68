"""When every operation of a step ran: simulated, or recorded by a run and kept as a file.

The file is JSON: seconds since the ranks began the step together, each by its own rank's clock, for the work alone
(waiting for another rank is what lies between two operations); `peak_bytes` is null where it is not known.

    {"kind": "ebbtide timeline", "schedule": "h1", "step": 7, "ranks": [
        {"peak_bytes": 123456, "ops": [["0F0", 0.0, 0.0123], ["0F1", 0.0123, 0.0247]]},
        {"peak_bytes": null, "ops": [["1F0", 0.0130, 0.0251]]}
    ]}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distrib.errors import UserError
from distrib.files import write_text
from distrib.pipeline.ops import Op

FILE = "timeline.json"
"""Its name in a run's folder."""
KIND = "ebbtide timeline"


class Span(NamedTuple):
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every rank, in order. `step` is the one that was recorded; a simulation is of none."""

    schedule: str
    ranks: tuple[tuple[Span, ...], ...]
    peak_bytes: tuple[float | None, ...]
    step: int | None = None

    @property
    def start(self) -> float:
        return min(span.start for spans in self.ranks for span in spans)

    @property
    def seconds(self) -> float:
        return max(span.end for spans in self.ranks for span in spans) - self.start

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they had nothing to do."""
        busy = sum(span.end - span.start for spans in self.ranks for span in spans)
        return 1 - busy / (len(self.ranks) * self.seconds)


def write(path: Path, timeline: Timeline) -> None:
    ranks = [
        {"peak_bytes": peak, "ops": [[str(op), start, end] for op, start, end in spans]}
        for spans, peak in zip(timeline.ranks, timeline.peak_bytes, strict=True)
    ]
    tree = {"kind": KIND, "schedule": timeline.schedule, "step": timeline.step, "ranks": ranks}
    write_text(path, json.dumps(tree, allow_nan=False) + "\n")


def read(path: Path) -> Timeline:
    """The timeline of a file, or of a run's folder."""
    path = path / FILE if path.is_dir() else path
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recording; a run with a pipeline writes one") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a recorded timeline: {getattr(error, 'strerror', None) or error}") from None
    try:
        return _timeline(tree)
    except _Malformed as error:
        raise UserError(f"{path}: not a recorded timeline: {error}") from None


class _Malformed(Exception):
    """What is wrong with a recording."""


def _timeline(tree: Any) -> Timeline:
    if not isinstance(tree, dict) or tree.get("kind") != KIND:
        raise _Malformed(f"it does not say kind {KIND!r}")
    ranks, name, step = tree.get("ranks"), tree.get("schedule"), tree.get("step")
    if not isinstance(name, str) or not (step is None or isinstance(step, int)):
        raise _Malformed("schedule must be a name, and step a number or null")
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        raise _Malformed("ranks must be a list of {peak_bytes, ops}")
    spans = tuple(_spans(rank.get("ops"), number) for number, rank in enumerate(ranks))
    peaks = tuple(_peak(rank.get("peak_bytes"), number) for number, rank in enumerate(ranks))
    found = Timeline(name, spans, peaks, step)
    if not any(spans) or not found.seconds > 0:
        raise _Malformed("no operation in it took any time")
    return found


def _spans(ops: Any, rank: int) -> tuple[Span, ...]:
    if not isinstance(ops, list):
        raise _Malformed(f"rank {rank}: ops must be a list")
    found: list[Span] = []
    for entry in ops:
        match entry:
            case [str(word), int() | float() as start, int() | float() as end]:
                op = Op.read(word)
            case _:
                op = None
        if op is None or not -math.inf < start <= end < math.inf:
            raise _Malformed(f"rank {rank}: {str(entry)[:60]}: must be [operation, start, end], as ['0F2', 0.5, 0.75]")
        if found and start < found[-1].start:
            raise _Malformed(f"rank {rank}: {op} starts before {found[-1].op}, which stands before it")
        found.append(Span(op, start, end))
    return tuple(found)


def _peak(value: Any, rank: int) -> float | None:
    if value is not None and not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise _Malformed(f"rank {rank}: peak_bytes must be a number of bytes, or null")
    return value
