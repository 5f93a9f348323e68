"""Rows straight from their sources, for sets too large to tokenise before the run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice

import numpy as np

from distrib.errors import UserError
from launch.data.order import random_source, turns
from launch.data.packing import pack
from launch.data.rows import Encoder, Row, Sequence
from launch.data.sources import Records

SHUFFLE_ROWS = 512
"""Rows that the shuffle buffer holds for each source."""

LazyRow = Callable[[], Row]


class Stream:
    """Every rank reads the same stream and makes rows only of what it is asked for.

    Each source is read in its own order through a seeded shuffle buffer, over and over; sources take
    turns by weight, which is here their share of the rows. The position in this stream is the only state:
    to go on from a checkpoint the records before it are read again, which costs their reading, and their
    tokenising only where the number of rows depends on it (packing, and long texts). Asking for an
    earlier position starts from the beginning.
    """

    def __init__(
        self, sources: list[tuple[Records, Encoder]], packing: bool, seed: int, announce: bool = False
    ) -> None:
        self.sources, self.packing, self.seed = sources, packing, seed
        self._unannounced = [encoder for _, encoder in sources] if announce else []
        self._position, self._rows = 0, self._mixed()

    def fetch(self, start: int, stop: int) -> list[tuple[int, Row]]:
        """(id, row) of the positions [start, stop)."""
        if start < self._position:
            self._position, self._rows = 0, self._mixed()
        skip = start - self._position
        self._position = stop
        rows = [(row_id, row()) for row_id, row in islice(self._rows, skip, skip + stop - start)]
        self._announce()
        return rows

    def _announce(self) -> None:
        """Say of each source once that it has samples which are cut; how many is not known."""
        cut = [encoder for encoder in self._unannounced if encoder.tally.truncated]
        self._unannounced = [encoder for encoder in self._unannounced if not encoder.tally.truncated]
        for encoder in cut:
            print(
                f"data: {encoder.dataset}: samples are cut at max_length={encoder.max_length}",
                file=sys.stderr,
            )

    def largest(self, count: int) -> list[Row]:
        """Rows as large as any may be, since those to come are not known: made of the stream's first one,
        with every sequence at full length. A later group of more completions than the first is not
        foreseen."""
        length = self.sources[0][1].max_length
        (row,) = self.first(1)
        full = Sequence(np.zeros(length, np.int32), np.arange(length) > 0)
        return [(full,) if self.packing else tuple(full for _ in row)] * count

    def first(self, count: int) -> list[Row]:
        """By a reader of their own."""
        return [row for _, row in Stream(self.sources, self.packing, self.seed).fetch(0, count)]

    def _mixed(self) -> Iterator[tuple[int, LazyRow]]:
        """All sources by turns. A row's id is its number in its source, counted on over the passes, times
        the number of sources, plus its source: no id comes twice."""
        streams = [self._endless(index) for index in range(len(self.sources))]
        for source in turns([records.weight for records, _ in self.sources]):
            number, row = next(streams[source])
            yield number * len(streams) + source, row

    def _endless(self, source: int) -> Iterator[tuple[int, LazyRow]]:
        """A source over and over: each pass has every row once, in another order."""
        first = 0
        for again in count():
            purpose = again * len(self.sources) + source
            last = first
            for index, row in _shuffled(self._pass(source), self.seed, purpose):
                last = max(last, first + index + 1)
                yield first + index, row
            if last == first:
                raise UserError(f"dataset={self.sources[source][0].name!r} has no loss tokens: no sample is learned")
            first = last

    def _pass(self, source: int) -> Iterator[LazyRow]:
        records, encoder = self.sources[source]
        if self.packing:
            for row in pack(encoder.learnable(records.read()), encoder.max_length):
                yield partial(_same, row)
            return
        for number, record in enumerate(records.read()):
            if encoder.shape(record) == "text":
                for row in encoder.learnable([record], number):
                    yield partial(_same, row)
            else:
                yield partial(_only, encoder, record, number)


def _same(row: Row) -> Row:
    return row


def _only(encoder: Encoder, record: dict[str, object], number: int) -> Row:
    (row,) = encoder.rows(record, number)
    return row


def _shuffled(rows: Iterator[LazyRow], seed: int, purpose: int) -> Iterator[tuple[int, LazyRow]]:
    """(number, row) through a buffer: a random one leaves for each that enters, and the rest leave at the
    end."""
    buffer: list[tuple[int, LazyRow]] = []
    words = random_source(seed, purpose)
    for numbered in enumerate(rows):
        buffer.append(numbered)
        if len(buffer) > SHUFFLE_ROWS:
            yield buffer.pop(words.random_raw() % len(buffer))
    while buffer:
        yield buffer.pop(words.random_raw() % len(buffer))
