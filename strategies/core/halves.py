"""A step in two halves, for loops that own the head, the loss and the call of `backward`.

Shapes: B rows, T positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from distrib.contracts import Batch, Context


@dataclass(frozen=True)
class Halfway:
    """A forward that is done and the backward that may come: from the gradient of the final hidden states [B, T, D] it
    leaves those of all that is below the head in `.grad`."""

    output: Any
    """The backbone's own kind of output; its hidden states have no graph."""
    backward: Callable[[Tensor], None]


@runtime_checkable
class InHalves(Protocol):
    """A step that can run the part of the model below the head for someone else's loop, in one process."""

    def rehearse(self, backbone: nn.Module) -> None:
        """Refused where this model cannot be run so."""
        ...

    def halfway(self, forward: Callable[..., Any], inputs: Batch, context: Context, micro_batch: int) -> Halfway:
        """`forward` is the backbone's own. Random numbers go on from the caller's."""
        ...
