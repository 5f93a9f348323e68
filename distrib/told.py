"""Told to stop: SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C ask for a checkpoint; a second of them means at once.

Launchers pass a signal on more than once, so one counts as the second only `AGAIN_S` after the first.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from distrib.errors import Interrupted

KINDS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AGAIN_S = 1.0
AT_ONCE = "stopped at once; the same command goes on from the newest checkpoint"

Handlers = dict[signal.Signals, Any]


def handle(handler: Callable[[int, FrameType | None], Any]) -> Handlers:
    """Let `handler` have the signals; what had them before."""
    return {kind: signal.signal(kind, handler) for kind in KINDS}


def give_back(handlers: Handlers) -> None:
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


class Told:
    """Whether a first signal has come, and when."""

    def __init__(self) -> None:
        self._first_s: float | None = None

    @property
    def asked(self) -> bool:
        return self._first_s is not None

    def again(self) -> bool:
        """Takes note of a signal; whether it is a second one."""
        now = time.monotonic()
        if self._first_s is None:
            self._first_s = now
        return now - self._first_s >= AGAIN_S


class Ears(Told):
    """Of this process. Between `listen` and `rest` a loop looks at `asked` before every step; at other times there is
    nothing to save, and a first signal already means at once. Where a thread of the command's hears, also while
    the main thread waits in a collective, the handlers of a loop have nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.in_loop = False
        self.in_thread = False

    def listen(self) -> Handlers:
        self._first_s, self.in_loop = None, True
        return {} if self.in_thread else handle(self._heard)

    def rest(self, handlers: Handlers) -> None:
        self.in_loop = False
        give_back(handlers)

    def at_once(self) -> bool:
        """Takes note of a signal; whether to leave without another step."""
        return not self.in_loop or self.again()

    def _heard(self, kind: int, frame: FrameType | None) -> None:
        if self.at_once():
            raise Interrupted(AT_ONCE)


EARS = Ears()
