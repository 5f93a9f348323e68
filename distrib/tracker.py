"""Live bytes of a run that allocates nothing: fake tensors have shapes and no data.

The very code that trains runs under torch's FakeTensorMode, and a second mode above it sees every operation's
outputs. A storage counts from the operation that made it until its last reference is gone, whoever holds it: the
graph, a buffer written in place, an autograd function.

What a kernel allocates and frees inside is not seen, nor what an allocator rounds up; a mapped file is not memory.
Fake tensors have no values, so questions about values have fixed answers: what is asked for is everywhere and all
of it holds (every label is learned, there is one document), counts are one, other numbers zero (two results do not
differ) unless a tracker is told otherwise.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


def materialise(model: nn.Module, fake: FakeTensorMode) -> None:
    """Fake tensors on the CPU in the place of those on the meta device, tied ones still tied. (PEFT moves its adapters,
    and a fake parameter cannot be moved: models are built on the meta device first.)"""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        owned: list[dict[str, Any]] = [module._parameters, module._buffers]
        for held in owned:
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    with fake:
                        new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                if old is not None:
                    held[name] = made[id(old)]


@contextmanager
def tracking(fake: FakeTensorMode, tracker: Tracker) -> Iterator[None]:
    """Around the run of a model that was built under `fake`."""
    # Transformers takes fake tensors for a trace, and would build T x T masks that a real run does not have.
    with patch("transformers.utils.import_utils.is_fake_tensor", lambda _: False), fake, tracker:
        yield


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`live_bytes` now, and the most since the last `restart`. `number` is the answer to what a number is;
    without `fake` the tensors have values, and nothing is answered for them."""

    def __init__(self, number: float = 0.0, fake: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = number
        self.fake = fake
        self.live_bytes = 0
        self.start_bytes = 0
        self._most = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Peaks are above what is live now."""
        self.start_bytes = self._most = self.live_bytes

    def peak_bytes(self) -> int:
        return self._most - self.start_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.fake and func is torch.ops.prim.device.default:
            # More than half of all calls, and a long way through the mode below.
            return args[0].fake_device
        kwargs = kwargs or {}
        self.note(func, args)
        out = self._answer(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            # A storage keeps its Python object for as long as anything refers to it, so the object's end is its own.
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._known:
                self.count(leaf, func, args)
        return out

    def note(self, func: Any, args: Any) -> None:
        """An operation that is about to run."""

    def count(self, tensor: Tensor, func: Any = None, args: Any = ()) -> None:
        """A storage that was not known, made by `func`."""
        storage = tensor.untyped_storage()
        key, size_bytes = id(storage), 0 if func is aten.from_file.default else storage.nbytes()
        self.live_bytes += size_bytes
        self._most = max(self._most, self.live_bytes)
        self._known[key] = weakref.ref(storage, lambda _: self.forget(key, size_bytes))

    def forget(self, key: int, size_bytes: int) -> None:
        self.live_bytes -= size_bytes
        del self._known[key]

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.fake:
            return None
        if func is aten.from_file.default:
            return torch.empty(args[2], **kwargs)
        if func is aten.nonzero.default:
            (mask,) = args
            return mask.new_zeros(mask.numel(), mask.ndim, dtype=torch.int64)
        if func is aten._local_scalar_dense.default:
            return self.number if args[0].dtype.is_floating_point else args[0].dtype == torch.bool or 1
        if func in (aten.equal.default, aten.allclose.default):
            return True
        return None
