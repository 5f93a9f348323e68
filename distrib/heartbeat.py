"""Every rank says that it lives and how far it is; one that is stopped, or that others wait for in vain, is named.

A thread of each rank writes a beat to the store, and those of ranks 0 and 1 read all of them: either may be the one in
trouble. A rank whose beats stay away does not answer: it is stopped, or its machine is gone. A rank makes no progress
when nothing moves on any rank, though some wait or are further than it. How far a rank is: the marks that it has
passed, which are the same on all ranks, then the collectives that it has begun. A long computation that all are in is
no hang, and a process that was stopped as a whole blames nobody for the time it missed.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

BEAT_S = 0.25
LATE_S = 4 * BEAT_S
PATIENCE_S = 600.0
"""Where one rank may have much to do while others wait: loading, compiling, saving, writing the result."""
WATCHERS = 2
FRAMES = 4
LINGER_S = 1.5
FAILED, FAILED_CODE, END, HEARD = "failed", "failed_code", "end", "heard"
"""Keys of the store: how many ranks have failed, with what the job ends, that now everyone leaves, who has heard so."""


@dataclass
class Here:
    """Where this process is: the loop says so, the thread reads it."""

    marks: int = 0
    doing: str = "starting"
    prompt: bool = False

    def at(self, doing: str, prompt: bool = True) -> None:
        """Every rank calls it at the same places. `prompt`: all ranks are about equally long at it."""
        self.doing, self.prompt = doing, prompt
        self.marks += 1

    @contextmanager
    def patiently(self, doing: str) -> Iterator[None]:
        before = self.doing, self.prompt
        self.at(doing, prompt=False)
        yield
        self.at(*before)


HERE = Here()


@dataclass(frozen=True)
class Beat:
    count: int
    marks: int
    calls: int
    doing: str
    prompt: bool
    waits: bool = False
    stack: str = ""
    done: bool = False

    @property
    def moves(self) -> tuple[int, int]:
        return self.marks, self.calls


@dataclass(frozen=True)
class Hang:
    rank: int
    line: str


class Watch:
    """Judges the beats of all ranks, by this process's clock."""

    def __init__(self, limit_s: float, world: int, now: float) -> None:
        self.limit_s = limit_s
        self._counts = [-1] * world
        self._seen_s = [now] * world
        self._moves: list[tuple[int, int]] = []
        self._moved_s = self._looked_s = now

    def look(self, beats: Sequence[Beat | None], now: float) -> Hang | None:
        """None stands for a rank that was never heard of."""
        missed_s = now - self._looked_s if now - self._looked_s > LATE_S else 0.0
        self._looked_s = now
        self._moved_s += missed_s
        for rank, beat in enumerate(beats):
            self._seen_s[rank] += missed_s
            if beat and (beat.done or beat.count != self._counts[rank]):
                self._counts[rank], self._seen_s[rank] = beat.count, now
        silence_s, rank = max((now - seen_s, -rank) for rank, seen_s in enumerate(self._seen_s))
        if silence_s > self.limit_s:
            return Hang(-rank, silent(-rank, self.limit_s, beats[-rank]))
        return self._stuck([beat for beat in beats if beat], len(beats), now)

    def _stuck(self, beats: list[Beat], world: int, now: float) -> Hang | None:
        moves = [beat.moves for beat in beats]
        if moves != self._moves:
            self._moves, self._moved_s = moves, now
        if len(beats) < world or not (any(beat.waits for beat in beats) or len(set(moves)) > 1):
            return None
        limit_s = self.limit_s if all(beat.prompt for beat in beats) else max(self.limit_s, PATIENCE_S)
        if now - self._moved_s <= limit_s:
            return None
        last = min(range(world), key=lambda rank: (beats[rank].marks, beats[rank].waits, beats[rank].calls))
        found = beats[last]
        return Hang(
            last, f"rank {last} makes no progress, others wait for it {limit_s:g} s: {found.doing}, in {found.stack}"
        )


def silent(rank: int, limit_s: float, last: Beat | None) -> str:
    seen = f"last seen at {last.doing}" if last else "never heard of"
    return f"rank {rank} does not answer for {limit_s:g} s, {seen}: it is stopped, or out of reach"


