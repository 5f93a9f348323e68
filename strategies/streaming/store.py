"""Keys and values of a sequence that is run in chunks, and the gradients that later chunks leave on them.

`StreamCache` is what a Transformers model takes for its cache. A chunk's forward hands its keys and values to
`update`, which records them. Its backward adds what it owes to earlier keys and values into their gradient
buffers, and collects what later chunks have left on its own: so the chunks are walked back last to first, and no
graph ever spans two of them.

Shapes: B rows, H key/value heads, T positions, C positions of a chunk, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.cache_utils import Cache, CacheLayerMixin

from distrib.errors import Refused
from strategies.streaming.offload import PinnedMemory, outside
from strategies.streaming.visibility import stripes


class Unstreamable(Refused):
    """A layer does with its cache what chunks with recorded keys and values cannot follow."""


class KeysRecorded(Exception):
    """The chunk's keys and values are known, and nothing else of it is wanted."""


class Buffer:
    """[B, H, T, D] of one kind, filled and read by positions."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._whole = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, start: int, part_BHCD: Tensor) -> None:
        self.read(start, start + part_BHCD.shape[2]).copy_(part_BHCD)

    def read(self, start: int, stop: int) -> Tensor:
        return self._whole[:, :, start:stop]

    def add(self, start: int, part_BHCD: Tensor) -> None:
        self.read(start, start + part_BHCD.shape[2]).add_(part_BHCD)


class OutsideBuffer(Buffer):
    """The same outside the device; what is read is a copy. Positions come first, so that transfers are contiguous."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        rows, heads, length, size = shape
        self._memory = outside(torch.Size((length, rows, heads, size)), dtype, device)
        if isinstance(self._memory, PinnedMemory):
            self._memory.tensor().zero_()
        self._device = device

    def write(self, start: int, part_BHCD: Tensor) -> None:
        part_CBHD = part_BHCD.permute(2, 0, 1, 3).contiguous()
        self._memory.tensor()[start : start + len(part_CBHD)].copy_(part_CBHD, non_blocking=True)

    def read(self, start: int, stop: int) -> Tensor:
        part_CBHD = self._memory.tensor()[start:stop].to(self._device, non_blocking=True, copy=True)
        return part_CBHD.permute(1, 2, 0, 3)

    def add(self, start: int, part_BHCD: Tensor) -> None:
        self.write(start, self.read(start, start + part_BHCD.shape[2]).add_(part_BHCD))


