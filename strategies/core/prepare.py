"""A model made ready for a list of strategies, in place, and the step that trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distrib.contracts import Batch, Context, Engine, Result, Step
from distrib.engines.local import Local
from distrib.errors import Refused, UserError
from distrib.pipeline.record import Timeline
from distrib.topology import Topology
from strategies.core import edits, head
from strategies.core.contract import Strategy, overrides
from strategies.core.edits import Edit, NoMatch
from strategies.core.objectives import SFT, Objective
from strategies.core.packing import is_packed, refuse_leaks
from strategies.core.registry import check, name_of, staged
from strategies.core.steps import PlainStep

Batches = Batch | Sequence[Batch]

_PREPARED = "_ebbtide_strategies"


def causal_lm(model: Any) -> nn.Module:
    """The model that edits are named in: without PEFT around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert isinstance(inner, nn.Module)
    return inner


def edit(model: nn.Module, strategies: Sequence[Strategy], topology: Topology | None = None) -> None:
    """Check the strategies and apply their edits and the head's, on a model that is not sharded yet (it may
    be on the meta device). With the same strategies a second time it changes nothing; with others it is
    refused."""
    topology = topology or Topology()
    inner: Any = causal_lm(model)
    earlier = vars(inner).get(_PREPARED)
    if earlier == tuple(strategies):
        return
    if earlier is not None:
        raise Refused(f"the model is already prepared for {', '.join(map(name_of, earlier))}: undo that first")
    check(strategies, inner.config, topology)
    if topology != staged(strategies, topology):
        wanted = staged(strategies, topology).stages
        raise Refused(
            f"a pipeline over {wanted} of {topology.world} ranks: give model and engine strategies.staged(...)"
        )
    edits.apply(
        inner, [(name_of(strategy), drop) for strategy in strategies for drop in strategy.drops(inner, topology)]
    )
    try:
        edits.apply(inner, _edits(inner, strategies, topology))
    except BaseException:
        edits.undo(inner)
        raise
    vars(inner)[_PREPARED] = tuple(strategies)


def _edits(inner: nn.Module, strategies: Sequence[Strategy], topology: Topology) -> list[tuple[str, Edit]]:
    owned: list[tuple[str, Edit]] = [(head.OWNER, wrap) for wrap in head.edits(inner)]
    for strategy in strategies:
        own = list(strategy.edits(inner, topology))
        if overrides(strategy, "edits") and not own:
            raise NoMatch(f"strategy {name_of(strategy)} found nothing to change in {type(inner).__name__}")
        owned += [(name_of(strategy), change) for change in own]
    return owned


def undo(model: nn.Module) -> None:
    """The model as it was before `edit`."""
    inner = causal_lm(model)
    edits.undo(inner)
    vars(inner).pop(_PREPARED, None)


def prepare(
    model: nn.Module,
    strategies: Sequence[Strategy],
    objective: Objective | None = None,
    engine: Engine | None = None,
) -> Prepared:
    """Edit `model` in place and return its step.

    Without an engine the model trains as it is, in this process. An engine's model was edited before it was
    sharded: `edit` first, then the engine, then this.
    """
    if engine is not None and _PREPARED not in vars(causal_lm(model)):
        raise Refused("the model was sharded before its edits: call strategies.edit before making the engine")
    edit(model, strategies, None if engine is None else engine.topology)
    objective = SFT() if objective is None else objective
    engine = Local(model) if engine is None else engine
    return Prepared(model, strategies, engine, objective)


@runtime_checkable
class Accountable(Protocol):
    """A step with something to say for the run's report; every rank calls it."""

    def account(self) -> dict[str, Any]: ...

    def timeline(self, step: int) -> Timeline | None: ...


