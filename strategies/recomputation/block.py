"""The layers of a model under a policy: what they share, and the mixin that takes each call down."""

from __future__ import annotations

import hashlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from distrib.errors import Refused
from strategies.core.checkpointing import RecomputesItself
from strategies.recomputation.account import MIB, Account
from strategies.recomputation.choice import least, spread
from strategies.recomputation.cost import NOTHING, Study, study
from strategies.recomputation.operators import flat
from strategies.recomputation.policies import RULES, Rules, policy_of
from strategies.recomputation.tape import (
    NONE,
    Kept,
    Key,
    Operation,
    Policy,
    Reference,
    Result,
    Tape,
    reached,
    unpack,
)
from strategies.streaming.offload import Away, Shelf

UNIT = "_ebbtide_recompute"
ASKED = "asked"
LEAST_BYTES = 1 << 16
"""What is smaller is not worth a journey to host memory."""


@dataclass
class Recomputation:
    """What the layers of one model share."""

    rules: Rules
    every: int
    budget: float | int | None
    """Bytes, or a share of what plain training holds. With one, operators are chosen and `rules` say nothing."""
    offload: bool
    quiet: bool
    kinds: tuple[str, ...]
    """Of each layer: those of one kind cost the same."""
    shelf: Shelf = field(default_factory=Shelf)
    longest: tuple[int, int] = (0, 0)
    """Tokens, and tokens of a row, of the batch that the choice was made for."""
    studies: dict[str, Study] = field(default_factory=dict)
    chosen: list[frozenset[Key]] | None = None
    account: Account | None = None
    tokens: int = 0
    """Of this forward."""
    trip: Trip | None = None
    on_gpu: bool = False

    def begin(self, hidden_BTD: Tensor) -> None:
        """A forward. For a larger batch than any before a choice is made anew."""
        account = self.account
        if account is not None and account.measured and not account.closed:
            account.close()
            self._say(str(account))
        tokens = hidden_BTD.shape[:-1].numel(), hidden_BTD.shape[-2]
        larger = tokens[0] > self.longest[0] or tokens[1] > self.longest[1]
        if larger and (self.budget is not None or not self.longest[0]):
            self.longest = max(tokens[0], self.longest[0]), max(tokens[1], self.longest[1])
            self.studies, self.chosen, self.account = {}, None, None
        self.tokens, self.trip, self.on_gpu = tokens[0], None, hidden_BTD.is_cuda

    def learn(self, kind: str, study: Study) -> None:
        self.studies[kind] = study
        if study.wrong:
            where = ", ".join(sorted({path or "the layer itself" for path, _, _ in study.wrong}))
            self._say(f"what {where} makes is kept: kernels that PyTorch does not see write there")

    def settle(self) -> None:
        """After the first forward of its size: what runs again in each layer from now on."""
        studies = [self.studies[kind] for kind in self.kinds]
        if self.budget is None:
            self.chosen = [s.picked(ASKED) if self._concerns(index) else NOTHING for index, s in enumerate(studies)]
            self._say_what_finds_nothing()
        else:
            plain = sum(study.costs(NOTHING).nbytes for study in studies)
            budget = self.budget if isinstance(self.budget, int) else self.budget * plain
            options = spread(self.studies, self.kinds, budget)
            if options is None:
                raise self._unmet(budget, plain)
            self.chosen = [option.again for option in options]
        self.account = Account.of(studies, self.chosen, self.longest[0])

    def policy(self, index: int, names: Mapping[int, set[str]]) -> Policy:
        study = self.studies.get(self.kinds[index])
        wrong = study.wrong if study else NOTHING
        asked = self._asked(index, names)
        return lambda operation: NONE if operation.key in wrong else asked(operation)

    def _asked(self, index: int, names: Mapping[int, set[str]]) -> Policy:
        if self.budget is None:
            return policy_of(self.rules, names) if self._concerns(index) else lambda operation: NONE
        if self.chosen is None:
            return lambda operation: frozenset({"full"})
        again = self.chosen[index]
        return lambda operation: frozenset({ASKED}) if operation.key in again else NONE

    def _concerns(self, index: int) -> bool:
        return index % self.every == 0

    def _unmet(self, budget: float, plain: int) -> Refused:
        smallest = least(self.studies, self.kinds)
        given = f"{self.budget}" if isinstance(self.budget, float) else f"{budget / MIB:.0f}MiB"
        enough = f"{smallest / plain + 5e-4:.3f}" if isinstance(self.budget, float) else f"{-(-smallest // MIB)}MiB"
        return Refused(
            f"budget={given}: with everything run again, {self.longest[0]} tokens still hold "
            f"{smallest / MIB:.1f} MiB of layer inputs; set it to {enough} or more"
        )

    def _say_what_finds_nothing(self) -> None:
        for name in sorted({name for names in self.rules.values() for name in names} - {"none", "full"}):
            if not any(study.picked(name) for study in self.studies.values()):
                why = " (it is one operator, which keeps no scores)" if name == "attention" else ""
                self._say(f"policy {name!r} finds nothing to run again{why}")

    def _say(self, line: str) -> None:
        if not self.quiet:
            print(f"recompute: {line}", file=sys.stderr)


