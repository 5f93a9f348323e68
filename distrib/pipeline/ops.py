"""A pipeline's schedule as data, in PyTorch's notation: `0F2` is stage 0's forward of micro-batch 2.

    F  forward
    B  whole backward
    I  gradient of the input alone, which the stage before waits for
    W  gradients of the weights, after I, which nobody waits for until the step ends

A rank runs its operations in order and waits where an input is not there yet. What crosses ranks follows from them: a
stage's output goes to the next stage, the gradient of its input to the stage before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from distrib.errors import UserError

_OP = re.compile(r"([0-9]{1,9})([FBIW])([0-9]{1,9})")


class Op(NamedTuple):
    stage: int
    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def read(cls, word: str) -> Op | None:
        match = _OP.fullmatch(word)
        return cls(int(match[1]), match[2], int(match[3])) if match else None


@dataclass(frozen=True)
class Schedule:
    """The operations of every rank, in order. `name` is for people."""

    name: str
    ranks: tuple[tuple[Op, ...], ...]

    @property
    def stages(self) -> int:
        return 1 + max((op.stage for ops in self.ranks for op in ops), default=-1)

    @property
    def micro_batches(self) -> int:
        return 1 + max((op.micro_batch for ops in self.ranks for op in ops), default=-1)

    @property
    def homes(self) -> dict[int, int]:
        """The rank of every stage."""
        return {op.stage: rank for rank, ops in enumerate(self.ranks) for op in ops}

    def text(self) -> str:
        """A line a rank; what PyTorch's `_load_csv` reads."""
        return "\n".join(",".join(map(str, ops)) for ops in self.ranks) + "\n"


def parse(text: str, name: str) -> Schedule:
    """The schedule of a text; blanks between commas are pauses, which a schedule has no need of."""
    lines = [line for line in text.splitlines() if line.strip()]
    return Schedule(name, tuple(tuple(_ops(line, rank, name)) for rank, line in enumerate(lines)))


def _ops(line: str, rank: int, name: str) -> list[Op]:
    found = []
    for word in filter(None, map(str.strip, line.split(","))):
        op = Op.read(word)
        if op is None:
            raise UserError(
                f"schedule {name}: rank {rank} has {word!r}: write stage, F, B, I or W, micro-batch, as 0F2"
            )
        found.append(op)
    return found
