"""Who sees whom, without a T x T mask: a mask function that is asked for one tile at a time.

Transformers describes every mask as a function of positions (causal, sliding windows, chunks, documents, padding).
`visible_rows` keeps that function instead of evaluating it. An attention then takes the queries in blocks and asks
`Rows.parts` which keys a block sees: unseen stretches are left out, fully seen ones need no mask, the diagonal is
mostly plain causal, and only what is left is a boolean tile.

Shapes: B rows of a batch, T positions, C queries, K keys of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, packed_sequence_compatibility_function, sdpa_mask

from distrib.engines.context_parallel import ALONE, Stripes
from distrib.errors import Refused

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TILE_KEYS = 512
"""Granularity at which keys are told apart as seen, unseen or mixed."""
BLOCK_QUERIES = 1024
"""Queries that share one classification of the keys, unless the mask is plain causal."""
PART_KEYS = 2048
"""The longest part: bounds the gradients of keys and values that exist beside the buffers they are added to."""
_SCAN_KEYS = 8192


class Part(NamedTuple):
    """Keys [start, stop) and how a block of queries sees them: all of them, the triangle, or a bool tile."""

    start: int
    stop: int
    mask: Tensor | Literal["causal"] | None


class _Span(NamedTuple):
    start: int
    stop: int
    kind: Literal["seen", "mixed", "causal"]


@dataclass(frozen=True, eq=False)
class Visibility:
    """What Transformers was about to turn into a T x T mask. Positions are absolute."""

    mask_function: MaskFunction
    padding_BT: Tensor | None
    batch_size: int
    length: int
    device: torch.device
    use_vmap: bool = False
    _spans: dict[tuple[int, int], list[_Span]] = field(default_factory=dict, repr=False)

    @cached_property
    def causal(self) -> bool:
        """Nothing but causal, so that no tile is ever evaluated."""
        return self.mask_function is causal_mask_function and (self.padding_BT is None or bool(self.padding_BT.all()))

    def tile(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Tensor:
        """[B or 1, 1, C, K] bool, true where a query sees a key."""
        seen: Tensor | None = sdpa_mask(
            batch_size=self.batch_size,
            q_length=q_stop - q_start,
            kv_length=k_stop - k_start,
            q_offset=q_start,
            kv_offset=k_start,
            mask_function=self.mask_function,
            attention_mask=self.padding_BT,
            allow_is_causal_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        assert seen is not None
        # Expanded over the batch: the same for all its rows.
        return seen[:1] if seen.stride(0) == 0 else seen

    def rows(self, start: int, stop: int) -> Rows:
        return Rows(self, start, stop)

    def spans(self, start: int, stop: int) -> list[_Span]:
        """The keys up to `stop` that queries [start, stop) see, in order; every layer asks for the same ones."""
        if (start, stop) not in self._spans:
            self._spans[start, stop] = self._plain_spans(start, stop) if self.causal else self._scan(start, stop)
        return self._spans[start, stop]

    def _plain_spans(self, start: int, stop: int) -> list[_Span]:
        prefix = [_Span(0, start, "seen")] if start else []
        return [*prefix, _Span(start, stop, "causal")]

    def _scan(self, start: int, stop: int) -> list[_Span]:
        self._refuse_future(start, stop)
        spans = self._classify(start, stop, 0, start)
        own = self.tile(start, stop, start, stop)
        if bool((own == torch.ones_like(own).tril_()).all()):
            return [*spans, _Span(start, stop, "causal")]
        return [*spans, *self._classify(start, stop, start, stop)]

    def _classify(self, start: int, stop: int, k_start: int, k_stop: int) -> list[_Span]:
        spans: list[_Span] = []
        for scan_start in range(k_start, k_stop, _SCAN_KEYS):
            scan_stop = min(scan_start + _SCAN_KEYS, k_stop)
            tile = self.tile(start, stop, scan_start, scan_stop)
            # One transfer for many tiles: on a GPU each one waits for the device.
            some, every = torch.stack([tile.any(dim=(0, 1, 2)), tile.all(dim=(0, 1, 2))]).cpu()
            for at in range(scan_start, scan_stop, TILE_KEYS):
                to = min(at + TILE_KEYS, scan_stop)
                here = slice(at - scan_start, to - scan_start)
                if every[here].all():
                    spans.append(_Span(at, to, "seen"))
                elif some[here].any():
                    spans.append(_Span(at, to, "mixed"))
        return spans

    def _refuse_future(self, start: int, stop: int) -> None:
        for k_start in range(stop, self.length, _SCAN_KEYS):
            if self.tile(start, stop, k_start, min(k_start + _SCAN_KEYS, self.length)).any():
                raise Refused(
                    f"positions {start}..{stop - 1} see later ones: a sequence is run in chunks only under causal "
                    "attention; choose another strategy for this model"
                )


class Rows:
    """Queries [start, stop) of a visibility: what a layer is given for its attention mask.

    No dataclass: engines copy those on the way into each layer, and what a visibility found out would be lost.
    """

    def __init__(self, visibility: Visibility, start: int, stop: int) -> None:
        self.visibility = visibility
        self.start = start
        self.stop = stop

    def narrow(self, start: int, stop: int) -> Rows:
        """Other queries of the same visibility, by absolute position."""
        return Rows(self.visibility, start, stop)

    def of_chunk(self, start: int, stop: int) -> Rows:
        """Those of a chunk, by this rank's positions."""
        ranks = stripes().ranks
        return self.narrow(start * ranks, stop * ranks)

    def __getitem__(self, index: tuple[slice, ...]) -> Rows:
        """Some models slice their masks, and in training keep everything."""
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise Refused("a slice of a mask is not supported in chunks")
        return self

    def blocks(self) -> list[Rows]:
        """Queries that are worth a classification of their own."""
        if self.visibility.causal:
            return [self]
        starts = range(self.start, self.stop, BLOCK_QUERIES)
        return [self.narrow(at, min(at + BLOCK_QUERIES, self.stop)) for at in starts]

    def parts(self, k_start: int, k_stop: int) -> Iterator[Part]:
        """The keys of [k_start, k_stop) that are seen; tiles are evaluated as they are reached, and not kept."""
        start = stop = k_start
        for span in self.visibility.spans(self.start, self.stop):
            low, high = max(span.start, k_start), min(span.stop, k_stop)
            if low >= high:
                continue
            if span.kind == "seen" and low == stop:
                stop = high
                continue
            yield from _unmasked(start, stop)
            start, stop = (low, high) if span.kind == "seen" else (high, high)
            if span.kind == "causal":
                assert (low, high) == (span.start, span.stop), "a triangle is not cut"
                yield Part(low, high, "causal")
            elif span.kind == "mixed":
                yield Part(low, high, self.visibility.tile(self.start, self.stop, low, high))
        yield from _unmasked(start, stop)

    def seen(self) -> Tensor:
        """[B, 1, C, stop] bool, all of it: for attention that keeps its weights anyway."""
        return self.visibility.tile(self.start, self.stop, 0, self.stop).expand(self.visibility.batch_size, -1, -1, -1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, C, stop] additive, for models with an attention of their own."""
        seen = self.seen()
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _unmasked(start: int, stop: int) -> Iterator[Part]:
    for at in range(start, stop, PART_KEYS):
        yield Part(at, min(at + PART_KEYS, stop), None)


@dataclass(frozen=True)
class Spread:
    """What the positions that a model is run on are a part of.

    `documents_BT` keeps packed documents apart in masks that are built while a cache or a mask is passed. Transformers
    does so by itself only without, and such masks must not be restricted twice: it counts positions from the start of
    each document. `padding_BT` is that of whole sequences, where a rank has `stripes` of them.
    """

    stripes: Stripes = ALONE
    documents_BT: Tensor | None = None
    padding_BT: Tensor | None = None


_spreads = [Spread()]


@contextmanager
def within(spread: Spread) -> Iterator[None]:
    """Around forwards, and around backwards that run parts of them again."""
    _spreads.append(spread)
    try:
        yield
    finally:
        _spreads.pop()


def stripes() -> Stripes:
    """Of the run that is on its way."""
    return _spreads[-1].stripes


def _apart(mask_function: MaskFunction, ids_BT: Tensor) -> MaskFunction:
    first_B1 = torch.zeros_like(ids_BT[:, :1], dtype=torch.bool)
    begins_BT = torch.cat([first_B1, ids_BT[:, 1:] != ids_BT[:, :-1]], dim=1)
    if not begins_BT.any():
        return mask_function
    index_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
    position_BT = index_BT - torch.where(begins_BT, index_BT, 0).cummax(dim=1).values
    apart: MaskFunction = packed_sequence_compatibility_function(mask_function, position_BT, ids_BT)
    return apart


def visible_rows(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: object,
) -> Rows:
    """What Transformers calls for a mask: the queries [q_offset, q_offset + q_length) of this rank and of those that it
    shares its sequences with, and nothing evaluated."""
    assert kv_offset == 0, "recorded keys start at position 0"
    spread = _spreads[-1]
    if spread.documents_BT is not None:
        mask_function = _apart(mask_function, spread.documents_BT)
    ranks = spread.stripes.ranks
    padding_BT = attention_mask if ranks == 1 else spread.padding_BT
    visibility = Visibility(mask_function, padding_BT, batch_size, kv_length * ranks, torch.device(device), use_vmap)
    return visibility.rows(int(q_offset) * ranks, (int(q_offset) + q_length) * ranks)


def causal_rows(start: int, stop: int, batch_size: int, device: torch.device) -> Rows:
    """Plain causal queries, where a model built no mask."""
    return Visibility(causal_mask_function, None, batch_size, stop, device).rows(start, stop)