class Heart:
    """Of this rank, from its connection to the store on. `end(code, line, mine, linger)` says the line, where this rank
    is the one to speak, lingers and ends the process; `mine`: this rank is the one in trouble."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        limit_s: float,
        end: Callable[[int, str | None, bool, Callable[[], None]], None],
    ) -> None:
        # Its own connection: one that waits for a key keeps others waiting.
        self._store: Store = store.clone()  # type: ignore[attr-defined]
        self._rank = rank
        self._world = world
        self._limit_s = limit_s
        self._end = end
        self._count = 0
        self._last: tuple[int, int] | None = None
        self._heard: set[int] = set()
        self._leave: int | None = None
        self._closing = False
        self._wake = threading.Event()
        self._talked_s = time.monotonic()
        self._watch = Watch(limit_s, world, self._talked_s) if rank < WATCHERS else None
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._guard)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """This rank is done; from now on its silence means nothing."""
        self._closing = True
        self._wake.set()
        self._threads[0].join(LATE_S)

    def leave(self, code: int) -> None:
        """Let all ranks end with this code, this one too; returns only where the store is of no help."""
        self._leave = code
        self._wake.set()
        self._threads[0].join(LINGER_S + LATE_S)

    def _talk(self) -> None:
        try:
            while not self._closing or self._leave is not None:
                self._say(self._beat())
                self._look()
                self._talked_s = time.monotonic()
                self._wake.wait(BEAT_S)
                self._wake.clear()
            self._say(replace(self._beat(), done=True))
        except RuntimeError:
            # The store ended with the process that held it; whoever waits for that one's part will know.
            pass
        self._talked_s = math.inf

    def _guard(self) -> None:
        """The store itself may be on a rank that is stopped, and a question to it then waits for ever."""
        looked_s = time.monotonic()
        while not self._closing:
            time.sleep(BEAT_S)
            now = time.monotonic()
            if now - looked_s > LATE_S:
                self._talked_s += now - looked_s
            looked_s = now
            if now - self._talked_s > self._limit_s:
                self._end(1, self._store_is_silent() if self._rank == 1 else None, False, lambda: None)

    def _store_is_silent(self) -> str:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the launcher, which holds the ranks' store, does not answer for {self._limit_s:g} s"
        return silent(0, self._limit_s, self._beat())

    def _beat(self) -> Beat:
        self._count += 1
        moves = HERE.marks, collectives()
        still = moves == self._last
        self._last = moves
        waits, stack = stood() if still else (False, "")
        return Beat(self._count, *moves, HERE.doing, HERE.prompt, waits, stack)

    def _say(self, beat: Beat) -> None:
        self._store.set(f"beat-{self._rank}", json.dumps(asdict(beat)))

    def _look(self) -> None:
        store = self._store
        if self._leave is not None:
            announce(store, self._leave)
        if store.check([END]):
            code, rank = json.loads(store.get(END))
            store.add(HEARD, 1)
            self._end(code, None, rank == self._rank, self._linger)
        hang = self._watch.look(self._beats(), time.monotonic()) if self._watch else None
        if hang and store.add(FAILED, 1) == 1:
            store.set(FAILED_CODE, "1")
            announce(store, 1, hang.rank)
            store.add(HEARD, 1)
            self._end(1, hang.line, hang.rank == self._rank, self._linger)

    def _linger(self) -> None:
        """Rank 0 may hold the store, in which the others read that they are to leave."""
        end = time.monotonic() + LINGER_S
        while self._rank == 0 and self._store.add(HEARD, 0) < self._world and time.monotonic() < end:
            time.sleep(BEAT_S / 5)

    def _beats(self) -> list[Beat | None]:
        # To ask for a key that was never set would wait for it.
        for rank in set(range(self._world)) - self._heard:
            if self._store.check([f"beat-{rank}"]):
                self._heard.add(rank)
        heard = sorted(self._heard)
        said = self._store.multi_get([f"beat-{rank}" for rank in heard]) if heard else []
        known = {rank: Beat(**json.loads(text)) for rank, text in zip(heard, said, strict=True)}
        return [known.get(rank) for rank in range(self._world)]


def announce(store: Store, code: int, rank: int | None = None) -> None:
    """Everyone leaves with this code, for the trouble of `rank` if it is one's alone."""
    store.set(END, json.dumps([code, rank]))


def collectives() -> int:
    """Begun by this process, over all groups."""
    import torch.distributed as dist

    begun = 0
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        try:
            begun += group._get_sequence_number_for_group()
        except RuntimeError:
            continue  # a group that does not count
    return begun


def stood() -> tuple[bool, str]:
    """Whether the main thread waits in a collective, and its innermost frames."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return False, "no Python code"
    frames = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=FRAMES)
    waits = f"{os.sep}torch{os.sep}distributed{os.sep}" in frames[0].filename
    places = [f"{one.name} ({os.path.basename(one.filename)}:{one.lineno})" for one in frames]
    return waits, f"{frames[0].line!r} of {' < '.join(places)}"
