"""Weight gradients that wait: a backward leaves the two factors of a product's weight gradient, and `run` multiplies.

Within the store's context every product with a parameter, or with a view of one, goes through a function of its own:
`F.linear`, and the grouped product of experts. Its backward gives the gradient of the input and puts (x, dy) aside.
What has no rule (norms, biases, embeddings, convolutions) gets its gradient in the backward, from autograd: exact as
well, and a small part of the work. So has a product whose weight is no parameter at that moment: a layer that runs its
own backward on copies of its weights, as a streaming layer does, leaves nothing waiting.

The parameter itself is kept on the node: what autograd keeps would be a copy under checkpointing, and `.grad` would be
that copy's.

Shapes: N rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Weight:
    """A parameter, or a view of one."""

    parameter: nn.Parameter
    view: tuple[torch.Size, tuple[int, ...], int] | None

    @classmethod
    def of(cls, weight: Any) -> Weight | None:
        """None where its gradient is nobody's, or autograd's to route."""
        if not isinstance(weight, Tensor) or not weight.requires_grad:
            return None
        if isinstance(weight, nn.Parameter):
            return cls(weight, None)
        base = weight._base
        if not isinstance(base, nn.Parameter):
            return None
        offset = int(weight.storage_offset()) - int(base.storage_offset())
        return cls(base, (weight.shape, weight.stride(), offset))

    def add(self, left: Tensor, right: Tensor, expert: int | None = None) -> None:
        """Their product, to the gradient."""
        parameter = self.parameter
        if parameter.grad is None:
            if self.view is None and expert is None:
                parameter.grad = (left @ right).to(parameter.dtype)
                return
            parameter.grad = torch.zeros_like(parameter)
        total = parameter.grad if self.view is None else parameter.grad.as_strided(*self.view)
        total = total if expert is None else total[expert]
        if total.dtype == left.dtype:
            total.addmm_(left, right)
        else:
            total.add_(left @ right)

    def add_whole(self, gradient: Tensor) -> None:
        parameter = self.parameter
        if parameter.grad is None:
            parameter.grad = gradient if self.view is None else torch.zeros_like(parameter)
            if self.view is None:
                return
        total = parameter.grad if self.view is None else parameter.grad.as_strided(*self.view)
        total.add_(gradient)


class Later(Protocol):
    """A weight's gradient that waits."""

    def run(self) -> None: ...


@dataclass(frozen=True)
class WaitingGradient:
    """Of a product that has a backward of its own."""

    weight: Weight
    product: Callable[[], Tensor]

    def run(self) -> None:
        self.weight.add_whole(self.product())


@dataclass(frozen=True)
class Waiting:
    weight: Weight
    x_NI: Tensor
    by_NO: Tensor
    ends_E: Tensor | None = None
    """Of a grouped product: where each expert's rows end. Its weight is [E, I, O]."""

    def run(self) -> None:
        if self.ends_E is None:
            self.weight.add(self.by_NO.T, self.x_NI)
            return
        start = 0
        for expert, end in enumerate(self.ends_E.tolist()):
            if end > start:
                self.weight.add(self.x_NI[start:end].T, self.by_NO[start:end], expert)
            start = end


class Store(TorchFunctionMode):
    """A context for a stage's forwards and backwards. Within `deferring(key)`, a backward's weight gradients wait under
    it; in any other they are added at once.

    Under autocast a weight is copied once for all micro-batches, until `forget`, and what several products share once
    for them: autocast itself would have a copy for each."""

    current: ClassVar[Store | None] = None
    """Whose context this is."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[Hashable, list[Later]] = {}
        self._open: list[Later] | None = None
        self._weights: dict[Hashable, tuple[int, Tensor]] = {}
        self._input: tuple[Tensor, int, Tensor] | None = None

    def __enter__(self) -> Store:
        Store.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *_: Any) -> None:
        self._input = None
        Store.current = None
        super().__exit__(*_)  # type: ignore[no-untyped-call]

    def forget(self) -> None:
        """After a step, in which weights do not change."""
        self._weights.clear()

    def weight(self, weight: Weight, value: Tensor, dtype: torch.dtype) -> Tensor:
        """`value` in this precision."""
        if value.dtype == dtype:
            return value
        key, version = (id(weight.parameter), weight.view, dtype), value._version
        known = self._weights.get(key)
        if known is None or known[0] != version:
            known = self._weights[key] = version, value.to(dtype)
        return known[1]

    def input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if x.dtype == dtype:
            return x
        known = self._input
        if known is None or known[0] is not x or known[1] != x._version or known[2].dtype != dtype:
            known = self._input = x, x._version, x.to(dtype)
        return known[2]

    @contextmanager
    def deferring(self, key: Hashable) -> Iterator[None]:
        self._open = self._waiting.setdefault(key, [])
        try:
            yield
        finally:
            self._open = None

    @contextmanager
    def discarding(self) -> Iterator[None]:
        """Weight gradients are nobody's: an edit tries itself."""
        self._open = []
        try:
            yield
        finally:
            self._open = None

    def run(self, key: Hashable) -> None:
        waiting = self._waiting.pop(key, [])
        with torch.no_grad():
            while waiting:
                waiting.pop().run()

    def put(self, waiting: Later) -> None:
        if self._open is None:
            waiting.run()
        else:
            self._open.append(waiting)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func) or _BY_NAME.get(str(func))
        if rule is not None and torch.is_grad_enabled():
            outcome = rule(self, func, *args, **(kwargs or {}))
            if outcome is not None:
                return outcome
        return func(*args, **(kwargs or {}))


