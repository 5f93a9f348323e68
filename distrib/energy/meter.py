"""The meter of a job: every rank reads the device it computes on, one rank a node the CPU, and all get the account."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distrib.energy import nvml, rapl
from distrib.energy.account import Account, Part, account, trusted
from distrib.energy.clock import Clock
from distrib.energy.source import Source, Total
from distrib.topology import Topology


@dataclass(frozen=True)
class Reading:
    """What this rank's sources had seen at one moment."""

    time: float
    totals: tuple[Total, ...]


class Meter:
    """All ranks make one, read it and ask for accounts together. What cannot be measured is said in the accounts.

    A device that several ranks share is read by one of them. Between readings threads look at the sources, so that
    little is lost around a reset, no wrap is missed, and power has its samples.
    """

    def __init__(
        self,
        topology: Topology,
        powercap: Path = rapl.POWERCAP,
        clock: Clock | None = None,
        env: Mapping[str, str] = os.environ,
    ) -> None:
        self._topology = topology
        self._clock = clock or Clock()
        found, self._notes = rapl.open_domains(powercap, self._clock)
        if topology.device_type == "cuda":
            gpus, notes = nvml.open_device(topology, self._clock, env)
            found, self._notes = gpus + found, notes + self._notes
        self._sources = self._shared_out(found)
        intervals = {source.every_s for source, _ in self._sources if source.every_s}
        self._stops = [self._clock.every(seconds, partial(self._look, seconds)) for seconds in sorted(intervals)]

    def _shared_out(self, found: list[Source]) -> list[tuple[Source, tuple[int, ...]]]:
        """The sources that this rank reads for all, and the ranks that they stand for."""
        node = _node()
        offers = self._everyone({(node, source.name): source.how is not None for source in found})
        mine = []
        for source in found:
            ranks = [rank for rank, offer in enumerate(offers) if (node, source.name) in offer]
            owner = min(ranks, key=lambda rank: (not offers[rank][(node, source.name)], rank))
            if owner == self._topology.rank:
                mine.append((source, tuple(ranks)))
        return mine

    def _look(self, every_s: float) -> None:
        for source, _ in self._sources:
            if source.every_s == every_s:
                source.look()

    def measure_idle(self, seconds: float) -> dict[str, float | None] | None:
        """Watts of each of this rank's devices while nobody computes; None when it can read none, at once.

        A counter's edges are waited for, so a second is enough.
        """
        if not seconds or not _any_readable([source for source, _ in self._sources]):
            return None
        starts = [source.next_move() for source, _ in self._sources]
        self._clock.sleep(seconds)
        for (source, _), start in zip(self._sources, starts, strict=True):
            end = source.next_move()
            window = end[1] - start[1] if start and end else None
            if window and window.joules > 0 and not window.missing_s:
                source.idle_watts = window.joules / window.time
        return {source.name: source.idle_watts for source, _ in self._sources}

    def read(self) -> Reading:
        """What has been used up to the end of all that was asked of the device."""
        if self._topology.device_type == "cuda":
            import torch

            if torch.cuda.is_available():
                torch.cuda.synchronize(self._topology.device)
        now = self._clock.now()
        return Reading(now, tuple(source.look() for source, _ in self._sources))

    def between(self, before: Reading, after: Reading, tokens: int | None = None, steps: int | None = None) -> Account:
        """The whole job's account of the time between two readings. Every rank calls it."""
        parts: list[Part] = []
        notes = list(self._notes)
        for index, (source, ranks) in enumerate(self._sources):
            part = self._part(source, ranks, before, after, index)
            parts.append(part)
            notes += _remarks(source, part)
        everyone = self._everyone((after.time - before.time, parts, notes))
        return account(
            [part for _, theirs, _ in everyone for part in theirs],
            max(seconds for seconds, _, _ in everyone),
            tokens,
            steps,
            [note for _, _, theirs in everyone for note in theirs],
        )

    def _part(self, source: Source, ranks: tuple[int, ...], before: Reading, after: Reading, index: int) -> Part:
        first, last = before.totals[index], after.totals[index]
        window = last - first
        seconds = window.time
        # The device may draw more than its limit for a moment; twice the mean covers bursts that are half of the time.
        most_watts = max(source.ceiling_watts, 2 * window.joules / seconds if seconds else 0.0)
        late_s = (first.time - before.time) + (last.time - after.time)
        bound = most_watts * (source.edge_s + late_s + window.missing_s) + window.slack_joules
        joules = trusted(window.joules, bound)
        if joules is None:
            bound += window.joules
        return Part(
            kind=source.kind,
            name=source.name,
            node=socket.gethostname(),
            ranks=ranks,
            counted=source.kind in (("gpu",) if self._topology.device_type == "cuda" else ("package", "dram")),
            source=source.how,
            seconds=seconds,
            joules=joules,
            bound_joules=bound if source.how else None,
            coverage=0.0 if joules is None else 1 - window.missing_s / seconds,
            resets=window.resets,
            idle_watts=source.idle_watts,
        )

    def _everyone(self, mine: Any) -> list[Any]:
        if self._topology.world == 1:
            return [mine]
        import torch.distributed as dist

        everyone: list[Any] = [None] * self._topology.world
        dist.all_gather_object(everyone, mine)
        return everyone

    def close(self) -> None:
        for stop in self._stops:
            stop()
        self._stops = []


def _remarks(source: Source, part: Part) -> list[str]:
    found = []
    if part.resets:
        found.append(f"{part.name}: its counter began again at 0; what it had gained just before is missing")
    if source.error and part.coverage < 1:
        found.append(f"{part.name}: could not be read for a while ({source.error})")
    elif part.joules is None and source.how:
        found.append(f"{part.name}: the window is too short for what is read, which may be {source.edge_s:.3f} s old")
    return found


def _any_readable(sources: list[Source]) -> bool:
    return any(source.how for source in sources)


def _node() -> str:
    """The same in all containers of a machine, and on no other machine until either is started anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return socket.gethostname()
