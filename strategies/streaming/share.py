"""A rank's share of a batch whose sequences lie over several ranks, and what its model must know beside it.

A model that runs on every N-th position builds its masks, keys and values as if these were all. So a `Spread` says what
they are a part of: within it masks speak of whole sequences, caches record them, and attention exchanges positions for
heads. Labels are shifted before they are shared out.

Shapes: B rows, T positions of a whole sequence, S of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distrib.contracts import IGNORE, MODEL_INPUTS, Batch
from distrib.engines.context_parallel import Stripes
from strategies.core.head import find_tokens
from strategies.core.objectives import Stats
from strategies.streaming.visibility import Spread


class Share:
    """`whole` is the batch, padded so that every rank has as many positions, `least` of them or more."""

    def __init__(self, batch: Batch, stripes: Stripes, least: int = 1) -> None:
        length = batch["input_ids"].shape[1]
        self.stripes = stripes
        self.length = max(-(-length // stripes.ranks), least)
        self.whole = padded(batch, self.length * stripes.ranks)
        labels, shift_labels = (self.whole.get(name) for name in ("labels", "shift_labels"))
        self.tokens = find_tokens(labels, shift_labels)
        if shift_labels is None:
            assert labels is not None
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        self.labels_BS = stripes.take(shift_labels)
        self.inputs = {name: stripes.take(value) for name, value in self._inputs().items()}
        padding_BT, position_ids_BT = self.whole.get("attention_mask"), self.whole.get("position_ids")
        documents_BT = None if padding_BT is not None else document_ids(position_ids_BT)
        self.spread = Spread(stripes, documents_BT, None if padding_BT is None else padding_BT.bool())

    def _inputs(self) -> Batch:
        given = {name: self.whole[name] for name in MODEL_INPUTS if name in self.whole}
        if self.stripes.ranks == 1:
            return given
        ids_BT = self.whole["input_ids"]
        # With a mask of its own Transformers takes no leap between positions for the end of a document.
        beside = {
            "position_ids": torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT),
            "attention_mask": torch.ones_like(ids_BT),
        }
        return beside | given


@dataclass
class Collected:
    """An objective that minimises nothing and keeps every statistic, flat over [B, T]."""

    size: int
    needs: frozenset[str]
    values: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        for name in ("logprob", *self.needs):
            value_n = getattr(stats, f"{name}_n")
            if name not in self.values:
                self.values[name] = value_n.new_zeros(self.size)
            self.values[name].index_copy_(0, stats.token_n, value_n)
        return stats.logprob_n.new_zeros(())

    def over_ranks(self, stripes: Stripes) -> Collected:
        """With what the other ranks of the sequences have."""
        return replace(self, values={name: stripes.sum(value) for name, value in sorted(self.values.items())})


class Part:
    """An objective over a rank's tokens of a chunk, positions [start, stop) of its own, in terms of the whole batch.

    No dataclass: engines copy those on the way into a model, and round what is in them to the weights' precision.
    """

    separable = True

    def __init__(self, of: Any, share: Share, start: int, stop: int) -> None:
        self.of = of
        self.share = share
        self.start, self.stop = start, stop

    @property
    def needs(self) -> frozenset[str]:
        found: frozenset[str] = self.of.needs
        return found

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return 0.0

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        found: Tensor = self.of(self._in_whole(stats), self.share.whole)
        return found

    def _in_whole(self, stats: Stats) -> Stats:
        share, stripes = self.share, self.share.stripes
        ahead = 0 if "shift_labels" in share.whole else 1
        own_n = self.start + stats.token_n - stats.row_n * (self.stop - self.start)
        token_n = (stats.row_n * share.length + own_n) * stripes.ranks + stripes.rank + ahead
        return replace(stats, token_n=token_n, lengths_B=share.tokens.lengths_B)


class Gathered(Part):
    """An objective that is no sum over tokens: of the statistics of all ranks, each of which has the whole of it. A
    rank's own statistics get their gradient."""

    separable = False

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        share, own = self.share, self._in_whole(stats)
        values = {}
        for name in ("logprob", *sorted(self.needs)):
            value_n = getattr(own, f"{name}_n")
            flat = value_n.new_zeros(share.whole["input_ids"].numel()).index_copy(0, own.token_n, value_n)
            values[name] = (share.stripes.sum(flat) + (flat - flat.detach()))[share.tokens.token_n]
        found: Tensor = self.of(share.tokens.stats(values), share.whole)
        return found


def padded(batch: Batch, length: int) -> Batch:
    """At least `length` positions, the new ones on the right and not learned: nothing looks at them."""
    missing = length - batch["input_ids"].shape[1]
    if missing <= 0:
        return batch
    shape = batch["input_ids"].shape
    made = dict(batch)
    for name, value in batch.items():
        if value.shape[:2] == shape:
            fill = IGNORE if name in ("labels", "shift_labels") else 0
            made[name] = torch.nn.functional.pad(value, (0, missing), value=fill)
    if "position_ids" in batch:
        # A document of its own.
        made["position_ids"][:, -missing:] = torch.arange(missing, device=batch["position_ids"].device)
    return made


def document_ids(position_ids_BT: Tensor | None) -> Tensor | None:
    """Which of a packed row's documents each position belongs to; None when there is one a row."""
    if position_ids_BT is None:
        return None
    steps_BT = torch.diff(position_ids_BT, dim=1, prepend=position_ids_BT[:, :1] - 1)
    ids_BT = (steps_BT != 1).cumsum(1)
    return ids_BT if bool(ids_BT[:, -1].any()) else None