@dataclass
class Store:
    """The keys and values of one layer, and their gradients while chunks are walked back."""

    length: int
    offload: bool = False
    keys: Buffer | None = None
    values: Buffer | None = None
    by_keys: Buffer | None = None
    by_values: Buffer | None = None
    left: float = 1.0
    leaves_T: Tensor | None = None
    """An estimator's compensation: times what later chunks have left on the running chunk's keys and values, and
    times what it leaves at each earlier position."""
    collected: int | None = None

    def record(self, start: int, key_BHCD: Tensor, value_BHCD: Tensor) -> None:
        if self.keys is None or self.values is None:
            self.keys, self.values = self._buffer(key_BHCD), self._buffer(value_BHCD)
        self.keys.write(start, key_BHCD.detach())
        self.values.write(start, value_BHCD.detach())

    def _buffer(self, part_BHCD: Tensor, dtype: torch.dtype | None = None) -> Buffer:
        rows, heads, _, size = part_BHCD.shape
        shape = torch.Size((rows, heads, self.length, size))
        kind = OutsideBuffer if self.offload else Buffer
        return kind(shape, dtype or part_BHCD.dtype, part_BHCD.device)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys.read(start, stop), self.values.read(start, stop)

    def leave(self, start: int, by_keys_BHCD: Tensor, by_values_BHCD: Tensor) -> None:
        """Add to the gradients of the keys and values from `start` on."""
        if self.by_keys is None or self.by_values is None:
            # Sums over many chunks: in float32 at least.
            dtype = torch.promote_types(by_keys_BHCD.dtype, torch.float32)
            self.by_keys, self.by_values = self._buffer(by_keys_BHCD, dtype), self._buffer(by_values_BHCD, dtype)
        if self.leaves_T is not None:
            leaves_C1 = self.leaves_T[start : start + by_keys_BHCD.shape[2], None].to(by_keys_BHCD.dtype)
            by_keys_BHCD, by_values_BHCD = by_keys_BHCD * leaves_C1, by_values_BHCD * leaves_C1
        self.by_keys.add(start, by_keys_BHCD)
        self.by_values.add(start, by_values_BHCD)

    def collect(self, start: int, by_keys_BHCD: Tensor, by_values_BHCD: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk's own gradients of its keys and values, with what later chunks left on them; the latter once,
        however many ways a model's graph has back to them."""
        if self.by_keys is None or self.by_values is None or self.collected == start:
            return by_keys_BHCD, by_values_BHCD
        self.collected = start
        stop = start + by_keys_BHCD.shape[2]
        left = self.by_keys.read(start, stop), self.by_values.read(start, stop)
        by_keys, by_values = (
            torch.add(theirs, mine) if self.left == 1 else torch.add(mine, theirs, alpha=self.left)
            for mine, theirs in zip((by_keys_BHCD, by_values_BHCD), left, strict=True)
        )
        return by_keys.to(by_keys_BHCD.dtype), by_values.to(by_values_BHCD.dtype)


@dataclass
class Chunk:
    """The keys and values that a chunk has just handed to `update`, for the attention that follows at once.

    `whole_key` and `whole_value` are all there are up to the chunk's end, as `update` returned them: an attention
    that is given just these may use `store`, `key` and `value` in their place.
    """

    store: Store
    start: int
    stop: int
    key_BHCD: Tensor
    value_BHCD: Tensor
    whole_key: Tensor
    whole_value: Tensor


_latest: list[Chunk] = []


def handed_over(key: Tensor, value: Tensor) -> Chunk | None:
    """The chunk whose keys and values these are, if they come straight from `update`; asked once."""
    chunk = _latest.pop() if _latest else None
    if chunk is None or chunk.whole_key is not key or chunk.whole_value is not value:
        return None
    return chunk


class _Whole(torch.autograd.Function):
    """A chunk's keys and values in, all up to its end out."""

    @staticmethod
    def forward(ctx: Any, key_BHCD: Tensor, value_BHCD: Tensor, store: Store, start: int) -> tuple[Tensor, Tensor]:
        ctx.store, ctx.start = store, start
        return store.read(0, start + key_BHCD.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_keys: Tensor, by_values: Tensor) -> Any:
        store, start = ctx.store, ctx.start
        if start:
            store.leave(0, by_keys[:, :, :start], by_values[:, :, :start])
        return *store.collect(start, by_keys[:, :, start:], by_values[:, :, start:]), None, None


@dataclass
class Position:
    """Where a run stands, in this rank's positions: the layers of a cache share one."""

    length: int
    offload: bool = False
    start: int = 0
    stop: int = 0
    writes: bool = True
    keys_only: int = 0
    """After how many records nothing else is wanted of this run, if not 0."""
    records: int = 0
    runs: int = 0

    def move(self, start: int, stop: int, writes: bool = True, keys_only: int = 0) -> None:
        self.start, self.stop, self.writes, self.keys_only = start, stop, writes, keys_only
        self.records = 0
        self.runs += 1


class StreamLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the cache."""

    is_sliding = False

    def __init__(self, position: Position) -> None:
        super().__init__()
        self.position = position
        self.stripes = stripes()
        self.store = Store(position.length * self.stripes.ranks, position.offload)
        self.is_initialized = True
        self._last_run = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the store takes its shape from the first chunk")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        position, store = self.position, self.store
        self._refuse_other_uses(key_states, value_states)
        key_states, value_states = self.stripes.keys(key_states), self.stripes.keys(value_states)
        start, stop = (at * self.stripes.ranks for at in (position.start, position.stop))
        if position.writes:
            store.record(start, key_states, value_states)
        position.records += 1
        if position.records == position.keys_only:
            raise KeysRecorded
        if not torch.is_grad_enabled() or not (key_states.requires_grad or value_states.requires_grad):
            whole_key, whole_value = store.read(0, stop)
        else:
            whole: Any = _Whole
            whole_key, whole_value = whole.apply(key_states, value_states, store, start)
        _latest[:] = [Chunk(store, start, stop, key_states, value_states, whole_key, whole_value)]
        return whole_key, whole_value

    def _refuse_other_uses(self, key: Tensor, value: Tensor) -> None:
        width = self.position.stop - self.position.start
        if self._last_run == self.position.runs:
            raise Unstreamable("it records keys and values twice")
        if any(states.ndim != 4 or states.shape[2] != width for states in (key, value)):
            raise Unstreamable(f"its keys and values are {list(key.shape)} and {list(value.shape)}")
        self._last_run = self.position.runs

    def get_seq_length(self) -> int:
        return self.position.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.position.start + query_length, 0

    def get_max_length(self) -> int:
        return -1


class StreamCache(Cache):  # type: ignore[misc]
    """What a model, or one of its layers, takes for `past_key_values`."""

    def __init__(self, length: int, offload: bool = False) -> None:
        super().__init__(layers=[])
        self.position = Position(length, offload)

    def compensate(self, left: float, leaves_T: Tensor | None) -> None:
        """The factors of the chunk that comes next."""
        for layer in self.layers:
            layer.store.left, layer.store.leaves_T = left, leaves_T

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(StreamLayer(self.position))
        return self.layers[layer_idx].update(key_states, value_states)  # type: ignore[no-any-return]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.position.start

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.position.start

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.position.start + query_length, 0

    def _other_state(self, *_: Any, **__: Any) -> Any:
        raise Unstreamable("it keeps a state that is not keys and values")

    has_previous_state = get_conv_state = update_conv_state = _other_state
    get_recurrent_state = update_recurrent_state = update_indexer = _other_state


def forget() -> None:
    """Let go of a chunk whose attention did not ask for it."""
    _latest.clear()
