"""Norms that keep their output, which the products behind them keep anyway, instead of their input.

With x the input and n = (x - mean) / sqrt(variance + eps), a norm's output is y = scale * n + shift. The backward needs
n and the root alone, and n = (y - shift) / scale ("memory-sharing" in 2406.16282, which first merges scale and shift
into the next product; here they stay parameters, so there is nothing to merge back). Channels whose scale is too small
for that keep their n.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strategies.activations.pieces import as_rows, pieces
from strategies.core.edits import Edit, Wrap, original_class

FORMULA = "_ebbtide_formula"
LEAST_SHARE = 16
"""A channel keeps its n where the shift is more times the scale: y has lost as many of n's digits."""
TRIAL_BOUND = 1e-5
"""In float64: many norms compute in float32 whatever they are given."""


@dataclass(frozen=True)
class Formula:
    """`centred`: the mean is taken off, as LayerNorm does and RMSNorm does not. `offset` is added to the weight."""

    centred: bool
    offset: float
    eps: float

    def root(self, x: Tensor) -> Tensor:
        """1 / sqrt(variance + eps) of each row."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()

    def normed(self, x: Tensor, root: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * root


def shared_norms(model: nn.Module) -> Iterator[Edit]:
    """Every norm whose formula a trial finds."""
    tried: dict[Any, Formula | None] = {}
    for name, module in model.named_modules():
        if FORMULA in vars(module):
            formula = vars(module)[FORMULA]
        elif _may_be_norm(module):
            numbers = tuple(value for value in vars(module).values() if isinstance(value, float))
            key = type(module), numbers, module.weight.shape, module._parameters.get("bias") is None
            if key not in tried:
                tried[key] = _tried(module, numbers)
            formula = tried[key]
        else:
            continue
        if formula is not None:
            yield Wrap(name, SharedNorm, {FORMULA: formula}, must_run=False)


def _may_be_norm(module: Any) -> bool:
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    parts = [*module.children(), *module.buffers()]
    named = "norm" in original_class(module).__name__.lower()
    return named and not parts and {"weight"} <= own <= {"weight", "bias"} and module.weight.ndim == 1


def _tried(module: Any, numbers: tuple[float, ...]) -> Formula | None:
    """The formula by which the module computes and is differentiated on a few rows, with weights of the trial's own."""
    probe, size = copy.copy(module), len(module.weight)
    own: dict[str, Any] = {}
    for index, (name, old) in enumerate(module._parameters.items()):
        own[name] = None if old is None else nn.Parameter(_waves(1, size, 3 + index)[0] + 1.5)
    vars(probe)["_parameters"] = own
    # Some rows are so small that eps matters.
    x = (_waves(5, size, 7) + 0.3) * torch.logspace(0, -4, 5, dtype=torch.float64, device="cpu")[:, None]
    inputs = [x.requires_grad_(), own["weight"], own.get("bias")]
    for eps in numbers:
        for centred in (False, True):
            for offset in (0.0, 1.0):
                formula = Formula(centred, offset, eps)
                if _is_by(formula, probe, inputs):
                    return formula
    return None


def _waves(rows: int, size: int, pace: int) -> Tensor:
    """Between -1 and 1, without drawing a random number."""
    return torch.sin(torch.arange(1, 1 + rows * size, dtype=torch.float64, device="cpu") * pace).view(rows, size)


def _is_by(formula: Formula, probe: Any, inputs: list[Any]) -> bool:
    x, weight, bias = inputs
    asked = [tensor for tensor in inputs if tensor is not None]
    shared: Any = _Shared
    with torch.enable_grad():
        try:
            y = probe.forward(x)
            right = torch.autograd.grad(y, asked, _cotangent(y))
        except Exception:
            return False
        normed = formula.normed(x, formula.root(x)) * (weight + formula.offset) + (0 if bias is None else bias)
        found = torch.autograd.grad(shared.apply(x, weight, bias, probe.forward, formula), asked, _cotangent(y))
    return all(_alike(a, b) for a, b in zip((normed, *found), (y, *right), strict=True))


def _cotangent(y: Tensor) -> Tensor:
    return _waves(len(y), y.shape[1], 11)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Row by row: small ones have large gradients."""
    difference, size = ((one - other).norm(dim=-1), other.norm(dim=-1))
    return bool((difference <= TRIAL_BOUND * size).all())


class SharedNorm:
    """Mixed into a norm."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own: Callable[..., Any] = super().forward  # type: ignore[misc]
        given = [*args, *kwargs.values()]
        bias = self._parameters.get("bias")
        wanted = len(given) == 1 and any(x is not None and x.requires_grad for x in (given[0], self.weight, bias))
        if not wanted or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        shared: Any = _Shared
        return shared.apply(given[0], self.weight, bias, own, getattr(self, FORMULA))


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, own: Callable[[Tensor], Tensor], formula: Formula
    ) -> Tensor:
        y, precision = own(x), torch.promote_types(x.dtype, torch.float32)
        # Copies: an engine frees what it gathered for the forward.
        scale = weight.detach().to(precision, copy=True) + formula.offset
        shift = None if bias is None else bias.detach().to(precision, copy=True)
        lost = _lost(scale, shift, torch.finfo(y.dtype).tiny)
        roots, kept = [], []
        for (piece,) in pieces(as_rows(x)):
            exact = piece.to(precision)
            roots.append(formula.root(exact))
            if lost is not None:
                kept.append(formula.normed(exact, roots[-1])[:, lost])
        ctx.save_for_backward(y, torch.cat(roots), scale, shift, lost, torch.cat(kept) if kept else None)
        ctx.formula, ctx.dtypes = formula, (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> Any:
        y, root, scale, shift, lost, kept = ctx.saved_tensors
        rows, by_rows = as_rows(y), as_rows(by_output)
        by_input = torch.empty_like(rows, dtype=ctx.dtypes[0], memory_format=torch.contiguous_format)
        by_scale, by_shift = torch.zeros_like(scale), torch.zeros_like(scale)
        parts = [rows, by_rows, root, by_input, *([] if lost is None else [kept])]
        for piece, by_piece, root_of_piece, into, *kept_of_piece in pieces(*parts):
            normed, by = piece.to(scale.dtype), by_piece.to(scale.dtype)
            normed = (normed if shift is None else normed - shift) / scale
            if kept_of_piece:
                normed[:, lost] = kept_of_piece[0]
            by_scale += (by * normed).sum(0)
            by_shift += by.sum(0)
            by_normed = by * scale
            less = normed * (by_normed * normed).mean(-1, keepdim=True)
            if ctx.formula.centred:
                less += by_normed.mean(-1, keepdim=True)
            into.copy_((by_normed - less).mul_(root_of_piece))
        _, weight_dtype, bias_dtype = ctx.dtypes
        by_bias = None if bias_dtype is None else by_shift.to(bias_dtype)
        return by_input.view(y.shape), by_scale.to(weight_dtype), by_bias, None, None


def _lost(scale: Tensor, shift: Tensor | None, tiny: float) -> Tensor | None:
    """The channels of which y does not say what n was."""
    least = tiny if shift is None else tiny + shift.abs() / LEAST_SHARE
    told = scale.abs() >= least
    return None if bool(told.all()) else (~told).nonzero()[:, 0]
