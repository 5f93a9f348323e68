"""Tensors taken a few rows at a time, so that what an elementwise pass needs besides its result stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = {"cpu": 2**16}
"""Of a piece: what a core's cache holds; elsewhere enough that starting kernels costs nothing."""
MANY = 2**24


def as_rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]) if x.ndim else x.reshape(1, 1)


def rows_of_a_piece(rows: Tensor) -> int:
    """Nearly equal pieces: 1 at least."""
    most = max(1, ELEMENTS.get(rows.device.type, MANY) // max(1, rows.shape[1]))
    count = -(-rows.shape[0] // most)
    return -(-rows.shape[0] // max(1, count)) or 1


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each."""
    size = rows_of_a_piece(tensors[0])
    return zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)
