"""The time, and a thread that does something again and again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from threading import Event, Thread


class Clock:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def every(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        """Call it on a thread, until the returned function is called.

        The intervals are uneven, by up to a half: even ones could keep step with what is sampled.
        """
        uneven, stopped = random.Random(), Event()

        def run() -> None:
            while not stopped.wait(seconds * uneven.uniform(0.5, 1.5)):
                call()

        def stop() -> None:
            stopped.set()
            thread.join()

        thread = Thread(target=run, name="energy", daemon=True)
        thread.start()
        return stop
