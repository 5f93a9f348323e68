from __future__ import annotations

from dataclasses import dataclass

from strategies.core.contract import Strategy


@dataclass(frozen=True)
class Plain(Strategy):
    """The model's own forward and backward, every activation kept; only the head works in chunks.

    It is what the other strategies are measured against. Fastest where memory allows; wrong to use where the
    activations of one micro-batch do not fit.
    """

    tensor_parallel = True
    context_parallel = True