@dataclass
class Unit:
    """One layer's place among the others; `name` in the base model."""

    shared: Recomputation
    index: int
    name: str


def kind_of(layer: nn.Module, name: str, rules: Rules) -> str:
    """The same for layers that compute alike and under the same rules."""
    named = [(path, pattern) for path, _ in layer.named_modules() for pattern in patterns(f"{name}.{path}", rules)]
    numbers = [
        (path, type(module).__name__, name, value)
        for path, module in layer.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, int | float | str) and name not in ("training", "layer_idx")
    ]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()]
    return hashlib.sha256(repr((sorted(named), numbers, shapes)).encode()).hexdigest()


class RecomputedBlock(RecomputesItself):
    """Mixed into a layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        unit: Unit = vars(self)[UNIT]
        shared = unit.shared
        hidden_BTD = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if unit.index == 0:
            shared.begin(hidden_BTD)
        account, chosen = shared.account, shared.chosen
        if account and account.closed and chosen and not chosen[unit.index] and not shared.offload:
            return forward(*args, **kwargs)
        outcome = _taken_down(self, unit, partial(forward, *args, **kwargs), hidden_BTD)
        if unit.index == len(shared.kinds) - 1 and shared.chosen is None and set(shared.kinds) <= shared.studies.keys():
            shared.settle()
        return outcome


def _taken_down(layer: nn.Module, unit: Unit, forward: Callable[[], Any], hidden_BTD: Tensor) -> Any:
    shared = unit.shared
    kind = shared.kinds[unit.index]
    unseen = shared.chosen is None and kind not in shared.studies
    paths = {id(module): path for path, module in layer.named_modules()}
    names = {key: patterns(f"{unit.name}.{path}", shared.rules) for key, path in paths.items()}
    policy = shared.policy(unit.index, names)
    modules = [layer]
    tape = Tape(_everything(policy_of(shared.rules, names)) if unseen else policy, modules, paths, watch=unseen)
    tape.count_in(hidden_BTD)
    shared.trip = trip = Trip(shared.trip)
    with following(modules), saved_tensors_hooks(tape.pack, partial(_take_back, shared, trip)), tape:
        outcome = forward()
    if unseen:
        shared.learn(kind, study(tape))
        return outcome
    waiting = [place for place in reached(tape.saved) if isinstance(place, Kept) and place.activation]
    if (account := shared.account) and not account.measured and 2 * shared.tokens > account.tokens:
        account.note(unit.index, shared.tokens, sum(place.nbytes for place in waiting))
    if shared.offload:
        trip.put_away((place for place in waiting if place.nbytes >= LEAST_BYTES), shared.shelf)
    return outcome


def patterns(name: str, rules: Rules) -> set[str]:
    return {pattern for pattern in rules if fnmatchcase(name.rstrip("."), pattern)}


def _everything(asked: Policy) -> Policy:
    """Every operator, under all the policies that would pick it."""

    def policy(operation: Operation) -> frozenset[str]:
        named = {name for name, rule in RULES.items() if rule(operation)}
        return frozenset(named | {ASKED} if asked(operation) else named)

    return policy


@contextmanager
def following(modules: list[nn.Module]) -> Iterator[None]:
    """Keeps the modules whose forward is running, outermost first."""

    def enter(module: nn.Module, _: Any) -> None:
        modules.append(module)

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        modules.pop()

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Trip:
    """What one layer has put away. The first of it that is asked for sends for the layer's before, which is next."""

    def __init__(self, previous: Trip | None) -> None:
        self._previous = previous
        self._away: list[weakref.ref[Kept]] = []

    def put_away(self, waiting: Iterator[Kept], shelf: Shelf) -> None:
        for kept in waiting:
            if isinstance(kept.tensor, Tensor):
                kept.tensor = shelf.put(flat(kept.tensor))
                self._away.append(weakref.ref(kept))

    def fetch_previous(self) -> None:
        previous, self._previous = self._previous, None
        for reference in previous._away if previous else ():
            kept = reference()
            if kept is not None and isinstance(kept.tensor, Away):
                kept.tensor.prefetch()


def _take_back(shared: Recomputation, trip: Trip, packed: Any) -> Tensor:
    trip.fetch_previous()
    account = shared.account
    if account is None or account.closed or not account.measured or not isinstance(packed, Reference):
        return unpack(packed)
    if not isinstance(packed.place, Result):
        return unpack(packed)
    with account.timing(shared.on_gpu):
        return unpack(packed)
