"""The head in autograd: hidden states in, a loss or statistics out, by the cheapest way back that is exact.

    fused      a separable objective: loss and gradients in the forward, the backward only scales them
    unit rows  a frozen head: d statistic / d hidden is kept for every token, the backward scales its rows
    recompute  otherwise: the backward forms each chunk's logits again

Every pass also returns a slice of width zero of the logits it never made. The model carries it on as its
logits and adds its (empty) sum to the loss, so that whatever an engine hangs on the head's output, to gather
the weight again, happens before the pass's backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from strategies.core.objectives import Stats
from strategies.core.statistics import Gradients, Work, chunks, logit_gradient

Terms = Callable[[Stats], Tensor]
"""The objective over some statistics, divided by W."""


def run(work: Work, terms: Terms, separable: bool, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the zero-width slice."""
    weight_VD, bias_V = work.head.weight, work.head.bias
    inputs = [x for x in (hidden_BTD, weight_VD, bias_V) if x is not None]
    fused: Any = _Fused
    unit_rows: Any = _UnitRows
    recompute: Any = _Recompute
    with torch.autocast(hidden_BTD.device.type, enabled=False):
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            values = _measured(work, hidden_BTD)
            return terms(work.tokens.stats(values)), hidden_BTD.new_empty(*hidden_BTD.shape[:-1], 0)
        if separable:
            loss, empty = fused.apply(hidden_BTD, weight_VD, bias_V, work, terms)
            return loss, empty
        frozen = not weight_VD.requires_grad and not (bias_V is not None and bias_V.requires_grad)
        *measured, empty = (unit_rows if frozen else recompute).apply(hidden_BTD, weight_VD, bias_V, work)
        return terms(work.tokens.stats(dict(zip(work.names, measured, strict=True)))), empty


def _prepared(work: Work, hidden_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states as rows; the live weight and bias as the products take them."""
    head, dtype = work.head, work.matmul_dtype
    bias_V = None if head.bias is None else head.bias.detach().to(dtype)
    return hidden_BTD.detach().reshape(-1, hidden_BTD.shape[-1]), head.weight.detach().to(dtype), bias_V


def _collect(work: Work, parts: list[dict[str, Tensor]], like: Tensor) -> dict[str, Tensor]:
    empty = like.new_empty(0, dtype=work.exact_dtype)
    return {name: torch.cat([empty, *(part[name] for part in parts)]) for name in work.names}


def _measured(work: Work, hidden_BTD: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        parts = [chunk.values for chunk in chunks(work, *_prepared(work, hidden_BTD))]
        return _collect(work, parts, hidden_BTD)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Any, work: Work, terms: Terms) -> Any:
        inputs = _prepared(work, hidden_BTD)
        gradients = Gradients(work, inputs, ctx.needs_input_grad)
        loss = hidden_BTD.new_zeros((), dtype=work.exact_dtype)
        for chunk in chunks(work, *inputs):
            part, factors = _differentiate(work, terms, chunk.start, chunk.values)
            loss += part
            gradients.add(chunk, logit_gradient(work, chunk, factors), inputs[1])
        ctx.gradients = gradients.like((hidden_BTD, weight_VD, bias_V))
        return loss, hidden_BTD.new_empty(*hidden_BTD.shape[:-1], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_loss: Tensor, _: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the loss was differentiated twice; its gradients were handed over the first time")
        gradients, ctx.gradients = ctx.gradients, None
        # Asking an accelerator for the value would make the host wait for it.
        if by_loss.device.type != "cpu" or by_loss.item() != 1:
            for gradient in filter(torch.is_tensor, gradients):
                gradient.mul_(by_loss)
        return *gradients, None, None


def _differentiate(work: Work, terms: Terms, start: int, values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The objective over one chunk's statistics and its gradient by each of them."""
    leaves = {name: values[name].detach().requires_grad_() for name in work.names}
    with torch.enable_grad():
        part = terms(work.tokens.stats(leaves, start))
        factors = torch.autograd.grad(part, list(leaves.values()), materialize_grads=True)
    return part.detach(), dict(zip(leaves, factors, strict=True))


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Any, work: Work) -> Any:
        inputs = _prepared(work, hidden_BTD)
        count = work.tokens.position_n.shape[0]
        parts, units = [], {name: inputs[0].new_empty(count, inputs[0].shape[1]) for name in work.names}
        for chunk in chunks(work, *inputs):
            parts.append(chunk.values)
            logprob_CV = chunk.logprob_CV
            for name, unit_nD in units.items():
                copied = replace(chunk, logprob_CV=logprob_CV if len(units) == 1 else logprob_CV.clone())
                one_C, zero_C = torch.ones_like(chunk.values[name]), torch.zeros_like(chunk.values[name])
                gradient_CV = logit_gradient(work, copied, {"logprob": zero_C, name: one_C})
                unit_nD[chunk.start : chunk.start + len(one_C)] = gradient_CV @ inputs[1]
        ctx.save_for_backward(work.tokens.position_n, *units.values())
        values = _collect(work, parts, hidden_BTD)
        return *values.values(), hidden_BTD.new_empty(*hidden_BTD.shape[:-1], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> Any:
        position_n, *units = ctx.saved_tensors
        by_empty = by_outputs[-1]
        by_rows_nD = torch.zeros_like(units[0])
        for unit_nD, by_value_n in zip(units, by_outputs[:-1], strict=True):
            by_rows_nD.addcmul_(unit_nD, by_value_n[:, None].to(unit_nD.dtype))
        by_hidden_ND = by_rows_nD.new_zeros(by_empty.shape[:-1].numel(), by_rows_nD.shape[1])
        by_hidden_ND.index_copy_(0, position_n, by_rows_nD)
        return by_hidden_ND.view(*by_empty.shape[:-1], -1), None, None, None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BTD: Tensor, weight_VD: Tensor, bias_V: Any, work: Work) -> Any:
        ctx.save_for_backward(hidden_BTD)
        ctx.work = work
        values = _measured(work, hidden_BTD)
        return *values.values(), hidden_BTD.new_empty(*hidden_BTD.shape[:-1], 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> Any:
        (hidden_BTD,), work = ctx.saved_tensors, ctx.work
        # The weight is read from the module, not saved: a sharding engine has freed what the forward saw.
        inputs = _prepared(work, hidden_BTD)
        by_values = dict(zip(work.names, by_outputs[:-1], strict=True))
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            gradients = Gradients(work, inputs, ctx.needs_input_grad)
            for chunk in chunks(work, *inputs):
                stop = chunk.start + len(chunk.position_C)
                factors = {name: by_n[chunk.start : stop] for name, by_n in by_values.items()}
                gradients.add(chunk, logit_gradient(work, chunk, factors), inputs[1])
        return *gradients.like((hidden_BTD, work.head.weight, work.head.bias)), None
