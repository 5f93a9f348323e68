"""A whole model run over a sequence in chunks: one chunk's graph is alive, keys and values carry the rest.

First the chunks go left to right without a graph, which records every layer's keys and values. Then they go right
to left: each is run again with a graph, its loss is taken by the model's own head, and its backward leaves on the
keys and values of earlier chunks what it owes to them (2505.16710). The last chunk needs no first run.

Shapes: B rows, T positions of the sequence, C of a chunk, n learned tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from distrib.contracts import IGNORE
from strategies.core.objectives import Objective, Stats
from strategies.streaming.draws import Taken
from strategies.streaming.implementation import using_attention
from strategies.streaming.replay import random_state, set_random_state
from strategies.streaming.share import Collected, Part, Share
from strategies.streaming.store import StreamCache, forget
from strategies.streaming.visibility import within

Bounds = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Linear:
    """The objective whose derivatives by the statistics, flat over [B, T], are known."""

    factors: dict[str, Tensor]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self.factors) - {"logprob"}

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        terms = [getattr(stats, f"{name}_n") * stats.take(factor) for name, factor in self.factors.items()]
        return torch.stack([term.sum() for term in terms]).sum()


class ChunkedBatch:
    """One micro-batch, run chunk by chunk through `module`, whose parts are `model`'s."""

    def __init__(
        self,
        module: Callable[..., Any],
        model: nn.Module,
        attention: str | None,
        share: Share,
        bounds: Bounds,
        offload: bool = False,
    ) -> None:
        self.module = module
        self.model = model
        self.attention = attention
        self.share = share
        self.bounds = bounds
        self.cache = StreamCache(bounds[-1][1], offload)
        self._random_states: dict[int, list[Tensor]] = {}

    def compensate(self, chunk: Taken) -> None:
        """Scale what the chunk finds on its keys and values, and what it leaves on those of earlier ones."""
        leaves_T = None
        if chunk.leaves is not None:
            widths = torch.tensor([stop - start for start, stop in self.bounds[: chunk.index]], dtype=torch.long)
            factors = torch.tensor(chunk.leaves, dtype=torch.float64)
            leaves_T = factors.repeat_interleave(widths, output_size=self.bounds[chunk.index][0]).to(
                self.share.labels_BS.device
            )
        self.cache.compensate(chunk.left, leaves_T)

    def learned(self) -> list[bool]:
        """Which chunks have tokens to learn."""
        return [bool((self.share.labels_BS[:, start:stop] != IGNORE).any()) for start, stop in self.bounds]

    def run(self, index: int, objective: Any, weight: float, learn: bool = True, writes: bool = True) -> Tensor:
        """The objective over a chunk's tokens, divided by `weight`."""
        labels_BC = self.cut(self.share.labels_BS, index)
        asked = {
            "shift_labels": labels_BC if learn else torch.full_like(labels_BC, IGNORE),
            "objective": Part(objective, self.share, *self.bounds[index]),
            "weight": weight,
            "extras": MappingProxyType({}),
        }
        loss: Tensor = self._call(index, writes, asked).loss
        return loss

    def states(self, index: int, writes: bool = True) -> Any:
        """What `module`, here the part below the head, gives of a chunk."""
        return self._call(index, writes, {"return_dict": True})

    def _call(self, index: int, writes: bool, asked: dict[str, Any]) -> Any:
        """With the same random numbers every time."""
        start, stop = self.bounds[index]
        device = self.share.labels_BS.device
        if index in self._random_states:
            set_random_state(self._random_states[index], device)
        else:
            self._random_states[index] = random_state(device)
        self.cache.position.move(start, stop, writes)
        with using_attention(self.model, self.attention), within(self.share.spread):
            output = self.module(**self._inputs(index), **asked)
        forget()
        if not torch.is_grad_enabled():
            # Weights that were cast without a graph would be used again with one.
            torch.clear_autocast_cache()
        return output

    def _inputs(self, index: int) -> dict[str, Any]:
        given = self.share.inputs
        passed: dict[str, Any] = {"past_key_values": self.cache, "use_cache": True}
        passed |= {name: self.cut(given[name], index) for name in ("input_ids", "position_ids") if name in given}
        if "attention_mask" in given:
            passed["attention_mask"] = given["attention_mask"][:, : self.bounds[index][1]]
        return passed

    def cut(self, whole_BS: Tensor, index: int) -> Tensor:
        start, stop = self.bounds[index]
        return whole_BS[:, start:stop]

    def _stats(self, collected: Collected) -> tuple[Stats, dict[str, Tensor]]:
        """The statistics of the whole batch as leaves, and those by name."""
        leaves = {name: value[self.share.tokens.token_n].requires_grad_() for name, value in collected.values.items()}
        return self.share.tokens.stats(leaves), leaves

    def differentiate(self, objective: Objective, collected: Collected, weight: float) -> tuple[Tensor, Linear]:
        """The objective over the whole batch divided by `weight`, and the linear one with its derivatives."""
        with torch.enable_grad():
            stats, leaves = self._stats(collected)
            total = objective(stats, self.share.whole) / weight
            found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        factors = {}
        for (name, flat), by_value_n in zip(collected.values.items(), found, strict=True):
            factors[name] = torch.zeros_like(flat).index_copy_(0, self.share.tokens.token_n, by_value_n)
        return total.detach(), Linear(factors)
