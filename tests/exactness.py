"""A strategy under an engine on two ranks, held to autograd on each document alone."""

from __future__ import annotations

from typing import Any

import torch
from contract import reference
from ranks import Ranks
from streaming_cases import Case, Found, recipe, truth
from torch import Tensor
from train_cases import ENGINES

from distrib.contracts import IGNORE, Batch


def precision(engine: str) -> tuple[torch.dtype, float, float]:
    """The weights' type, and the bounds for the worst parameter and for all of them."""
    # DeepSpeed reduces in float32 whatever it is given.
    return (torch.float32, 2e-6, 1e-6) if engine.startswith("zero") else (torch.float64, 1e-12, 1e-12)


def learned(per_rank: list[list[Batch]]) -> float:
    return float(sum((batch["labels"][:, 1:] != IGNORE).sum() for batches in per_rank for batch in batches))


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, float]:
    """Of the worst parameter and of all, relative, by norm."""
    assert found.keys() == wanted.keys()
    errors = torch.stack([(found[name].double() - gradient).norm() for name, gradient in wanted.items()])
    norms = torch.stack([gradient.norm() for gradient in wanted.values()])
    return float((errors / norms).max()), float(errors.norm() / norms.norm())


def same(found: list[Found], loss: Tensor, gradients: dict[str, Tensor], engine: str, copies: int = 1) -> None:
    """Every rank has the gradients, and the losses of ranks with other rows add up."""
    _, worst, overall = precision(engine)
    for one in found:
        by_worst, by_all = differences(one.gradients, gradients)
        assert by_worst < worst
        assert by_all < overall
    total = sum(float(one.loss) for one in found[::copies])
    assert abs(total - float(loss)) < max(overall, 1e-12) * abs(float(loss))


def case(engine: str, strategy: str, per_rank: list[list[Batch]], **changes: Any) -> Case:
    model = {name: changes.pop(name) for name in ("lora_r", "config_overrides", "bf16") if name in changes}
    dtype = changes.pop("dtype", precision(engine)[0])
    weight = changes.pop("weight", None) or learned(per_rank)
    section = ENGINES[engine] | {"context_parallel": changes.pop("context_parallel", 1)}
    return Case(recipe(engine=section, **model), dtype, per_rank, weight, strategy, **changes)


def is_exact(two_ranks: Ranks, asked: Case, engine: str, loss: reference.Loss = reference.sft) -> None:
    found = two_ranks("streaming_cases:run", asked)
    wanted = truth(asked, loss)
    copies = asked.recipe.engine.copies
    same(found, wanted.loss, wanted.gradients, engine, copies)
    logprobs = [x for one in found[::copies] for x in one.logprobs]
    for one, right in zip(logprobs, wanted.logprobs, strict=True):
        assert one.shape == right.shape
        assert (one - right).abs().max() <= precision(engine)[1] * max(float(right.abs().max()), 1)
