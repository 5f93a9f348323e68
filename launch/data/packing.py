"""Several short documents in one row, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from launch.data.rows import Row

OPEN_ROWS = 128
"""Rows that still wait for a document that fits. More pack tighter, and keep documents waiting longer."""


def pack(rows: Iterable[Row], max_length: int) -> Iterator[Row]:
    """Best fit: a document joins the fullest open row that has room; the fullest row closes when too many
    are open.

    It reads its input once and holds OPEN_ROWS rows, so it packs a stream as well; the outcome depends on
    the order of the documents alone. No document is cut or lost.
    """
    open_rows: list[tuple[int, Row]] = []
    for row in rows:
        length = sum(len(sequence.tokens) for sequence in row)
        fitting = [index for index, (used, _) in enumerate(open_rows) if used + length <= max_length]
        if fitting:
            best = max(fitting, key=lambda index: open_rows[index][0])
            used, documents = open_rows.pop(best)
            length, row = used + length, documents + row
        if length == max_length:
            yield row
            continue
        open_rows.append((length, row))
        if len(open_rows) > OPEN_ROWS:
            fullest = max(range(len(open_rows)), key=lambda index: open_rows[index][0])
            yield open_rows.pop(fullest)[1]
    for _, row in open_rows:
        yield row
