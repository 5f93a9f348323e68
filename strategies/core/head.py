"""The head as two wraps: hidden states in, a loss out, and never the logits of more than one chunk.

The wrapped model's forward takes `labels` (or `shift_labels`), an `objective`, its `extras` (whatever else
the objective reads, one entry a row or a token) and `weight`, the W to divide by; it returns the class's own
output with `loss` and logits that are formed when they are read. Without labels it is the model's own forward.
`num_items_in_batch`, which HF Trainer passes, is W too. W defaults to the batch's own weight, a mean over the
batch.

A mixture of experts that is asked for router logits adds coefficient * (its auxiliary loss over this batch) *
(weight of this batch / W): the auxiliary loss is not a sum over tokens and is defined per micro-batch.

Limits: the head is exactly nn.Linear; float16 is refused, as gradients of 1/W underflow in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distrib.contracts import IGNORE
from distrib.errors import Refused
from strategies.core.edits import WRAPPED, Elsewhere, Wrap, original_class
from strategies.core.lazy_logits import REQUEST, LazyLogits, Reading, lazy_logits
from strategies.core.logit_map import is_identity, logit_map
from strategies.core.objectives import SFT, Objective, Stats, learned
from strategies.core.passes import run
from strategies.core.statistics import Tokens, Work

OWNER = "the head"


@dataclass
class Request:
    """What the model's forward asks of its head, and the answer."""

    tokens: Tokens
    positions: torch.Size
    objective: Objective
    batch: Mapping[str, Tensor]
    scale: float | Tensor
    model: nn.Module
    loss: Tensor | None = None
    logits: Callable[[Tensor], LazyLogits] | None = None
    """Made of the width-zero logits, once the model has passed them on."""

    def terms(self, stats: Stats) -> Tensor:
        return self.objective(stats, self.batch) * self.scale

    def answer(self, head: Any, hidden_BTD: Tensor) -> Tensor:
        if hidden_BTD.shape[:-1] != self.positions:
            given, found = list(self.positions), list(hidden_BTD.shape[:-1])
            raise ValueError(f"labels {given} do not match the hidden states {found}")
        # What the passes read of the module is its live weight, under any engine.
        identity = self.model._ebbtide_identity
        work = Work(
            tokens=self.tokens,
            names=("logprob", *sorted(self.objective.needs)),
            logit_map=None if identity else logit_map(self.model, _output_head(self.model)),
            matmul_dtype=_matmul_dtype(hidden_BTD),
            head=head,
        )
        self.loss, empty_BT0 = run(work, self.terms, self.objective.separable, hidden_BTD)
        self.logits = lazy_logits(hidden_BTD, head, work.logit_map)
        # The model's own forward may change their precision, and takes it from here.
        return empty_BT0.to(work.matmul_dtype)


def edits(model: nn.Module) -> Iterator[Wrap]:
    """The two wraps, for a causal language model before it is sharded. Refused where they would not be
    exact."""
    outer = _output_head(model)
    if isinstance(outer, Elsewhere):
        yield Wrap("", CausalLM, {"_ebbtide_identity": True}, must_run=False)
        return
    heads = _candidates(outer)
    for head in heads:
        if original_class(head) is not nn.Linear:
            raise Refused(f"the output head is {_kind(head)}: only a plain nn.Linear is exact (take LoRA off the head)")
    names = {id(module): name for name, module in model.named_modules()}
    settings = {"_ebbtide_identity": is_identity(model, outer, heads[0].out_features)}
    yield Wrap("", CausalLM, settings, must_run=False)
    for head in heads:
        yield Wrap(names[id(head)], OutputHead, must_run=False)


def _output_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise Refused(f"{type(model).__name__} has no output head: only causal language models are supported")
    return head


def _candidates(head: Any) -> list[Any]:
    """The head, or each of the copies that PEFT's `modules_to_save` keeps of it."""
    if hasattr(head, "modules_to_save"):
        return [head.original_module, *head.modules_to_save.values()]
    return [head]


def _live(head: Any) -> Any:
    if not hasattr(head, "modules_to_save"):
        return head
    return head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__.partition('.')[0]}'s {type(module).__name__}"


