"""Rows cut to a few tokens that still have something to learn."""

from __future__ import annotations

from launch.data.data import Data
from launch.data.rows import Row, Sequence

LOOKED_AT = 4


def short_rows(data: Data, count: int, length: int) -> list[Row]:
    """`count` of the stream's first rows, with lines of at most `length` tokens around where learning begins; those
    that teach something first."""
    cut = [_short(row, length, data.layout.packed) for row in data.first(LOOKED_AT * count)]
    rows = sorted(cut, key=lambda row: not _teaches(row, data.layout.objective))
    return [rows[index % len(rows)] for index in range(count)]


def _teaches(row: Row, objective: str) -> bool:
    """Whether a gradient comes of it: of completions with the same reward none does."""
    learned = any(sequence.learned[1:].any() for sequence in row)
    return learned and (objective != "grpo" or len({sequence.reward for sequence in row}) > 1)


def _short(row: Row, length: int, packed: bool) -> Row:
    if not packed:
        return tuple(_window(sequence, length) for sequence in row)
    # A packed line is short by its documents, of which there stay several.
    share = -(-length // min(len(row), 3))
    kept: list[Sequence] = []
    for sequence in row:
        room = length - sum(len(document.tokens) for document in kept)
        if room > 0:
            kept.append(_window(sequence, min(share, room)))
    return tuple(kept)


def _window(sequence: Sequence, length: int) -> Sequence:
    """Half of it before the first learned token, where there is so much."""
    first = int(sequence.learned.argmax())
    start = max(0, min(first - length // 2, len(sequence.tokens) - length))
    tokens, learned = sequence.tokens[start : start + length], sequence.learned[start : start + length].copy()
    learned[:1] = False
    return Sequence(tokens, learned, sequence.reward)
