"""Which chunks are walked back, and the factors that make up for the rest.

A gradient's path goes from a chunk's loss through keys and values of earlier chunks, and counts only when all its
chunks are taken. So its weight has to be 1 / P(all of them are taken). The draw is a Markov chain over the chunks,
last to first, so that this probability is a product over neighbours on the path: 1 / P(chunk taken) on the chunk's
own loss, and 1 / P(earlier taken | later taken) on what a chunk leaves on the keys and values of an earlier one.

`stick` makes neighbours come together: 0 draws every chunk by itself. Chunks that must be taken restart the chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy

from distrib.contracts import Context


@dataclass(frozen=True)
class Taken:
    """A chunk that is walked back: the factor of its own loss, of what it leaves on each earlier chunk's keys and
    values, and of what later ones have left on its own."""

    index: int
    own: float = 1.0
    leaves: tuple[float, ...] | None = None
    left: float = 1.0


class Draw(Protocol):
    def __call__(self, count: int, must: Sequence[bool], context: Context, micro_batch: int) -> list[Taken]:
        """Of `count` chunks those taken, in order; the same on every rank, as engines wait for each other."""
        ...


def everything(count: int, must: Sequence[bool], context: Context, micro_batch: int) -> list[Taken]:
    return [Taken(index) for index in range(count)]


def randomness(context: Context, micro_batch: int) -> numpy.random.Generator:
    """From (seed, step, micro-batch) alone."""
    return numpy.random.default_rng([context.seed % 2**63, context.step + 1, micro_batch])


@dataclass(frozen=True)
class Sticky:
    """Unbiased: each chunk with probability p, more likely when the next one was taken."""

    p: float

    @property
    def stick(self) -> float:
        """The rarer the draws, the longer their runs. The std is then within a half of sqrt(1/p - 1) on small models
        of several kinds; draws by themselves have up to 2.7 times as much where gradients reach far back."""
        return 1 - self.p

    def __call__(self, count: int, must: Sequence[bool], context: Context, micro_batch: int) -> list[Taken]:
        generator = randomness(context, micro_batch)
        taken: list[bool] = []
        for index in reversed(range(count)):
            taken.append(bool(generator.random() < self.next_chance(must[index], taken[-1] if taken else None)))
        return self.weighted(taken[::-1], must)

    def next_chance(self, must: bool, later: bool | None) -> float:
        """That a chunk is taken, given whether the next one was."""
        if must:
            return 1.0
        return self.p if later is None else self.p * (1 - self.stick) + self.stick * later

    def weighted(self, taken: Sequence[bool], must: Sequence[bool]) -> list[Taken]:
        """The chunks that were drawn, with the factors of an unbiased sum."""
        made = []
        for index, drawn in enumerate(taken):
            if drawn:
                leaves = tuple(1 / self.chance(earlier, index, must) for earlier in range(index))
                made.append(Taken(index, 1 / self.chance(index, None, must), leaves))
        return made

    def chance(self, index: int, later: int | None, must: Sequence[bool]) -> float:
        """That a chunk is taken; with `later`, given that this one was."""
        if must[index]:
            return 1.0
        stop = len(must) if later is None else later
        anchor = next((other for other in range(index + 1, stop) if must[other]), later)
        if anchor is None:
            return self.p
        return float(self.p + (1 - self.p) * self.stick ** (anchor - index))


@dataclass(frozen=True)
class Published:
    """A fixed number of chunks without replacement, as in 2505.16710: biased, with little variance.

    What later chunks have left is scaled by count / taken, at most 2, and a chunk's own loss by 1, or with
    `scale_loss` by count / taken.
    """

    share: float
    scale_loss: bool

    def __call__(self, count: int, must: Sequence[bool], context: Context, micro_batch: int) -> list[Taken]:
        number = max(1, round(self.share * count))
        drawn = sorted(randomness(context, micro_batch).permutation(count)[:number].tolist())
        factor = count / number
        return [Taken(index, factor if self.scale_loss else 1.0, None, min(factor, 2.0)) for index in drawn]
