"""What a comparison names: strategies with their fields, and three ways to train that are no strategies.

streambp                             a strategy, with the fields that the recipe gives it
streambp:chunk=1024:offload=true     with these fields; `name:field=value:field=value`
streambp+other                       several together
hf                                   the model as Transformers has it, all logits at once
gc                                   the same with Transformers' gradient checkpointing (non-reentrant)
gc+ce                                that checkpointing under the chunked head of `plain`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distrib.errors import Refused, UserError
from launch.strict_yaml import parse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distrib.contracts import Batch, Context, Engine, Result
    from distrib.topology import Topology
    from launch.recipe import Recipe
    from strategies import Objective, Prepared, Strategy

BASELINES = {
    "hf": "the model as Transformers has it, with all logits at once",
    "gc": "Transformers' gradient checkpointing, with all logits at once",
    "gc+ce": "Transformers' gradient checkpointing, with the chunked head of plain",
}
WHOLE_LOGITS = ("hf", "gc")
OUTSIDE = r"(?![^\[{]*[\]}])"
"""Not inside a field's brackets."""


def sides_of(text: str) -> list[str]:
    """Sides divided by commas, except those inside a field's brackets."""
    return re.split("," + OUTSIDE, text)


def section(side: str) -> dict[str, Any]:
    """`name:field=value:field=value` as a recipe's section."""
    name, *fields = re.split(":" + OUTSIDE, side)
    found: dict[str, Any] = {"name": name}
    for field in fields:
        key, equals, value = field.partition("=")
        if not equals:
            raise UserError(f"{side!r}: {field!r} is no field; write name:field=value:field=value")
        found[key] = parse(value, f"{name}:{key}")
    return found


def default_sides(recipe: Recipe) -> list[str]:
    """Every strategy there is, the recipe's own where it is several together, and the baselines of checkpointing."""
    import strategies

    own = "+".join(given.name for given in recipe.strategy)
    return [*strategies.names(), *([own] if len(recipe.strategy) > 1 else []), "gc", "gc+ce"]


def sections(side: str, recipe: Recipe | None = None) -> list[dict[str, Any]]:
    """The side as a recipe's `strategy`, none where the logits are whole. A bare name has the recipe's fields."""
    if side in WHOLE_LOGITS:
        return []
    known = {given.name: given.model_dump() for given in recipe.strategy} if recipe else {}
    parts = re.split(r"\+(?=[a-z_])", "plain" if side == "gc+ce" else side)
    return [known.get(part) or section(part) for part in parts]


def side_of(sections: Sequence[dict[str, Any]]) -> str:
    """A recipe's `strategy` as a side."""
    return "+".join(":".join([section["name"], *_fields(section)]) for section in sections)


def _fields(section: dict[str, Any]) -> list[str]:
    return [f"{key}={_written(value)}" for key, value in section.items() if key != "name"]


def _written(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n").removesuffix("\n...")


def strategies_of(side: str) -> list[Strategy]:
    import strategies

    return strategies.build(sections(side))


def edit(side: str, model: nn.Module, topology: Topology | None = None) -> None:
    """The side's changes to a model that is not sharded yet."""
    import strategies

    if side in WHOLE_LOGITS and topology and topology.context > 1:
        raise Refused(f"engine.context_parallel={topology.context} with {side}: its logits are of whole sequences")
    if side in BASELINES and side != "hf":
        inner: Any = model
        # The name before Transformers 5.2x is the second one.
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if side not in WHOLE_LOGITS:
        strategies.edit(model, strategies_of(side), topology)


def prepare(side: str, model: nn.Module, objective: Objective | None = None, engine: Engine | None = None) -> Prepared:
    """The side's step, as `strategies.prepare` makes a strategy's. An engine's model went through `edit` before."""
    import strategies
    from distrib.engines.local import Local

    if engine is None:
        edit(side, model)
    if side not in WHOLE_LOGITS:
        return strategies.prepare(model, strategies_of(side), objective, engine)
    objective = strategies.SFT() if objective is None else objective
    if objective != strategies.SFT():
        raise UserError(f"{side}: it has Transformers' own loss; only objective=sft without further terms is that")
    engine = Local(model) if engine is None else engine
    prepared = strategies.Prepared(model, [], engine, objective)
    prepared.step = WholeLogits(engine)
    return prepared


class WholeLogits:
    """Forward and backward under the model's own loss, which holds the logits of a whole micro-batch."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, micro_batches: Sequence[Batch], context: Context) -> Result:
        import torch

        from distrib.contracts import Result
        from strategies.core.steps import seeded

        losses, tokens = [], 0
        for index, batch in enumerate(micro_batches):
            with seeded(context, self.engine, index), self.engine.micro_batch(index == len(micro_batches) - 1):
                loss = self.engine.module(**batch, num_items_in_batch=context.weight, use_cache=False).loss
                self.engine.backward(loss)
            losses.append(loss.detach())
            tokens += batch["input_ids"].numel()
        return Result(loss=torch.stack(losses).sum(), tokens=tokens)

    def logprobs(self, micro_batches: Sequence[Batch], context: Context) -> list[Tensor]:
        raise UserError("hf and gc train sft only: log-probabilities are asked of a strategy")
