"""Logits that are formed when someone reads them, and not before.

A loop may ask a model for its loss and look at its logits as well, for an accuracy or an entropy. What it is given
knows the hidden states and the head: shape and type cost nothing, a slice over rows and positions stays unread, and
every other use forms the logits it needs and forgets them. With gradients on they carry their graph.

Limits: read-only; not to be read once the head has other weights; formed again by every use.

Shapes: D hidden, V vocabulary; whatever is before is rows and positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distrib.errors import UserError
from strategies.core.statistics import LogitMap

Graph = Literal["kept", "none", "lost"]

REQUEST = "_ebbtide_request"
SAMPLE = 512

_DATA = {"T", "mT", "H", "mH", "data", "real", "imag"}
_DESCRIBES = {
    "size",
    "dim",
    "numel",
    "nelement",
    "element_size",
    "is_floating_point",
    "is_complex",
    "__len__",
    "__hash__",
}
_IN_PLACE = "add|sub|mul|matmul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift"
_CHANGES = re.compile(rf".*[^_]_|__i({_IN_PLACE})__|__setitem__|__set__|register_hook|retain_grad")


@dataclass(frozen=True)
class Reading:
    """How one forward's logits are formed: the head, what comes after it, and a sample of its weights then."""

    head: nn.Module
    logit_map: LogitMap | None
    sample: Tensor
    autocast_dtype: torch.dtype | None

    @classmethod
    def of(cls, head: nn.Linear, logit_map: LogitMap | None, device_type: str) -> Reading:
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        return cls(head, logit_map, _sample(head.weight), autocast)

    def check(self, head: nn.Linear) -> None:
        """Within the head's own call, where an engine has gathered its weight."""
        if not torch.equal(_sample(head.weight), self.sample):
            raise UserError(
                "the head's weights changed since these logits' forward: read them before the optimizer's step, or "
                "call the model without labels"
            )

    def form(self, hidden_D: Tensor) -> Tensor:
        slot, device_type = vars(self.head), hidden_D.device.type
        slot[REQUEST] = self
        try:
            with torch.autocast(device_type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
                logits_V: Tensor = self.head(hidden_D)
                asked = REQUEST not in slot
        finally:
            slot.pop(REQUEST, None)
        if not asked:
            raise UserError("the model is no longer prepared: read its logits before undo, or call it without labels")
        if self.logit_map is None:
            return logits_V
        return self.logit_map(logits_V.reshape(-1, logits_V.shape[-1])).reshape(logits_V.shape)


def _sample(weight_VD: Tensor) -> Tensor:
    flat = weight_VD.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].clone()


class LazyLogits(Tensor):
    """[..., V] logits of hidden states [..., D].

    `graph` is "lost" after a detach without gradients on: an engine's bookkeeping does that to every output, and
    what it leaves must not pass for logits that never had a gradient.
    """

    hidden_D: Tensor
    reading: Reading
    graph: Graph

    @staticmethod
    def __new__(
        cls, hidden_D: Tensor, reading: Reading, vocabulary: int, dtype: torch.dtype, graph: Graph
    ) -> LazyLogits:
        shape = (*hidden_D.shape[:-1], vocabulary)
        made: LazyLogits = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden_D.device)
        made.hidden_D, made.reading, made.graph = hidden_D, reading, graph
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def formed(self) -> Tensor:
        if self.graph == "lost" and torch.is_grad_enabled():
            raise UserError(
                "these logits have lost their gradient: read them under torch.no_grad(), or call the model without "
                "labels"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.graph == "kept"):
            return self.reading.form(self.hidden_D).to(self.dtype)

    def _like(self, hidden_D: Tensor, dtype: torch.dtype, graph: Graph) -> LazyLogits:
        return LazyLogits(hidden_D, self.reading, self.shape[-1], dtype, graph)

    def _detach(self) -> LazyLogits:
        without: Graph = "none" if self.graph == "none" or torch.is_grad_enabled() else "lost"
        return self._like(self.hidden_D.detach(), self.dtype, without)

    def _float(self) -> LazyLogits:
        return self._like(self.hidden_D, torch.float32, self.graph)

    def _clone(self, **kwargs: Any) -> Tensor:
        # DDP that looks for unused parameters clones every output, and drops the clones of those without a grad_fn. It
        # does so within an autograd function, where forward-mode gradients are off too.
        if not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
            return self._like(self.hidden_D.detach(), self.dtype, "lost")
        return self.formed().clone(**kwargs)

    def _to(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            return self._like(self.hidden_D, args[0], self.graph)
        return self.formed().to(*args, **kwargs)

    def _getitem(self, index: Any) -> Tensor:
        rows = _of_rows(index, self.dim())
        if rows is None:
            return self.formed()[index]
        return self._like(self.hidden_D[rows], self.dtype, self.graph)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        own = bool(args) and isinstance(args[0], LazyLogits)
        if own and (name in _DESCRIBES or (name == "__get__" and func.__self__.__name__ not in _DATA)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if own and name in _UNREAD:
            return _UNREAD[name](*args, **kwargs)
        if (own and _CHANGES.fullmatch(name)) or isinstance(kwargs.get("out"), LazyLogits):
            raise UserError(f"{name} on logits that came with a loss: they are read-only, so clone() them first")
        return func(*_read(args), **_read(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]._detach()
        return func(*_read(args), **_read(kwargs or {}))


_UNREAD: dict[str, Callable[..., Tensor]] = {
    "clone": LazyLogits._clone,
    "detach": LazyLogits._detach,
    "float": LazyLogits._float,
    "to": LazyLogits._to,
    "__getitem__": LazyLogits._getitem,
}


def lazy_logits(hidden_BTD: Tensor, head: nn.Linear, logit_map: LogitMap | None) -> Callable[[Tensor], LazyLogits]:
    """From the logits of width zero that the model returned, which have their precision, to those that can be read."""
    reading = Reading.of(head, logit_map, hidden_BTD.device.type)
    wanted = hidden_BTD.requires_grad or any(p.requires_grad for p in head.parameters())
    kept = torch.is_grad_enabled() and wanted

    def make(empty_BT0: Tensor) -> LazyLogits:
        hidden = hidden_BTD if kept else hidden_BTD.detach()
        return LazyLogits(hidden, reading, head.out_features, empty_BT0.dtype, "kept" if kept else "none")

    return make


def _read(values: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.formed, values)


def _of_rows(index: Any, dims: int) -> Any:
    """The part of an index that is over rows and positions, or None when it also picks from the vocabulary."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(map(_is_simple, parts)):
        return None
    taken = sum(part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else 1 for part in parts)
    for at, part in enumerate(parts):
        if part is Ellipsis:
            parts[at : at + 1] = [slice(None)] * (dims - taken + 1)
            taken = dims
            break
    if taken < dims:
        return tuple(parts)
    last = parts[-1]
    return tuple(parts[:-1]) if isinstance(last, slice) and last == slice(None) else None


def _is_simple(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.dtype in (torch.bool, torch.int64)
    return part is Ellipsis or (isinstance(part, int | slice) and not isinstance(part, bool))
