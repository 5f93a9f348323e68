"""What recomputation was predicted to hold and to cost, and what it did in the first step after the choice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from strategies.recomputation.cost import NOTHING, Study
from strategies.recomputation.tape import Key

MIB = 2**20


@dataclass
class Account:
    """Of one forward and backward of all the layers. Bytes are those of activations that wait for the backward."""

    layers: int
    tokens: int
    """Of the batch that the figures are for: they are predicted for one, and in proportion for the one measured."""
    plain_bytes: float
    predicted_bytes: float
    predicted_seconds: float
    recomputed: dict[str, int]
    """How many operators run again in all layers, by where they are in a layer."""
    kept: dict[str, int]
    """Bytes that wait, by what made them."""
    by_layer: dict[int, int] = field(default_factory=dict)
    closed: bool = False
    _seconds: float = 0.0
    _events: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, studies: Sequence[Study], chosen: Sequence[frozenset[Key]], tokens: int) -> Account:
        """`studies` and `chosen` of each layer."""
        recomputed: Counter[str] = Counter()
        kept: Counter[str] = Counter()
        seconds = 0.0
        for study, again in zip(studies, chosen, strict=True):
            seconds += study.costs(again).seconds
            run, places = study.walk(again)
            recomputed.update(_where(study.operators[number].key) for number in run)
            for spot in (study.spots[number] for number in places):
                if spot.nbytes:
                    made_by = "the layer's input" if spot.maker is None else _where(study.operators[spot.maker].key)
                    kept[made_by] += spot.nbytes
        plain = sum(study.costs(NOTHING).nbytes for study in studies)
        return cls(len(studies), tokens, plain, sum(kept.values()), seconds, dict(recomputed), dict(kept.most_common()))

    def note(self, layer: int, tokens: int, nbytes: int) -> None:
        factor = tokens / self.tokens
        self.tokens = tokens
        self.plain_bytes *= factor
        self.predicted_bytes *= factor
        self.predicted_seconds *= factor
        self.kept = {made_by: round(size * factor) for made_by, size in self.kept.items()}
        self.by_layer[layer] = nbytes

    @property
    def measured(self) -> bool:
        return len(self.by_layer) == self.layers

    @contextmanager
    def timing(self, on_gpu: bool) -> Iterator[None]:
        if on_gpu:
            event: Any = torch.cuda.Event
            begin, end = event(enable_timing=True), event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before

    def close(self) -> None:
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1000
        self._events.clear()
        self.closed = True

    def as_dict(self) -> dict[str, Any]:
        """What is not measured yet is None."""
        return {
            "tokens": self.tokens,
            "plain_bytes": round(self.plain_bytes),
            "kept_bytes": {
                "predicted": round(self.predicted_bytes),
                "measured": sum(self.by_layer.values()) if self.closed else None,
            },
            "seconds": {"predicted": self.predicted_seconds, "measured": self._seconds if self.closed else None},
            "kept": self.kept,
            "recomputed": self.recomputed,
        }

    def __str__(self) -> str:
        held, seconds = sum(self.by_layer.values()), 1000 * self._seconds
        return (
            f"{held / MIB:.1f} MiB wait for the backward (predicted {self.predicted_bytes / MIB:.1f}; plain "
            f"{self.plain_bytes / MIB:.1f}), {seconds:.1f} ms run again (predicted {1000 * self.predicted_seconds:.1f})"
        )


def _where(key: Key) -> str:
    path, operator, _ = key
    return f"{path} {operator.removeprefix('aten.').partition('.')[0]}".strip()
