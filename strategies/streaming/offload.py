"""Layer inputs away from the device until their backward.

On a GPU they go to pinned host memory on a stream of their own, while the next layer runs, and come back while the
layer above runs backwards. On a CPU, where there is no second memory, they go to a file that is mapped only while
it is written or read.
"""

from __future__ import annotations

import tempfile
import weakref
from typing import Any

import torch
from torch import Tensor


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
        self.shape, self.dtype = tensor.shape, tensor.dtype
        # Without a name: gone with the process, however that ends.
        self.file = tempfile.TemporaryFile(prefix="ebbtide-")  # noqa: SIM115
        self.file.truncate(max(1, tensor.numel() * tensor.element_size()))
        self._mapped().copy_(tensor.detach().reshape(-1))

    def _mapped(self) -> Tensor:
        count = self.shape.numel()
        name = f"/proc/self/fd/{self.file.fileno()}"
        return torch.from_file(name, shared=True, size=count, dtype=self.dtype)

    def back(self) -> Tensor:
        return self._mapped().clone().view(self.shape)


class OnHost(Away):
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
