"""What rank 0 tells a person while it trains: a line a logged step, and on a terminal a bar below."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import IO, Any

from launch.spawn import say

GIB = 2**30
TRAINING = ("loss", "grad_norm", "learning_rate")
Record = Mapping[str, Any]


def line(record: Record, steps: int) -> str:
    """One line of `metrics.jsonl` for a person. What was not measured is left out, never shown as 0."""
    step = f"step {record['step']:>{len(str(steps))}}/{steps}"
    parts = _training(record) if "grad_norm" in record else _other(record)
    return "  ".join([step, *parts])


def _training(record: Record) -> list[str]:
    parts = [
        f"loss {round(record['loss'], 4) + 0.0:.4f}",  # + 0.0: no "-0.0000"
        f"grad norm {record['grad_norm']:.3f}",
        f"lr {record['learning_rate']:.2e}",
    ]
    if record.get("peak_bytes"):
        parts.append(f"mem {record['peak_bytes'] / GIB:.2f} GiB")
    rates = [record.get(f"{kind}tokens_per_s") for kind in ("", "nonpad_", "loss_")]
    if None not in rates:
        processed, nonpad, learned = (f"{rate:,.0f}" for rate in rates)
        parts.append(f"tok/s {processed} (non-pad {nonpad}, loss {learned})")
    if record.get("joules_per_token") is not None:
        parts.append(f"J/tok {record['joules_per_token']:.3g}")
    return parts


def _other(record: Record) -> list[str]:
    """An evaluation: figures by name, texts as they are."""
    return [
        f"{key.replace('_', ' ')} {value:.4f}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        for key, value in record.items()
        if key not in ("step", "time") and value is not None
    ]


class Console:
    """Lines and a bar on standard error; standard output is for results. Only rank 0 makes one."""

    def __init__(self, steps: int, done: int = 0, stream: IO[str] | None = None) -> None:
        self.steps = steps
        self._stream = stream or sys.stderr
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps,
                initial=done,
                disable=False,
                file=self._stream,
                unit="step",
                leave=False,
                dynamic_ncols=True,
            )

    def log(self, record: Record) -> None:
        """Show a line of `metrics.jsonl`, and that its step is done."""
        self.note(line(record, self.steps))
        if self._bar is not None:
            self._bar.update(record["step"] - self._bar.n)

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def show_notes() -> None:
    """What strategies find worth saying goes to standard error like everything else that is said."""

    class Say(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say(record.getMessage())

    log = logging.getLogger("ebbtide")
    if not log.handlers:
        log.addHandler(Say())
    log.setLevel(logging.INFO)
    log.propagate = False
