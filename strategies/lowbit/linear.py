"""A linear whose products are quantized while it trains.

Its weight keeps its name, type and place. In `eval` mode, and in the target precision, it is the linear it was.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strategies.lowbit.backends.probe import choose
from strategies.lowbit.backends.reference import How
from strategies.lowbit.draws import Draws, seed_of
from strategies.lowbit.formats import Scaled
from strategies.lowbit.hadamard import hadamard, hadamard_, random_hadamard
from strategies.lowbit.learned import Sizes, learned_product, true_product
from strategies.lowbit.precision import Precision
from strategies.lowbit.schedule import Schedule
from strategies.lowbit.tensor import Quantized
from strategies.pipelining.store import Store, WaitingGradient, Weight
from strategies.recomputation.policies import ROUNDS

UNIT = ROUNDS


class Siblings:
    """The latest quantized input: linears that are given the same tensor share one."""

    def __init__(self) -> None:
        self._latest: tuple[Any, int, Any, Quantized] | None = None

    def get(self, x: Tensor, key: Any, make: Callable[[], Quantized]) -> Quantized:
        latest = self._latest
        if latest is None or latest[0]() is not x or latest[1:3] != (x._version, key):
            latest = self._latest = weakref.ref(x), x._version, key, make()
        return latest[3]

    def __reduce__(self) -> Any:
        return Siblings, ()


@dataclass
class Shared:
    """What the linears of one model share."""

    draws: Draws
    schedule: Schedule
    siblings: Siblings = field(default_factory=Siblings)
    sizes: Sizes = field(default_factory=Sizes)


@dataclass
class Unit:
    """One linear; `name` in the base model."""

    shared: Shared
    name: str
    precision: Precision
    label: str
    turned: bool
    """Its weight is [I, O]."""

    def products(self, device: torch.device, trained: bool) -> list[How]:
        """How each of its products runs."""
        p = self.precision
        if p.learned:
            return ["emulated"] * (2 + trained)
        made = [choose(p.x, p.weight, device)[1], choose(p.by, self._again(p.weight), device)[1]]
        if trained:
            b = p.by if p.random_hadamard else self._again(p.x)
            made.append(choose(p.by, b, device)[1])
        return made

    def _again(self, scaled: Scaled) -> Scaled:
        return scaled if self.precision.serves_again(scaled) else self.precision.by


class LowBitLinear:
    """Mixed into a linear."""

    def forward(self: Any, x: Tensor) -> Any:
        unit: Unit = vars(self)[UNIT]
        if not self.training or unit.shared.schedule.plain:
            return super().forward(x)  # type: ignore[misc]
        if unit.precision.learned:
            return _learned(self, x, unit, true=False)
        owner = Weight.of(self.weight) if Store.current and torch.is_grad_enabled() else None
        return _LowBit.apply(x, self.weight, self.bias, unit, owner)  # type: ignore[no-untyped-call]

    def true_forward(self: Any, x: Tensor) -> Any:
        """The forward as it is rounded, straight through the rounding for autograd."""
        unit: Unit = vars(self)[UNIT]
        p, schedule = unit.precision, unit.shared.schedule
        if not self.training or schedule.plain or schedule.forward_plain:
            return super().forward(x)  # type: ignore[misc]
        if p.learned:
            return _learned(self, x, unit, true=True)
        backend, _ = choose(p.x, p.weight, x.device)

        def rounded(matrix: Tensor, scaled: Scaled) -> Tensor:
            spread = _spread(matrix, p)
            return spread + (backend.quantize(spread.detach(), scaled).dequantize(spread.dtype) - spread.detach())

        x_TI = rounded(x.reshape(-1, x.shape[-1]), p.x)
        weight_OI = rounded(self.weight.T if unit.turned else self.weight, p.weight)
        return F.linear(x_TI, weight_OI.to(x_TI.dtype), self.bias).view(*x.shape[:-1], -1)


def _learned(module: Any, x: Tensor, unit: Unit, true: bool) -> Tensor:
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    weight_OI = module.weight.T if unit.turned else module.weight
    x_TI, weight_OI = (_spread(m.to(dtype), unit.precision) for m in (x.reshape(-1, x.shape[-1]), weight_OI))
    with torch.autocast(kind, enabled=False):
        if true:
            y_TO = true_product(x_TI, weight_OI, unit.name, unit.shared.sizes)
        else:
            y_TO = learned_product(x_TI, weight_OI, unit.name, unit.shared.sizes, unit.shared.draws)
    y_TO = y_TO if module.bias is None else y_TO + module.bias.to(dtype)
    return y_TO.view(*x.shape[:-1], -1)


class _LowBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias_O: Tensor | None, unit: Unit, owner: Any) -> Tensor:
        p, device = unit.precision, x.device
        ctx.unit, ctx.shape = unit, x.shape
        ctx.dtypes = x.dtype, weight.dtype, None if bias_O is None else bias_O.dtype
        ctx.owner, ctx.store = owner, Store.current
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
        ctx.dtype = dtype = dtype if x.dtype != torch.float64 else x.dtype
        backend, _ = choose(p.x, p.weight, device)
        with torch.autocast(device.type, enabled=False):
            x_TI = x.detach().reshape(-1, x.shape[-1])
            make = lambda: backend.quantize(x_TI, p.x, spread=p.hadamard).pack()  # noqa: E731
            xq = unit.shared.siblings.get(x, (p.x, p.hadamard, backend.name), make)
            if unit.shared.schedule.forward_plain:
                y_TO = x_TI.to(dtype) @ _as_OI(weight, unit).to(dtype).T
            else:
                y_TO = backend.product(xq, _quantized(weight, unit), dtype)
            if bias_O is not None:
                y_TO = y_TO + bias_O.to(dtype)
        kept = [xq.codes, xq.scales, xq.of_tensor, xq.multiples] if ctx.needs_input_grad[1] else [None] * 4
        ctx.save_for_backward(weight, *kept)
        ctx.input = {"scaled": xq.scaled, "shape": xq.shape, "packed": xq.packed}
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Any:
        weight, codes, scales, of_tensor, multiples = ctx.saved_tensors
        unit: Unit = ctx.unit
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        by_x = by_weight = by_bias = None
        by_TO = by.reshape(-1, by.shape[-1])
        key = unit.shared.draws.next(unit.name)
        with torch.autocast(by.device.type, enabled=False):
            if wants_x:
                by_x = gradient_of_input(by_TO, _quantized(weight, unit), unit.precision, key, ctx.dtype)
                by_x = by_x.view(ctx.shape).to(ctx.dtypes[0])
            if wants_weight:
                xq = Quantized(codes, scales, of_tensor, multiples=multiples, **ctx.input)
                product = _LaterProduct(unit, by_TO, xq, key, ctx.dtype, ctx.dtypes[1])
                if ctx.owner is None:
                    by_weight = product()
                else:
                    ctx.store.put(WaitingGradient(ctx.owner, product))
            if wants_bias:
                by_bias = by_TO.sum(0).to(ctx.dtypes[2])
        return by_x, by_weight, by_bias, None, None


@dataclass(frozen=True)
class _LaterProduct:
    """The gradient of a weight, when it is called for."""

    unit: Unit
    by_TO: Tensor
    x_TI: Quantized
    key: tuple[int | str, ...]
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def __call__(self) -> Tensor:
        found = gradient_of_weight(self.by_TO, self.x_TI, self.unit.precision, self.key, self.dtype)
        return (found.T if self.unit.turned else found).to(self.weight_dtype)


def gradient_of_input(
    by_TO: Tensor, weight_OI: Quantized, p: Precision, key: tuple[int | str, ...], dtype: torch.dtype
) -> Tensor:
    """dy times the weight that the forward has used, dy rounded anew."""
    fold = None
    if p.serves_again(p.weight):
        backend, _ = choose(p.by, p.weight, by_TO.device)
        b = weight_OI.turned()
        fold = weight_OI.row_scales()[:, 0] if p.weight.by_rows else None
    else:
        backend, _ = choose(p.by, p.by, by_TO.device)
        b = backend.quantize(weight_OI.dequantize().T, p.by, _seed(p, key, "weight"))
    a = backend.quantize(by_TO, p.by, _seed(p, key, "by input"), fold)
    made = backend.product(a, b, dtype)
    return hadamard_(made.contiguous(), p.hadamard) if p.hadamard else made


def gradient_of_weight(
    by_TO: Tensor, x_TI: Quantized, p: Precision, key: tuple[int | str, ...], dtype: torch.dtype
) -> Tensor:
    """dy transposed times the input that the forward has used."""
    by_OT, fold = by_TO.T, None
    if p.serves_again(p.x) and not p.random_hadamard:
        backend, _ = choose(p.by, p.x, by_TO.device)
        b = x_TI.unpack().turned()
        fold = x_TI.row_scales()[:, 0] if p.x.by_rows else None
    else:
        backend, _ = choose(p.by, p.by, by_TO.device)
        x_IT = x_TI.dequantize().T
        if p.random_hadamard:
            signs = seed_of(*key, "signs")
            by_OT, x_IT = (random_hadamard(m.float(), p.random_hadamard, signs) for m in (by_OT, x_IT))
        b = backend.quantize(x_IT, p.by, _seed(p, key, "input"))
    a = backend.quantize(by_OT, p.by, _seed(p, key, "by weight"), fold)
    made = backend.product(a, b, dtype)
    return hadamard_(made.contiguous(), p.hadamard) if p.hadamard else made


def _spread(x: Tensor, p: Precision) -> Tensor:
    return hadamard(x, p.hadamard) if p.hadamard else x


def _seed(p: Precision, key: tuple[int | str, ...], what: str) -> int | None:
    return seed_of(*key, what) if p.stochastic else None


def _as_OI(weight: Tensor, unit: Unit) -> Tensor:
    return weight.detach().T if unit.turned else weight.detach()


def _quantized(weight: Tensor, unit: Unit) -> Quantized:
    """The same in the forward and in the backward, as the weight does not change between them."""
    p = unit.precision
    backend, _ = choose(p.x, p.weight, weight.device)
    return backend.quantize(_as_OI(weight, unit), p.weight, spread=p.hadamard)


def units(model: nn.Module) -> list[tuple[Unit, nn.Module]]:
    return [(vars(module)[UNIT], module) for module in model.modules() if UNIT in vars(module)]
