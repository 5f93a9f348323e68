"""Activation functions that keep, instead of their input, the step of a step function that their derivative is on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strategies.activations.step_function import POINTS, StepFunction, fitted
from strategies.core.edits import Edit, Wrap, original_class

NAMES = re.compile("silu|swish|gelu|mish", re.IGNORECASE)
"""Of classes whose instances are tried. ReLU, tanh and sigmoid keep their output, which others need anyway."""


def coded_activations(model: nn.Module, bits: int | None) -> Iterator[Edit]:
    """Every module that is a smooth ReLU is wrapped; with `bits` None they keep their input."""
    for name, module in model.named_modules():
        derivative = _derivative(module) if NAMES.search(original_class(module).__name__) else None
        if derivative is not None:
            steps = None if bits is None else fitted(derivative, bits)
            yield Wrap(name, CodedActivation, {"_ebbtide_steps": steps}, must_run=False)


def _derivative(module: nn.Module) -> bytes | None:
    """At POINTS; None where this is no function of each number alone, or not flat to the left and 1 to the right."""
    if (
        next(module.parameters(), None) is not None
        or getattr(module, "inplace", False)
        or next(module.children(), None)
    ):
        return None
    with torch.enable_grad():
        x = torch.tensor(POINTS, device="cpu", requires_grad=True)
        try:
            y, backwards = (original_class(module).forward(module, values) for values in (x, x.flip(0)))
            (slope,) = torch.autograd.grad(y.sum(), x)
        except Exception:
            return None
    found: Any = slope.numpy()
    alone = y.shape == x.shape and torch.allclose(y, backwards.flip(0), 1e-12, 1e-12)
    if not alone or abs(found[0]) > 1e-3 or abs(found[-1] - 1) > 1e-3 or not np.isfinite(found).all():
        return None
    return found.tobytes()  # type: ignore[no-any-return]


class CodedActivation:
    """Mixed into an activation function."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        own: Callable[..., Any] = super().forward  # type: ignore[misc]
        given = [*args, *kwargs.values()]
        steps: StepFunction | None = self._ebbtide_steps
        if steps is None or len(given) != 1 or not (torch.is_grad_enabled() and given[0].requires_grad):
            return own(*args, **kwargs)
        coded: Any = _Coded
        return coded.apply(given[0], own, steps)


class _Coded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Callable[[Tensor], Tensor], steps: StepFunction) -> Tensor:
        ctx.steps, ctx.dtype = steps, x.dtype
        ctx.save_for_backward(steps.encode(x))
        return own(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return ctx.steps.times(by_output, packed).to(ctx.dtype), None, None
