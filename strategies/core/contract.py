"""What a strategy is, and what it promises."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from distrib.contracts import Context, Engine, Step
from distrib.topology import Topology

if TYPE_CHECKING:
    from strategies.core.edits import Drop, Edit
    from strategies.core.objectives import Objective


class Fidelity(Enum):
    """How a strategy's gradients relate to the true ones."""

    EXACT = "to rounding"
    UNBIASED = "in expectation"
    APPROXIMATE = "within a stated, tested bound"


class Claim(Enum):
    """What one strategy of a run does at most."""

    LAYERS = "run the layers in their own way"
    CHUNKS = "cut the sequence into chunks"
    LINEARS = "round what linears multiply"
    ACTIVATIONS = "replace the backward of activation functions"


@dataclass(frozen=True)
class Strategy:
    """How gradients are computed. The fields of a subclass are its section of the recipe.

    A subclass overrides `edits` (it changes modules, and plain `loss.backward()` stays right) or `step` (it
    runs the forwards and backwards itself; one strategy of a run may). Its docstring says the idea, the
    paper, what it costs and where it is wrong to use. It never reads the recipe, the command line or the
    environment.
    """

    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    exact_with: ClassVar[Mapping[str, Any]] = {}
    """For a strategy that is not exact: fields under which it is, so that everything but the estimate is tested."""
    bound: ClassVar[float | None] = None
    """For an approximation: the most that its mean gradient is off, relative to the gradient; of every parameter."""
    own_forward: ClassVar[bool] = False
    """Whether it computes another function than the model. Its gradients are then held to those of that function, which
    its edits have as `true_forward`."""
    compiles: ClassVar[bool] = True
    """Whether it is right with blocks that torch.compile compiled."""
    tensor_parallel: ClassVar[bool] = False
    """Whether it is right in blocks of which each rank computes a part, with a part of the sequence between them."""
    context_parallel: ClassVar[bool] = False
    """Whether it is right where each rank has some positions of every sequence."""
    claims: ClassVar[frozenset[Claim]] = frozenset()
    """What it has to itself: two that claim the same are refused before a model shows that they are in conflict."""

    @property
    def noise(self) -> float:
        """For an estimate: about its standard deviation on one sequence, relative to the gradient. A few draws of a
        rare event show none of it."""
        return 0.0

    @property
    def sized(self) -> bool:
        """Whether it may refuse a batch for its size: then the largest is run without data before anything is built."""
        return False

    def pipeline(self, world: int) -> int:
        """How many ranks, of so many, hold a model's layers one after the other."""
        return 1

    def check(self, config: Any, topology: Topology) -> None:
        """Raise Refused when this strategy cannot serve a model of this configuration; no weights exist
        yet."""

    def drops(self, model: nn.Module, topology: Topology) -> Iterable[Drop]:
        """What other ranks hold of the model. It is gone before any strategy is asked for its edits."""
        return ()

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        """The changes to the causal language model, named as in `model.named_modules()`. Overriding it and
        yielding nothing is an error: a strategy without effect must not look like one that works."""
        return ()

    def step(self, model: nn.Module, engine: Engine, objective: Objective) -> Step | None:
        """What runs a global batch, or None for plain forward and backward."""
        return None

    @contextmanager
    def running(self, model: nn.Module, context: Context) -> Iterator[None]:
        """Around every step."""
        yield

    def state(self, model: nn.Module) -> dict[str, Any]:
        """What a checkpoint must keep of it, as JSON; the same on every rank."""
        return {}

    def restore(self, model: nn.Module, state: dict[str, Any]) -> None:
        """What `state` gave."""

    def account(self, model: nn.Module) -> dict[str, Any] | None:
        """What it did to this model and what that cost, for the run's report; None when there is nothing to say. Every
        rank calls it."""
        return None


def is_exact(strategy: Strategy) -> bool:
    """By its kind, or with the fields that it has."""
    fields = strategy.exact_with
    as_asked = bool(fields) and all(getattr(strategy, name) == value for name, value in fields.items())
    return strategy.fidelity is Fidelity.EXACT or as_asked


def overrides(strategy: Strategy, method: str) -> bool:
    return getattr(type(strategy), method) is not getattr(Strategy, method)
