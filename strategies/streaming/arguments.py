"""Which dimension of a layer's arguments is the sequence, and how they are cut into chunks.

It is found out by looking at a layer's arguments at a length that nothing else in the model has, and kept: at the
real length, a head size or a batch may happen to be as long as the sequence.

Shapes: T positions of the sequence, [start, stop) a chunk.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from strategies.streaming.store import StreamCache, Unstreamable
from strategies.streaming.visibility import Rows

Path = tuple[str | int, ...]
CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")


@dataclass(frozen=True)
class Cut:
    """The dimension of a tensor that runs over the chunk's positions, and the one over all up to its end."""

    own: int | None
    seen: int | None = None

    def apply(self, value: Any, start: int, stop: int) -> Any:
        """Of a tensor, or of one that was put away."""
        if self.seen is not None:
            value = value.narrow(self.seen, 0, stop)
        return value if self.own is None else value.narrow(self.own, start, stop - start)


@dataclass
class Layout:
    """How one layer is run in chunks, as a trial has shown; `whole` says why it is not, and `kept` why it is not even
    recomputed but left to autograd as it is."""

    cuts: dict[Path, Cut] = field(default_factory=dict)
    outputs: list[int | None] = field(default_factory=list)
    dense: bool = False
    """The layer's attention is its own and takes an additive tensor for its mask."""
    whole: str | None = None
    kept: str | None = None


def named_arguments(forward: Callable[..., Any], layer: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument by its name."""
    signature = inspect.signature(forward)
    bound = signature.bind(layer, *args, **kwargs)
    named = dict(bound.arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
        elif parameter.kind is parameter.VAR_POSITIONAL and named.get(name):
            raise Unstreamable("its forward takes any number of positional arguments")
    del named[next(iter(signature.parameters))]
    return named


def cache_name(forward: Callable[..., Any]) -> str:
    parameters = inspect.signature(forward).parameters
    taken = [name for name in CACHE_NAMES if name in parameters]
    if not taken and all(x.kind is not x.VAR_KEYWORD for x in parameters.values()):
        raise Unstreamable("it takes no cache of keys and values")
    return taken[0] if taken else CACHE_NAMES[0]


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in a structure that is kept without it."""

    number: int


def walk(value: Any, change: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """`value` with every tensor, mask and slot in it, however deep, replaced by what `change` makes of it."""
    if isinstance(value, Tensor | Rows | Slot):
        return change(path, value)
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return type(value)(walk(item, change, (*path, index)) for index, item in enumerate(value))
    if isinstance(value, MutableMapping):
        made = copy.copy(value)
        made.update({name: walk(item, change, (*path, name)) for name, item in value.items()})
        return made
    return value


def learn(named: dict[str, Any], length: int) -> dict[Path, Cut]:
    """The cut of each tensor among the arguments, by its shape."""
    cuts: dict[Path, Cut] = {}

    def note(path: Path, value: Any) -> Any:
        if isinstance(value, Tensor):
            cuts[path] = cut_of(value, length)
        return value

    walk(named, note)
    return cuts


def cut_of(value: Tensor, length: int) -> Cut:
    long = [dim for dim, size in enumerate(value.shape) if size == length]
    if len(long) > 2 or (len(long) == 2 and long != [value.ndim - 2, value.ndim - 1]):
        raise Unstreamable(f"an argument has the shape {list(value.shape)}")
    if len(long) == 2:
        return Cut(own=long[0], seen=long[1])
    if long and value.ndim >= 3 and long[0] == value.ndim - 1:
        # One entry a key, as position biases have.
        return Cut(own=None, seen=long[0])
    return Cut(own=long[0] if long else None)


def chunk_arguments(
    named: dict[str, Any],
    layout: Layout,
    dtype: torch.dtype,
    start: int,
    stop: int,
    cache: StreamCache,
    name_of_cache: str,
) -> dict[str, Any]:
    """The arguments of the chunk [start, stop), with the cache among them; slots stay."""

    def cut(path: Path, value: Any) -> Any:
        if isinstance(value, Slot):
            return value
        if isinstance(value, Rows):
            rows = value.of_chunk(start, stop)
            return rows.dense(dtype) if layout.dense else rows
        if path not in layout.cuts:
            raise Unstreamable(f"a layer's argument {path[0]!r} was not there in its trial: not supported in chunks")
        return layout.cuts[path].apply(value, start, stop)

    return {**walk(named, cut), name_of_cache: cache}


def whole_arguments(named: dict[str, Any], layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    if not layout.dense:
        return named
    made: dict[str, Any] = walk(named, lambda _, value: value.dense(dtype) if isinstance(value, Rows) else value)
    return made
