"""The nouns that every package shares: a batch, a step, an engine. See the docstring of each for what it may assume.

Shapes: B rows, T positions. A batch is a dict of tensors:

    input_ids     [B, T]  int64
    labels        [B, T]  int64, aligned with input_ids (not shifted); -100 where a token is not learned
    position_ids  [B, T]  only in packed batches: restarts at 0 with every document
    attention_mask[B, T]  only where a model needs it

and whatever else the objective reads, one value a row ([B]) or a token ([B, T], aligned with input_ids).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distrib.topology import Topology

if TYPE_CHECKING:
    from distrib.engines import Settings
    from distrib.engines.context_parallel import Stripes

Batch = dict[str, Tensor]
IGNORE = -100
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Context:
    """What a step must know beside its micro-batches. `weight` is W of the global batch, over all ranks; `steps` how
    many the run will have, where that is known."""

    seed: int
    step: int
    weight: float
    steps: int | None = None


@dataclass(frozen=True)
class Result:
    """What a step did. `loss` is this rank's share of (objective summed over the global batch) / W; the sum over
    data-parallel ranks is the loss, and ranks that see the same rows have the same share. `tokens` counts the positions
    this rank processed, padding included."""

    loss: Tensor
    tokens: int


@dataclass(frozen=True)
class Window:
    """One rank's part of one global batch. `ids` are the rows that it consumed.

    Fillers, which give every rank as many micro-batches as the others, are in `micro_batches` and nowhere else: not
    in `ids`, not in the counts. `tokens` counts padding, `nonpad_tokens` does not, `loss_tokens` what is learned.
    """

    micro_batches: list[Batch]
    ids: list[int]
    tokens: int
    nonpad_tokens: int
    loss_tokens: int


class Step(Protocol):
    """Runs every forward and backward of one global batch; gradients are left with the engine."""

    def __call__(self, micro_batches: Sequence[Batch], context: Context) -> Result: ...

    def logprobs(self, micro_batches: Sequence[Batch], context: Context) -> list[Tensor]:
        """Log-probability of every labelled token, [B, T] a micro-batch, 0 elsewhere; no graph is kept."""
        ...


@runtime_checkable
class Remembers(Protocol):
    """A step with a state beside the engine's."""

    def state(self) -> dict[str, Any]:
        """As JSON; the same on every rank, and every rank calls it."""
        ...

    def restore(self, kept: Mapping[str, Any]) -> None: ...


class Engine(Protocol):
    """Shards a model and says when gradients cross ranks; nothing else.

    After the last micro-batch every trainable parameter's gradient is the *sum* over ranks of what their losses
    gave it. Nobody but the engine reads `.grad`.
    """

    name: str
    topology: Topology
    settings: Settings
    stripes: Stripes
    """Which positions of its sequences this rank has."""
    module: nn.Module
    """What a step calls. The names of the model's own parameters are those of `model`."""
    model: nn.Module

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward of one micro-batch; gradients cross ranks in the last one."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def gradients(self) -> Iterator[tuple[str, Tensor, str]]:
        """(name, this rank's shard of the gradient, placement) of every trainable parameter. The placement says who
        else has it: no other rank ("shard"), its tensor-parallel group ("tensor"), every rank of its pipeline's stage
        ("replicate"), or the first stage, which answers for it ("copy")."""
        ...

    def step(self, learning_rate: float, max_grad_norm: float | None) -> float:
        """Clip by the true global norm, update the weights, clear the gradients; the norm before clipping."""
        ...

    def zero_grad(self) -> None: ...

    def save(self, create: Callable[[str], Any]) -> None:
        """Write this rank's files, each from its beginning to its end, into what `create` opens by name. Every rank
        calls it."""
        ...

    def load(self, folder: Path) -> None: ...

    def full_state(self) -> dict[str, Tensor]:
        """Trainable parameters and, when nothing is frozen, the whole model: full tensors on the CPU of rank 0,
        an empty dict elsewhere. Every rank calls it."""
        ...


def loss_positions(labels: Tensor) -> Tensor:
    """[B, T] bool: positions whose *next* token is learned; the last position never is."""
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != IGNORE
    return mask


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off, and on again where it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
