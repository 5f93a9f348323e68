"""From rows to the tensors of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distrib.contracts import IGNORE, Batch, Window
from launch.data.rows import Row, Sequence

ADVANTAGE_FLOOR = 1e-4


@dataclass(frozen=True)
class Layout:
    """How rows become tensors. Padding is on the right, where causal attention never looks back at it.

    Unpacked, every sequence is a line of its own: of P pairs, lines 2i and 2i + 1 are chosen and
    rejected; the completions of a group follow each other. Packed, a row's documents share one line, and
    `position_ids` restart at 0 with each of them and with the padding, from which attention tells them
    apart.

    `advantages` are (reward - mean) / (std + 1e-4) over the group. The std is the population's, so that a
    group of one is defined: nothing is learned from it, just as from a group of equal rewards.
    """

    objective: str
    packed: bool
    pad: int

    def batch(self, rows: list[Row], learn: bool = True) -> Batch:
        """The micro-batch of these rows; without `learn` no label is left, and it counts for nothing."""
        lines = [_joined(row) for row in rows] if self.packed else [sequence for row in rows for sequence in row]
        shape = (len(lines), max(len(line.tokens) for line in lines))
        tokens, labels = np.full(shape, self.pad, np.int64), np.full(shape, IGNORE, np.int64)
        for index, line in enumerate(lines):
            tokens[index, : len(line.tokens)] = line.tokens
            if learn:
                labels[index, : len(line.tokens)] = np.where(line.learned, line.tokens, IGNORE)
        batch = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if self.packed:
            batch["position_ids"] = torch.from_numpy(np.stack([_positions(row, shape[1]) for row in rows]))
        if self.objective == "grpo":
            batch["advantages"] = torch.cat([_advantages(row) for row in rows])
        return batch


def _joined(row: Row) -> Sequence:
    return Sequence(np.concatenate([s.tokens for s in row]), np.concatenate([s.learned for s in row]))


def _positions(row: Row, width: int) -> NDArray[np.int64]:
    lengths = [len(sequence.tokens) for sequence in row]
    return np.concatenate([np.arange(length) for length in (*lengths, width - sum(lengths))])


def _advantages(row: Row) -> torch.Tensor:
    rewards = torch.tensor([sequence.reward for sequence in row], dtype=torch.float64)
    spread = rewards.std(correction=0) + ADVANTAGE_FLOOR
    return ((rewards - rewards.mean()) / spread).float()


def window(layout: Layout, shares: list[tuple[int, Row]], micro_batches: int, batch: int, filler: Row) -> Window:
    """The window of a rank with these (id, row), filled up to `micro_batches`."""
    rows = [row for _, row in shares]
    real = [layout.batch(rows[start : start + batch]) for start in range(0, len(rows), batch)]
    fillers = [layout.batch([filler], learn=False) for _ in range(micro_batches - len(real))]
    return Window(
        micro_batches=real + fillers,
        ids=[row_id for row_id, _ in shares],
        tokens=sum(micro_batch["input_ids"].numel() for micro_batch in real),
        nonpad_tokens=sum(len(sequence.tokens) for row in rows for sequence in row),
        loss_tokens=sum(int((micro_batch["labels"] != IGNORE).sum()) for micro_batch in real),
    )
