"""The data of a run: one global, seeded, endless stream of rows, and each rank's part of it."""

from __future__ import annotations

import hashlib
import json
import sys
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from typing import Any, Protocol

import numpy as np

from distrib.contracts import Batch, Window
from distrib.errors import UserError
from distrib.topology import Topology
from launch.data.batches import Layout, window
from launch.data.cache import Stored, stored_rows
from launch.data.order import Mixture, turns
from launch.data.packing import pack
from launch.data.rows import Encoder, Row, Tally
from launch.data.sources import Records, open_source
from launch.data.stream import Stream
from launch.recipe import Recipe


class Reader(Protocol):
    """Where the stream's rows come from."""

    def fetch(self, start: int, stop: int) -> list[tuple[int, Row]]:
        """(id, row) of the positions [start, stop)."""
        ...

    def largest(self, count: int) -> list[Row]:
        """`count` rows that need the most memory together."""
        ...

    def first(self, count: int) -> list[Row]:
        """The first rows, without moving on."""
        ...


@dataclass(frozen=True)
class Data:
    """Step s of global batch size G takes the rows [s * G, (s + 1) * G) of one stream; a window is a rank's
    part.

    The stream depends on the recipe's seed and data alone, not on ranks, micro-batches or where a run was
    interrupted. `rows` is one epoch (None when streaming, where it is not known); `summaries` tell what
    each data set gave.
    """

    rows: int | None
    layout: Layout
    reader: Reader
    summaries: list[dict[str, Any]]

    def window(self, start: int, stop: int, rank: int, world: int, batch: int) -> Window:
        """The rows [start, stop) are shared as evenly as they can be, each rank's lying together, in
        micro-batches of `batch` rows. Every rank gets as many micro-batches: what is missing is filled up
        with rows without labels, since engines wait for all ranks in each."""
        bounds = [start + (stop - start) * index // world for index in range(world + 1)]
        micro_batches = -(-max(b - a for a, b in pairwise(bounds)) // batch)
        first, last = bounds[rank], bounds[rank + 1]
        shares = self.reader.fetch(first, last) if last > first else []
        filler = shares[0] if shares else self.reader.fetch(start, start + 1)[0]
        return window(self.layout, shares, micro_batches, batch, filler[1])

    def fetch(self, start: int, stop: int) -> list[tuple[int, Row]]:
        """(id, row) of a stretch of the stream, to look at."""
        return self.reader.fetch(start, stop)

    def first(self, count: int) -> list[Row]:
        """The first rows of the stream, to look at while it stays where it is."""
        return self.reader.first(count)

    def longest(self, batch: int) -> Batch:
        """The micro-batch that needs the most memory: tried before the run, so that it fails early or not at
        all."""
        return self.layout.batch(self.reader.largest(batch))


@dataclass(frozen=True)
class Shuffled:
    """Stored rows in the order of a mixture, epoch after epoch."""

    stored: list[Stored]
    packed: bool
    mixture: Mixture

    def fetch(self, start: int, stop: int) -> list[tuple[int, Row]]:
        places = [self.mixture.locate(position) for position in range(start, stop)]
        return [(row_id, self.stored[source][row]) for row_id, source, row in places]

    def largest(self, count: int) -> list[Row]:
        return largest(self.stored, self.packed, count)

    def first(self, count: int) -> list[Row]:
        return [row for _, row in self.fetch(0, count)]


@dataclass(frozen=True)
class InOrder:
    """The first stored rows of each set by turns, unshuffled: what an evaluation always sees."""

    stored: list[Stored]
    packed: bool
    places: list[tuple[int, int]]

    def fetch(self, start: int, stop: int) -> list[tuple[int, Row]]:
        if stop > len(self.places):
            raise IndexError(f"rows [{start}, {stop}) of {len(self.places)} evaluation rows")
        return [(i, self.stored[self.places[i][0]][self.places[i][1]]) for i in range(start, stop)]

    def largest(self, count: int) -> list[Row]:
        return largest(self.stored, self.packed, count)

    def first(self, count: int) -> list[Row]:
        return [row for _, row in self.fetch(0, min(count, len(self.places)))]


def largest(stored: list[Stored], packed: bool, count: int) -> list[Row]:
    """The row with the longest line, and with it those of the most lines, since a batch is as wide as its
    longest line and all are padded to that. Among equals, the rows with the most tokens. Packed, a row is
    one line."""
    lines, longest, tokens = (np.concatenate(part) for part in zip(*(s.sizes() for s in stored), strict=True))
    if packed:
        lines, longest = np.ones_like(tokens), tokens
    first = int(np.lexsort((tokens, lines, longest))[-1])
    others = [int(index) for index in np.lexsort((tokens, lines))[::-1][:count] if index != first]
    chosen = [first, *others][:count]
    ends = list(accumulate(len(rows) for rows in stored))
    places = [(bisect_right(ends, index), index) for index in chosen]
    rows = [stored[source][index - ends[source] + len(stored[source])] for source, index in places]
    return [rows[index % len(rows)] for index in range(count)]


def open_data(recipe: Recipe, tokenizer: Any, topology: Topology, evaluation: bool = False) -> Data:
    """The recipe's data, tokenised and cached before the first row unless it streams.

    With `evaluation`, the first `eval_rows` rows of `eval_dataset`, unshuffled; of several sets by turns,
    by weight.
    """
    name = recipe.objective.name
    sources = recipe.eval_dataset if evaluation else recipe.dataset
    if not sources:
        raise UserError("eval_dataset=null: an evaluation needs one; choose stdlib, a file, a folder or a hub name")
    pad = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    layout = Layout(name, recipe.packing, pad)
    records = [open_source(source) for source in sources]
    encoders = [Encoder(r.name, name, tokenizer, recipe.max_length) for r in records]
    if recipe.streaming and not evaluation:
        stream = Stream(list(zip(records, encoders, strict=True)), recipe.packing, recipe.seed, announce=topology.main)
        return Data(None, layout, stream, [{"name": r.name, "weight": r.weight} for r in records])
    limit = recipe.eval_rows if evaluation else None
    depends_on = {"tokenizer": fingerprint(tokenizer), "objective": name, "max_length": recipe.max_length}
    depends_on |= {"packing": recipe.packing, "limit": limit}
    stored = [
        stored_rows(r.name, depends_on | {"records": r.fingerprint}, partial(_rows, r, e, recipe.packing, limit))
        for r, e in zip(records, encoders, strict=True)
    ]
    if topology.main:
        _report(stored, recipe.max_length)
    summaries = [rows.summary | {"weight": r.weight} for rows, r in zip(stored, records, strict=True)]
    weights = tuple(r.weight for r in records)
    if limit is not None:
        places = _by_turns([len(rows) for rows in stored], weights)[:limit]
        return Data(len(places), layout, InOrder(stored, recipe.packing, places), summaries)
    mixture = Mixture(tuple(len(rows) for rows in stored), weights, recipe.seed)
    return Data(len(mixture), layout, Shuffled(stored, recipe.packing, mixture), summaries)


def _rows(records: Records, encoder: Encoder, packing: bool, limit: int | None, tally: Tally) -> Iterator[Row]:
    encoder.tally = tally
    rows = encoder.learnable(records.read())
    return islice(pack(rows, encoder.max_length) if packing else rows, limit)


def _by_turns(sizes: list[int], weights: tuple[float, ...]) -> list[tuple[int, int]]:
    """(set, row) of all rows, the sets by turns until each is used up."""
    places: list[tuple[int, int]] = []
    used = [0] * len(sizes)
    for source in turns(weights):
        if used == sizes:
            return places
        if used[source] < sizes[source]:
            places.append((source, used[source]))
            used[source] += 1
    return places


def fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides which tokens a text becomes."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [type(tokenizer).__name__, backend, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _report(stored: list[Stored], max_length: int) -> None:
    for summary in (rows.summary for rows in stored):
        line = f"data: {summary['name']}: {summary['rows']:,} rows, {summary['tokens']:,} tokens"
        print(f"{line}, {summary['learned'] / summary['tokens']:.1%} learned", file=sys.stderr)
        for key, what in (
            ("truncated", f"cut at max_length={max_length}"),
            ("dropped", "dropped: nothing learned"),
        ):
            if summary[key]:
                print(f"data: {summary['name']}: {summary[key]:,} samples {what}", file=sys.stderr)
