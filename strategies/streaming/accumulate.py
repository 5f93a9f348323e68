"""Gradients of half-precision parameters, added up in float32 over many backwards and rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def rounded_once(model: nn.Module) -> Iterator[None]:
    """For a model whose gradients nobody else collects: engines have float32 sums of their own."""
    sums: dict[nn.Parameter, Tensor] = {}

    def move(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        sums[parameter] = sums[parameter].add_(gradient) if parameter in sums else gradient.float()

    narrow = [p for p in model.parameters() if p.requires_grad and p.dtype in HALF]
    for parameter in narrow:
        if parameter.grad is not None:
            move(parameter)
    hooks = [p.register_post_accumulate_grad_hook(move) for p in narrow]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, total in sums.items():
            parameter.grad = total.to(parameter.dtype)
