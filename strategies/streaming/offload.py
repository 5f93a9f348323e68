"""Memory outside the device: for layer inputs until their backward, and for recorded keys and values.

On a GPU it is pinned host memory; layer inputs travel on a stream of their own, there while the next layer runs and
back a chunk ahead of the backward. On a CPU, where there is no second memory, it is a file that is mapped only
while it is written or read.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor


class FileMemory:
    """A tensor in a file without a name: gone with the process, however that ends."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self._file = tempfile.TemporaryFile(prefix="ebbtide-")  # noqa: SIM115
        # What is not written yet reads as zero.
        self._file.truncate(max(1, shape.numel() * dtype.itemsize))
        weakref.finalize(self, self._file.close)

    def tensor(self) -> Tensor:
        """Mapped for as long as it is held."""
        name = f"/proc/self/fd/{self._file.fileno()}"
        return torch.from_file(name, shared=True, size=self.shape.numel(), dtype=self.dtype).view(self.shape)


class PinnedMemory:
    """Page-locked, so that copies need not wait for the host. Not cleared."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self._host = torch.empty(shape, dtype=dtype, pin_memory=True)

    def tensor(self) -> Tensor:
        return self._host


def outside(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FileMemory | PinnedMemory:
    return PinnedMemory(shape, dtype) if device.type == "cuda" else FileMemory(shape, dtype)


class Shelf:
    """Where the layers' inputs wait for their backward. One model's."""

    def __init__(self) -> None:
        self._stream: Any = None

    def put(self, tensor: Tensor) -> Away:
        if not tensor.is_cuda:
            return Away(tensor)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        return OnHost(tensor, self._stream)

    def __getstate__(self) -> dict[str, Any]:
        return {"_stream": None}


class Away:
    """A tensor that was put away; parts of it come back as copies."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self._memory = outside(tensor.shape, tensor.dtype, tensor.device)
        self._put(tensor.detach())

    def _put(self, tensor: Tensor) -> None:
        self._memory.tensor().copy_(tensor)

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        return self._memory.tensor().narrow(dim, start, length).clone()

    def prefetch(self) -> None:
        """It will be asked for, whole and soon."""

    def back(self) -> Tensor:
        return self.narrow(0, 0, self.shape[0])


class OnHost(Away):
    """Travels on a side stream: there while the device goes on, and back one part ahead of what is asked for.

    Parts are asked for upwards, then downwards again, so the next one follows in the same direction.
    """

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self._stream = stream
        self._coming: dict[tuple[int, int, int], Tensor] = {}
        self._start = -1
        super().__init__(tensor)

    def _put(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._memory.tensor().copy_(tensor, non_blocking=True)
        # Its memory is not given to someone else before the copy is done.
        tensor.record_stream(self._stream)

    def prefetch(self) -> None:
        self._fetch(0, 0, self.shape[0])

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        self._fetch(dim, start, length)
        part = self._coming.pop((dim, start, length))
        self._coming.clear()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        part.record_stream(current)
        following = start + length if start >= self._start else start - length
        self._start = start
        if 0 <= following < self.shape[dim]:
            self._fetch(dim, following, min(length, self.shape[dim] - following))
        return part

    def _fetch(self, dim: int, start: int, length: int) -> None:
        if (dim, start, length) not in self._coming:
            with torch.cuda.stream(self._stream):
                part = self._memory.tensor().narrow(dim, start, length)
                self._coming[dim, start, length] = part.to(self.device, non_blocking=True)
