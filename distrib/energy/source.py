"""Where energy figures come from: counters of joules that only rise, and power that is sampled.

A source adds up what it sees whenever it is looked at, and what it could not see; the difference of two totals is a
window. What was not seen is never guessed: it is missing, and the bound of a window counts it at the highest power.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from threading import Lock

from distrib.energy.clock import Clock

POLL_S = 0.002
# Counters move every 20 to 100 ms where they move at all.
STANDS_STILL_S = 0.5


@dataclass(frozen=True)
class Total:
    """What a source has seen. `slack_joules` is by how much that may be off, its edges apart."""

    time: float
    joules: float = 0.0
    missing_s: float = 0.0
    slack_joules: float = 0.0
    resets: int = 0

    def __add__(self, other: Total) -> Total:
        return Total(
            self.time + other.time,
            self.joules + other.joules,
            self.missing_s + other.missing_s,
            self.slack_joules + other.slack_joules,
            self.resets + other.resets,
        )

    def __sub__(self, other: Total) -> Total:
        return self + Total(-other.time, -other.joules, -other.missing_s, -other.slack_joules, -other.resets)


class Source:
    """A device whose energy cannot be read: all of its time is missing.

    kind: gpu, package (a CPU's), dram, module (a GPU with the CPU beside it) or platform (the whole machine)
    ceiling_watts: more it does not draw
    edge_s: what is read at a moment may be as old as this
    error: why it could not be read, the last time that it could not
    """

    how: str | None = None
    every_s: float | None = None
    edge_s = 0.0
    idle_watts: float | None = None

    def __init__(self, kind: str, name: str, clock: Clock, ceiling_watts: float) -> None:
        self.kind = kind
        self.name = name
        self.ceiling_watts = ceiling_watts
        self.error: str | None = None
        self._clock = clock
        self._total = Total(clock.now())
        self._value: float | None = None
        self._lock = Lock()

    def look(self) -> Total:
        """Read it now; the totals up to this moment."""
        with self._lock:
            value = self._ask()
            gap_s = self._clock.now() - self._total.time
            self._total += self._seen(self._value, value, gap_s)
            self._value = value
            return self._total

    def next_move(self) -> tuple[Total, Total] | None:
        """The last look before its figure moves, and the first after; None when it stands still."""
        return None

    def _ask(self) -> float | None:
        return None

    def _seen(self, before: float | None, value: float | None, gap_s: float) -> Total:
        return Total(gap_s, missing_s=gap_s)


class Readable(Source):
    def __init__(self, kind: str, name: str, clock: Clock, ceiling_watts: float, read: Callable[[], float]) -> None:
        super().__init__(kind, name, clock, ceiling_watts)
        self._read = read
        self.look()

    def _ask(self) -> float | None:
        try:
            return self._read()
        except (OSError, ValueError) as error:
            self.error = str(error)
            return None


class Counter(Readable):
    """Joules since some moment. `wraps_at` is where it begins again at 0; a fall of one that does not wrap is a reset.

    What a counter has after a reset belongs to the gap, and is counted; what it had gained before is missing.
    """

    how = "counter"
    every_s = 1.0
    edge_s = STANDS_STILL_S
    wraps_at: float | None = None

    def observe(self) -> bool:
        """See how often the counter moves; False when it does not, or cannot be read."""
        moves = [move for move in (self.next_move() for _ in range(3)) if move]
        if len(moves) < 3:
            return False
        self.edge_s = max(after.time - before.time for (before, _), (_, after) in pairwise(moves))
        return True

    def next_move(self) -> tuple[Total, Total] | None:
        before = self.look()
        end = before.time + STANDS_STILL_S
        while self._value is not None and before.time < end:
            self._clock.sleep(POLL_S)
            after = self.look()
            if after.joules != before.joules:
                return before, after
            before = after
        return None

    def _seen(self, before: float | None, value: float | None, gap_s: float) -> Total:
        missing = Total(gap_s, missing_s=gap_s)
        if value is None:
            return missing
        # Where it goes on after a gap, what is read may be from within the gap.
        again = missing + Total(0.0, slack_joules=self.ceiling_watts * self.edge_s)
        most = 2 * self.ceiling_watts * (gap_s + self.edge_s)
        if before is None or (self.wraps_at and most >= self.wraps_at):
            return again
        rise = value - before
        if rise < 0 and self.wraps_at:
            rise += self.wraps_at
        if 0 <= rise <= most:
            return Total(gap_s, rise)
        since_reset = value if value <= most else 0.0
        return again + Total(0.0, since_reset, resets=1)


class Power(Readable):
    """Watts, sampled; between two samples they are taken to lie between them."""

    how = "power"
    every_s = 0.1
    # The sensor's figure is the mean of the last second on most chips: half of it is older than the other half.
    edge_s = 0.5
    longest_gap_s = 1.0

    def next_move(self) -> tuple[Total, Total] | None:
        now = self.look()
        return None if self._value is None else (now, now)

    def _seen(self, before: float | None, value: float | None, gap_s: float) -> Total:
        if before is None or value is None or gap_s > self.longest_gap_s:
            return Total(gap_s, missing_s=gap_s)
        return Total(gap_s, (value + before) / 2 * gap_s, slack_joules=abs(value - before) / 2 * gap_s)