class Prepared:
    """A step for anyone's loop: takes one batch or the micro-batches of a global batch, with or without
    context."""

    def __init__(self, model: nn.Module, strategies: Sequence[Strategy], engine: Engine, objective: Objective) -> None:
        supplied = [step for strategy in strategies if (step := strategy.step(model, engine, objective)) is not None]
        self.model = model
        self.strategies = strategies
        self.step: Step = supplied[0] if supplied else _default(model, engine, objective)
        self.engine = engine
        self.objective = objective
        self._calls = 0
        self._packing_seen = False
        self._sharing_seen = engine.topology.context == 1

    def __call__(self, micro_batches: Batches, context: Context | None = None) -> Result:
        batches = _listed(micro_batches)
        if not self._packing_seen and self._packed(batches):
            inner: Any = causal_lm(self.model)
            name, vocabulary = type(inner).__name__, inner.config.vocab_size
            refuse_leaks(self.step, self.engine.module, name, vocabulary, batches[0])
            self._packing_seen = True
        if not self._sharing_seen:
            from strategies.streaming.unshared import refuse_unlike

            refuse_unlike(self.step, self.engine, causal_lm(self.model))
            self._sharing_seen = True
        context = context or self._context(batches)
        with self.running(context):
            result = self.step(batches, context)
        if self._calls == 0:
            edits.assert_ran(causal_lm(self.model))
        self._calls += 1
        return result

    @contextmanager
    def running(self, context: Context) -> Iterator[None]:
        """Around a step: what every strategy wants there."""
        with ExitStack() as stack:
            for strategy in self.strategies:
                stack.enter_context(strategy.running(causal_lm(self.model), context))
            yield

    def logprobs(self, micro_batches: Batches, context: Context | None = None) -> list[Tensor]:
        batches = _listed(micro_batches)
        return self.step.logprobs(batches, context or Context(torch.initial_seed(), self._calls, 1.0))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of the strategies, by name."""
        model = causal_lm(self.model)
        kept = {name_of(strategy): strategy.state(model) for strategy in self.strategies}
        return {name: state for name, state in kept.items() if state}

    def restore(self, kept: Mapping[str, Any]) -> None:
        for strategy in self.strategies:
            strategy.restore(causal_lm(self.model), kept.get(name_of(strategy), {}))

    def accounts(self) -> dict[str, Any]:
        """What each strategy has to say of what it did, by name; every rank calls it."""
        model = causal_lm(self.model)
        said = {name_of(strategy): strategy.account(model) for strategy in self.strategies}
        if isinstance(self.step, Accountable):
            supplier = next(strategy for strategy in self.strategies if overrides(strategy, "step"))
            said[name_of(supplier)] = self.step.account()
        return {name: account for name, account in said.items() if account is not None}

    def timeline(self, step: int) -> Timeline | None:
        """When the operations of the latest step, which has this number, ran on every rank; every rank calls it."""
        return self.step.timeline(step) if isinstance(self.step, Accountable) else None

    def _packed(self, batches: Sequence[Batch]) -> bool:
        # Ranks must agree without asking each other, and one of them may have single documents only.
        several = self.engine.topology.world > 1
        return any("position_ids" in batch and (several or is_packed(batch)) for batch in batches)

    def undo(self) -> None:
        undo(self.model)

    @contextmanager
    def under(self, strategies: Sequence[Strategy]) -> Iterator[Prepared]:
        """A step of the same edited model with other settings of the same strategies: a smaller chunk, say. Those whose
        edits cannot take them on keep their own, as `strategies` of what is yielded says."""
        inner = causal_lm(self.model)
        with ExitStack() as stack:
            taken = list(self.strategies)
            for index, (old, new) in enumerate(zip(self.strategies, strategies, strict=True)):
                if old == new:
                    continue
                own = list(new.edits(inner, self.engine.topology))
                if stack.enter_context(edits.resettled(inner, name_of(new), own)):
                    taken[index] = new
            yield self if taken == list(self.strategies) else Prepared(self.model, taken, self.engine, self.objective)

    def _context(self, batches: Sequence[Batch]) -> Context:
        if self.engine.topology.world > 1:
            raise UserError("a step over several ranks needs a Context: W is a sum over all of them")
        weight = sum(self.objective.weight(batch) for batch in batches)
        if weight == 0:
            raise UserError("no loss tokens: every label of the global batch is -100")
        return Context(torch.initial_seed(), self._calls, weight)


def _default(model: nn.Module, engine: Engine, objective: Objective) -> Step:
    if engine.topology.context == 1:
        return PlainStep(engine, objective)
    from strategies.streaming.shared_step import SharedStep

    return SharedStep(model, engine, objective)


def _listed(micro_batches: Batches) -> Sequence[Batch]:
    return [micro_batches] if isinstance(micro_batches, dict) else micro_batches
