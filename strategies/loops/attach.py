"""A model whose own forward and `loss.backward()` train by strategies, those that run the step themselves among them.

Such a strategy runs the part of the model below the head: it gives the final hidden states without a graph, and what
autograd brings back to them is what its backward starts from. The head, the objective, its scale and its figures stay
the loop's, so that any objective is served and none is known here.

Limits: one process for such strategies; `.grad` is where gradients go, whatever asks for them.

Shapes: B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distrib.contracts import MODEL_INPUTS, Batch, Context
from distrib.engines.local import Local
from distrib.errors import Refused
from distrib.topology import Topology
from strategies.core import edits
from strategies.core.contract import Strategy, overrides
from strategies.core.edits import WRAPPED, Wrap, original_class
from strategies.core.halves import Halfway, InHalves
from strategies.core.objectives import SFT
from strategies.core.prepare import Prepared, causal_lm, edit, undo
from strategies.core.registry import name_of
from strategies.streaming.arguments import named_arguments
from strategies.streaming.backbone import find_backbone, find_layers
from strategies.streaming.blocks import BOUNDS

_CARRIER = "_ebbtide_carrier"
_OF_NO_EFFECT = {"use_cache", "return_dict", "num_items_in_batch", *BOUNDS}


@dataclass
class Carrier:
    """What runs the part below the head. `backwards` counts, so that a loop can be shown to have used it."""

    name: str
    step: InHalves
    context: Context
    forwards: int = 0
    """Since the context was set: the number of the micro-batch."""
    backwards: int = 0

    def begin(self, context: Context) -> None:
        self.context, self.forwards = context, 0


class CarriedBackbone:
    """Mixed into the part of the model below the head. With a cache, as generation has one, it is as it was."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = super().forward  # type: ignore[misc]
        named = named_arguments(original_class(self).forward, self, args, kwargs)
        training = self.training and torch.is_grad_enabled()
        if named.get("past_key_values") is not None or not (training or named.get("use_cache") is False):
            return forward(*args, **kwargs)
        carrier: Carrier = vars(self)[_CARRIER]
        inputs = _inputs(carrier.name, named)
        half = carrier.step.halfway(forward, inputs, carrier.context, carrier.forwards)
        if torch.is_grad_enabled():
            carrier.forwards += 1
            half.output.last_hidden_state = _carried(carrier, half)
        wanted = named.get("return_dict")
        return half.output if (self.config.return_dict if wanted is None else wanted) else half.output.to_tuple()


def _inputs(name: str, named: dict[str, Any]) -> Batch:
    """Refused with anything that a chunk of the sequence would not see the same way."""
    inputs = {key: named[key] for key in MODEL_INPUTS if named.get(key) is not None}
    others = [key for key, value in named.items() if key not in {*inputs, *_OF_NO_EFFECT} and _is_given(value)]
    if others:
        raise Refused(f"{others[0]} with strategy {name}: in other loops it takes {', '.join(MODEL_INPUTS)} alone")
    if "input_ids" not in inputs:
        raise Refused(f"no input_ids with strategy {name}: it takes no embeddings in their place")
    if inputs.get("attention_mask", inputs["input_ids"]).ndim != 2:
        raise Refused(f"attention_mask of more than two dimensions with strategy {name}: give one entry a token")
    bounds = [key for key in sorted(BOUNDS) if _is_given(named.get(key))]
    if bounds and "position_ids" not in inputs:
        raise Refused(f"{bounds[0]} without position_ids: pass those of packed documents too")
    return inputs


def _is_given(value: Any) -> bool:
    return value is not None and value is not False


def _carried(carrier: Carrier, half: Halfway) -> Tensor:
    carried: Any = _Carried
    # Something must want a gradient for the hidden states to have one.
    anchor = torch.zeros((), device=half.output.last_hidden_state.device, requires_grad=True)
    found: Tensor = carried.apply(anchor, carrier, half)
    return found


class _Carried(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, carrier: Carrier, half: Halfway) -> Tensor:
        ctx.carrier, ctx.half = carrier, half
        hidden_BTD: Tensor = half.output.last_hidden_state
        return hidden_BTD.view_as(hidden_BTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_BTD: Tensor) -> Any:
        if ctx.half is None:
            raise RuntimeError("the model was differentiated twice: call it again")
        half, ctx.half = ctx.half, None
        half.backward(by_BTD)
        ctx.carrier.backwards += 1
        return None, None, None


class Attached(Prepared):
    """What `attach` returns: the step, and what surrounds the loop's own steps."""

    carrier: Carrier | None = None

    @contextmanager
    def running(self, context: Context) -> Iterator[None]:
        if self.carrier is not None:
            self.carrier.begin(context)
        with super().running(context):
            yield

    def assert_ran(self) -> None:
        """After a step of the loop: raise where it went around the strategies."""
        edits.assert_ran(causal_lm(self.model))
        if self.carrier is not None and not self.carrier.backwards:
            raise RuntimeError(f"strategy {self.carrier.name}: the loop's first step did not go through it")


def attach(model: nn.Module, strategies: Sequence[Strategy], topology: Topology | None = None) -> Attached:
    """Edit `model` in place, so that `model(...)`, any loss of it and `loss.backward()` train by the strategies."""
    inner: Any = causal_lm(model)
    topology = topology or Topology(device_type=next(model.parameters()).device.type)
    executors = [strategy for strategy in strategies if overrides(strategy, "step")]
    for strategy in executors:
        _refuse_elsewhere(name_of(strategy), model, topology)
    edit(model, strategies, topology)
    attached = Attached(model, strategies, Local(model), SFT())
    try:
        for strategy in executors:
            attached.carrier = _carry(inner, name_of(strategy), attached)
    except BaseException:
        undo(model)
        raise
    return attached


def _refuse_elsewhere(name: str, model: Any, topology: Topology) -> None:
    if topology.world > 1:
        raise Refused(
            f"strategy {name} with {topology.world} processes: it runs the backward itself, and another loop exchanges "
            "gradients in its own: use one process, or ebbtide train"
        )
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning:
        raise Refused(f"strategy {name} with {config.peft_type.value}: it takes no embeddings in the place of tokens")


def _carry(inner: nn.Module, name: str, attached: Attached) -> Carrier:
    step = attached.step
    if not isinstance(step, InHalves):
        raise Refused(f"strategy {name} runs whole steps only: under another loop choose one that only edits")
    backbone = find_backbone(inner, [layer for _, layer in find_layers(inner)])
    if known := vars(backbone).get(_CARRIER):
        assert isinstance(known, Carrier)
        return known
    if WRAPPED in vars(backbone):
        raise Refused(f"strategies {vars(backbone)[WRAPPED].owner} and {name} both run the layers: use one of them")
    step.rehearse(backbone)
    carrier = Carrier(name, step, Context(torch.initial_seed(), 0, 1.0))
    path = next(path for path, part in inner.named_modules() if part is backbone)
    edits.apply(inner, [(name, Wrap(path, CarriedBackbone, {_CARRIER: carrier}))])
    return carrier
