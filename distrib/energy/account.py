"""What a window took: the sum, what it is per step and token, how well it is known, and what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Part:
    """One device's energy in one window. Where `joules` is None, at most `bound_joules` were used; where both are, the
    device could not be read at all."""

    kind: str
    name: str
    node: str
    ranks: tuple[int, ...]
    counted: bool
    """In the account's sum; a module holds devices that are counted already."""
    source: str | None
    seconds: float
    joules: float | None
    bound_joules: float | None
    coverage: float
    """Share of the window that `joules` stands for."""
    resets: int
    idle_watts: float | None

    def __add__(self, other: Part) -> Part:
        """The same device in one more window."""
        seconds = self.seconds + other.seconds
        idle = self.idle_watts, other.idle_watts
        return replace(
            self,
            ranks=tuple(sorted({*self.ranks, *other.ranks})),
            source=weakest([self.source, other.source]),
            seconds=seconds,
            joules=_sum([self.joules, other.joules]),
            bound_joules=_all([self.bound_joules, other.bound_joules]),
            coverage=(self.coverage * self.seconds + other.coverage * other.seconds) / (seconds or 1.0),
            resets=self.resets + other.resets,
            idle_watts=None if None in idle else (idle[0] * self.seconds + idle[1] * other.seconds) / (seconds or 1.0),  # type: ignore[operator]
        )


@dataclass(frozen=True)
class Account:
    """The energy of a whole job in one window: of its GPUs, or on a CPU of packages and memory.

    It is `joules` give or take `bound_joules`. With `coverage` below 1 it is a lower bound, whose bound takes what is
    missing at the highest power, or is None with a device that could not be read at all. None where it is not known, or
    not better than its bound: it is never 0. The bound is of reading and timing; the sensors' own error is not in it.
    """

    joules: float | None
    net_joules: float | None
    watts: float | None
    idle_watts: float | None
    seconds: float
    tokens: int | None
    steps: int | None
    joules_per_token: float | None
    joules_per_step: float | None
    source: str | None
    coverage: float
    bound_joules: float | None
    resets: int
    parts: tuple[Part, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def account(
    parts: Sequence[Part], seconds: float, tokens: int | None, steps: int | None, notes: Sequence[str]
) -> Account:
    counted = [part for part in parts if part.counted]
    known = [part for part in counted if part.joules is not None]
    joules = trusted(sum(part.joules or 0.0 for part in known), sum(part.bound_joules or 0.0 for part in counted))
    device_seconds = sum(part.seconds for part in counted)
    coverage = sum(part.coverage * part.seconds for part in known) / device_seconds if device_seconds else 0.0
    idle_joules = _all([part.idle_watts and part.idle_watts * part.seconds * part.coverage for part in known])
    net = None if joules is None or idle_joules is None else joules - idle_joules
    notes = list(notes)
    if joules is not None and coverage < 1:
        notes.append("joules is a lower bound: some of the devices' time is missing, see coverage")
    if net is not None and net < 0:
        net = None
        notes.append("net_joules is unknown: the devices drew less than in the idle baseline")
    return Account(
        joules=joules,
        net_joules=net,
        watts=None if joules is None else joules / seconds,
        idle_watts=_all([part.idle_watts for part in counted]),
        seconds=seconds,
        tokens=tokens,
        steps=steps,
        joules_per_token=joules / tokens if joules is not None and tokens else None,
        joules_per_step=joules / steps if joules is not None and steps else None,
        source=None if joules is None else weakest([part.source for part in known]),
        coverage=coverage,
        bound_joules=_all([part.bound_joules for part in counted]),
        resets=sum(part.resets for part in counted),
        parts=tuple(parts),
        notes=tuple(dict.fromkeys(notes)),
    )


def summed(records: Sequence[dict[str, Any]]) -> Account:
    """The account of several windows, of each what `as_dict` gave."""
    parts: dict[tuple[str, str], Part] = {}
    for record in records:
        for fields in record["parts"]:
            part = Part(**fields | {"ranks": tuple(fields["ranks"])})
            key = part.node, part.name
            parts[key] = parts[key] + part if key in parts else part
    return account(
        list(parts.values()),
        sum(record["seconds"] for record in records),
        _sum([record["tokens"] for record in records]),
        _sum([record["steps"] for record in records]),
        [note for record in records for note in record["notes"]],
    )


def trusted(joules: float, bound: float) -> float | None:
    """A value that may be off by all of itself says nothing."""
    return joules if joules > bound else None


def weakest(sources: Sequence[str | None]) -> str | None:
    """Of the sources of a sum, the one that bounds it."""
    return next((source for source in ("power", "counter", "rapl") if source in sources), None)


def _sum(values: Sequence[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _all(values: Sequence[float | None]) -> float | None:
    """Their sum, known only if each of them is."""
    return None if not values or None in values else sum(value or 0.0 for value in values)
