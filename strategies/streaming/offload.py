"""Memory outside the device: for layer inputs until their backward, and for recorded keys and values.

On a GPU it is pinned host memory; layer inputs travel on a stream of their own, there while the next layer runs and
back while the layer above runs backwards. On a CPU, where there is no second memory, it is a file that is mapped only
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

    def tensor(self) -> Tensor:
        """Mapped for as long as it is held."""
        name = f"/proc/self/fd/{self._file.fileno()}"
        return torch.from_file(name, shared=True, size=self.shape.numel(), dtype=self.dtype).view(self.shape)


class PinnedMemory:
    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self._host = torch.zeros(shape, dtype=dtype, pin_memory=True)

    def tensor(self) -> Tensor:
        return self._host


def outside(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FileMemory | PinnedMemory:
    return PinnedMemory(shape, dtype) if device.type == "cuda" else FileMemory(shape, dtype)


class Shelf:
    """Tensors put away in the order of the forward, taken back in reverse. One model's."""

    def __init__(self) -> None:
        self._stream: Any = None
        self._newest: weakref.ref[Away] | None = None

    def put(self, tensor: Tensor) -> Away:
        below = self._newest() if self._newest else None
        away = OnHost(tensor, self._side_stream(tensor.device), below) if tensor.is_cuda else InFile(tensor)
        self._newest = weakref.ref(away)
        return away

    def _side_stream(self, device: torch.device) -> Any:
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        return {"_stream": None, "_newest": None}


class Away:
    """A tensor that was put away."""

    def back(self) -> Tensor:
        raise NotImplementedError


class InFile(Away):
    def __init__(self, tensor: Tensor) -> None:
        self._memory = FileMemory(tensor.shape, tensor.dtype)
        self._memory.tensor().copy_(tensor.detach())

    def back(self) -> Tensor:
        return self._memory.tensor().clone()


class OnHost(Away):
    """`below` was put away before it, so it comes back after it: its way back begins when this one is back."""

    def __init__(self, tensor: Tensor, stream: Any, below: Away | None) -> None:
        self.device, self.stream = tensor.device, stream
        self.below = below
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.coming: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor.detach(), non_blocking=True)
        # Its memory is not given to someone else before the copy is done.
        tensor.record_stream(stream)

    def fetch(self) -> None:
        if self.coming is None:
            with torch.cuda.stream(self.stream):
                self.coming = self.host.to(self.device, non_blocking=True)

    def back(self) -> Tensor:
        self.fetch()
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        tensor, self.coming = self.coming, None
        assert tensor is not None
        tensor.record_stream(current)
        if isinstance(self.below, OnHost):
            self.below.fetch()
        self.below = None
        return tensor