def find_tokens(labels: Tensor | None, shift_labels: Tensor | None) -> Tokens:
    """Positions, targets and owners of the learned tokens; positions are those *before* a learned token."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        ahead = 1
    else:
        ahead = 0
    learned_BT = shift_labels != IGNORE
    position_n = learned_BT.reshape(-1).nonzero()[:, 0]
    return Tokens(
        position_n=position_n,
        target_n=shift_labels.reshape(-1)[position_n],
        row_n=position_n // shift_labels.shape[1],
        token_n=position_n + ahead,
        lengths_B=learned_BT.sum(1),
    )


class OutputHead:
    """Mixed into the head: answers a request once, and is the plain head otherwise."""

    def forward(self: Any, hidden_BTD: Tensor) -> Tensor:
        request = vars(self).pop(REQUEST, None)
        if isinstance(request, Request):
            return request.answer(self, hidden_BTD)
        if isinstance(request, Reading):
            request.check(self)
        return super().forward(hidden_BTD)  # type: ignore[misc, no-any-return]


def _matmul_dtype(hidden_BTD: Tensor) -> torch.dtype:
    kind, dtype = hidden_BTD.device.type, hidden_BTD.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise Refused("float16: gradients underflow in it; use bfloat16 or float32")
    return dtype


class CausalLM:
    """Mixed into the causal language model: turns labels into a request to the head."""

    # HF Trainer: the loss is divided by the number of items it passes, so it must not divide again.
    accepts_loss_kwargs = True

    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        objective: Objective | None = None,
        extras: Mapping[str, Tensor] | None = None,
        weight: float | Tensor | None = None,
        hidden_only: bool = False,
        num_items_in_batch: float | Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        forward: Any = super().forward  # type: ignore[misc]
        if hidden_only:
            return self.base_model(*args, use_cache=False, return_dict=True, **kwargs).last_hidden_state
        if labels is None and shift_labels is None:
            return forward(*args, **kwargs, **({} if return_dict is None else {"return_dict": return_dict}))
        objective = SFT() if objective is None else objective
        given = {"labels": labels, "shift_labels": shift_labels, **(extras or {})}
        batch = {name: value for name, value in given.items() if value is not None}
        total = weight if weight is not None else num_items_in_batch
        scale = _inverse(objective.weight(batch) if total is None else total)
        request = Request(find_tokens(labels, shift_labels), learned(batch).shape, objective, batch, scale, self)
        # A cache is of no use to a loss, and with one Transformers does not separate packed documents.
        kwargs.setdefault("use_cache", False)
        loss, output = _ask(self, request, lambda: forward(*args, return_dict=True, **kwargs))
        if getattr(output, "aux_loss", None) is not None:
            share = objective.weight(batch) * scale
            loss = loss + router_coefficient(self) * output.aux_loss * share
        assert request.logits is not None
        output = type(output)(**{**output, "loss": loss, "logits": request.logits(output.logits)})
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def _inverse(total: float | Tensor) -> float | Tensor:
    """1 / W; 0 when nothing is learned anywhere, so that an empty batch costs nothing."""
    if isinstance(total, Tensor):
        # As float64 it takes part in products without changing their precision, or losing any.
        exact = total.double()
        return torch.where(exact > 0, 1 / exact, 0.0)
    return 1 / total if total > 0 else 0.0


def _ask(model: nn.Module, request: Request, forward: Any) -> tuple[Tensor, Any]:
    head = _live(_output_head(model))
    if WRAPPED not in vars(head):
        raise Refused(f"the output head became {_kind(head)} after `prepare`: only a plain nn.Linear is exact")
    vars(head)[REQUEST] = request
    try:
        output = forward()
    finally:
        vars(head).pop(REQUEST, None)
    if request.loss is None:
        raise RuntimeError(f"{type(model).__name__} made its logits without calling its head; the loss is not known")
    return request.loss + output.logits.sum(), output


def router_coefficient(model: Any) -> float:
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        for holder in (model, model.config):
            if hasattr(holder, name):
                return float(getattr(holder, name))
    raise Refused(f"{type(model).__name__} has an auxiliary loss but no router_aux_loss_coef")
