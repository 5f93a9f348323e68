"""The gradient that a strategy is held to: the model as it was before its edits, its own logits, ordinary autograd.

Nothing of the head, of the steps or of the strategies takes part, only the weights, the engine and the objective. It
holds the logits of a whole micro-batch, so it is for short sequences.

Shapes: B rows, T positions, V vocabulary, n learned tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distrib.contracts import IGNORE, MODEL_INPUTS, Batch, Context, Engine
from strategies.core.edits import bypassed, parts
from strategies.core.head import router_coefficient
from strategies.core.objectives import Objective, Stats
from strategies.core.steps import seeded

_RANDOM = re.compile("drop|jitter")


def true_gradients(
    engine: Engine, objective: Objective, micro_batches: Sequence[Batch], context: Context, backward: bool = True
) -> Tensor:
    """Leaves the gradients with the engine, as a step does; this rank's share of the loss."""
    losses = []
    with bypassed(engine.model), torch.compiler.set_stance("force_eager"), torch.set_grad_enabled(backward):
        for index, batch in enumerate(micro_batches):
            last = backward and index == len(micro_batches) - 1
            with seeded(context, engine, index), engine.micro_batch(last):
                loss = _objective(engine, objective, batch) / context.weight
                if backward:
                    # All ranks that share these sequences run the whole of them.
                    engine.backward(loss / engine.topology.context)
            losses.append(loss.detach())
    return torch.stack(losses).sum()


def _objective(engine: Engine, objective: Objective, batch: Batch) -> Tensor:
    """Summed over a micro-batch, with the router's loss where the model has one."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    output: Any = engine.module(**inputs, use_cache=False, return_dict=True)
    with torch.autocast(engine.topology.device_type, enabled=False):
        total: Tensor = objective(statistics(output.logits, batch["labels"]), batch)
        # The sum of no logits keeps the graph where nothing is learned: engines wait for every backward.
        total = total + output.logits[:, :0].sum()
    if getattr(output, "aux_loss", None) is not None:
        total = total + router_coefficient(engine.model) * output.aux_loss * objective.weight(batch)
    return total


def statistics(logits_BTV: Tensor, labels_BT: Tensor) -> Stats:
    """All that an objective may ask for, by the textbook."""
    learned_BT = labels_BT != IGNORE
    learned_BT[:, 0] = False
    row_n, column_n = learned_BT.nonzero(as_tuple=True)
    logits_nV = logits_BTV[row_n, column_n - 1]
    logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
    logprob_nV = logits_nV.log_softmax(-1)
    return Stats(
        row_n=row_n,
        token_n=row_n * labels_BT.shape[1] + column_n,
        lengths_B=learned_BT.sum(1),
        logprob_n=logprob_nV.gather(1, labels_BT[row_n, column_n][:, None])[:, 0],
        logsumexp_n=logits_nV.logsumexp(-1),
        entropy_n=-(logprob_nV.exp() * logprob_nV).sum(-1),
        mean_logprob_n=logprob_nV.mean(-1),
    )


@contextmanager
def rounded_otherwise(model: Any, precision: torch.dtype, number: int) -> Iterator[None]:
    """Embeddings that are off by up to the precision, as another order of the same sums would have it."""

    def move(_: nn.Module, __: Any, embedded_BTD: Tensor) -> Tensor:
        noise_BTD = torch.rand(embedded_BTD.shape, generator=generator, dtype=torch.float64) * 2 - 1
        factor_BTD = 1 + torch.finfo(precision).eps * noise_BTD.to(embedded_BTD.device)
        return (embedded_BTD * factor_BTD).to(embedded_BTD.dtype)

    generator = torch.Generator().manual_seed(number)
    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout, but in the mode that training has: a strategy may do something else in evaluation."""
    modules = {id(part): part for part in parts(model)}.values()
    holders: dict[int, Any] = {}
    for module in modules:
        config = vars(module).get("config")
        holders |= {id(holder): holder for holder in (module, config) if hasattr(holder, "__dict__")}
    changed = [
        (holder, name, value)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if isinstance(value, float) and value and (_RANDOM.search(name) or _is_dropout(holder, name))
    ]
    modes = [(module, module.training) for module in modules]
    model.train()
    for holder, name, _ in changed:
        vars(holder)[name] = 0.0
    try:
        yield
    finally:
        for holder, name, value in changed:
            vars(holder)[name] = value
        for module, training in modes:
            module.training = training


def _is_dropout(holder: Any, name: str) -> bool:
    return name == "p" and isinstance(holder, nn.modules.dropout._DropoutNd)