def _linear(store: Store, func: Any, input: Any, weight: Any, bias: Any = None) -> Tensor | None:
    found = Weight.of(weight)
    # A fake tensor stands for a plain one; other subclasses have products of their own.
    if found is None or type(input) not in (Tensor, FakeTensor):
        return None
    return _Linear.apply(input, weight, bias, found, store)  # type: ignore[no-any-return,no-untyped-call]


def _grouped(store: Store, func: Any, mat_a: Any, mat_b: Any, offs: Any = None, **others: Any) -> Tensor | None:
    found = Weight.of(mat_b)
    if found is None or offs is None or mat_b.ndim != 3 or any(x is not None for x in others.values()):
        return None
    return _Grouped.apply(mat_a, mat_b, offs, found, store, func)  # type: ignore[no-any-return,no-untyped-call]


# F.linear, which others may have put something in the place of.
_RULES: dict[Any, Callable[..., Tensor | None]] = {torch._C._nn.linear: _linear}
for _name in ("grouped_mm", "_grouped_mm"):
    for _place in (F, torch):
        if hasattr(_place, _name):
            _RULES[getattr(_place, _name)] = _grouped
# Transformers' own, where torch has none for the type.
_BY_NAME = {"transformers.grouped_mm_fallback": _grouped}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Any, weight: Weight, store: Store) -> Tensor:
        kind, ctx.dtypes = x.device.type, (x.dtype, None if bias_O is None else bias_O.dtype)
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            # By hand: autocast would remember a copy of the weight that has no gradient, for others too.
            dtype = torch.get_autocast_dtype(kind)
            x, weight_OI = store.input(x, dtype), store.weight(weight, weight_OI, dtype)
            bias_O = None if bias_O is None else bias_O.to(dtype)
        ctx.save_for_backward(x, weight_OI)
        ctx.weight, ctx.store = weight, store
        with torch.autocast(kind, enabled=False):
            return F.linear(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Any:
        x, weight_OI = ctx.saved_tensors
        by_x = by_bias = None
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        by_NO = by.reshape(-1, by.shape[-1])
        if wants_x:
            by_x = (by @ weight_OI).to(ctx.dtypes[0])
        if wants_weight:
            # Detached: its graph leads to what the stage received, which would wait as well.
            ctx.store.put(Waiting(ctx.weight, x.detach().reshape(-1, x.shape[-1]), by_NO))
        if wants_bias:
            by_bias = by_NO.sum(0).to(ctx.dtypes[1])
        return by_x, None, by_bias, None, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, weight_EIO: Tensor, ends_E: Tensor, weight: Weight, store: Store, product: Any
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_EIO, ends_E)
        ctx.weight, ctx.store, ctx.product = weight, store, product
        return product(x_NI, weight_EIO, offs=ends_E)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_NO: Tensor) -> Any:
        x_NI, weight_EIO, ends_E = ctx.saved_tensors
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = ctx.product(by_NO, weight_EIO.transpose(-2, -1), offs=ends_E)
        if ctx.needs_input_grad[1]:
            ctx.store.put(Waiting(ctx.weight, x_NI.detach(), by_NO, ends_E))
        return by_x, None, None, None, None, None
