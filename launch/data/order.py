"""Which row comes when: a function of the seed and the position alone.

So a run goes on anywhere, at any world size, without a state to save.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Mixture:
    """Rows of several sets as one endless stream.

    An epoch has round(weight * rows) slots of each set, at least one. Slot k of a set in epoch e is its
    draw e * slots + k, and its draws go round and round through the set. So weight 1 takes every row once
    an epoch, 0.5 half of them with the other half in the next epoch, 2 every row twice. Where the weight
    is no whole number the draws follow a fixed permutation of the set, so that half of it is not its
    first half. The slots of an epoch are permuted by (seed, epoch). It costs 8 bytes of memory a row.
    """

    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    @property
    def slots(self) -> list[int]:
        return [max(1, round(weight * size)) for size, weight in zip(self.sizes, self.weights, strict=True)]

    def __len__(self) -> int:
        return sum(self.slots)

    @cached_property
    def _fixed(self) -> dict[int, NDArray[np.int64]]:
        partly = [source for source, weight in enumerate(self.weights) if weight % 1]
        return {source: permutation(self.sizes[source], self.seed, -1 - source) for source in partly}

    def locate(self, position: int) -> tuple[int, int, int]:
        """(id, set, row in the set) at a position of the stream. The id, epoch * len + slot, never comes
        twice."""
        epoch, place = divmod(position, len(self))
        slot = int(_epoch_order(len(self), self.seed, epoch)[place])
        ends = list(accumulate(self.slots))
        source = bisect_right(ends, slot)
        slots = self.slots[source]
        row = (epoch * slots + slot - (ends[source] - slots)) % self.sizes[source]
        if self.weights[source] % 1:
            row = int(self._fixed[source][row])
        return epoch * len(self) + slot, source, row


@lru_cache(maxsize=2)
def _epoch_order(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return permutation(length, seed, epoch)


def permutation(length: int, seed: int, purpose: int) -> NDArray[np.int64]:
    """A permutation by sorting random keys."""
    return np.argsort(random_source(seed, purpose).random_raw(length), kind="stable")


def random_source(seed: int, purpose: int) -> np.random.Philox:
    """The random words of (seed, purpose). numpy promises that raw ones are the same in all its versions."""
    return np.random.Philox(key=np.array([seed & _MASK, purpose & _MASK], dtype=np.uint64))


def turns(weights: Sequence[float]) -> Iterator[int]:
    """Whose turn it is, forever: shares come as even as they can, and without chance."""
    credit = [0.0] * len(weights)
    while True:
        credit = [have + weight / sum(weights) for have, weight in zip(credit, weights, strict=True)]
        chosen = max(range(len(weights)), key=lambda index: credit[index])
        credit[chosen] -= 1
        yield chosen
