"""A decoder layer run in chunks of the sequence: forwards without a graph, backwards one chunk's graph at a time.

The backward records the layer's keys and values again (norm and projections only), then takes the chunks last to
first: each is run once more, with a graph, and what it owes to earlier keys and values waits for them in their
store. The layer's trainable parameters are inputs of the autograd function and their gradients its outputs, so
that whatever an engine hangs on them fires once a layer.

Shapes: T positions of the sequence, [start, stop) a chunk.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from strategies.core.edits import original_class
from strategies.streaming.arguments import (
    Layout,
    Path,
    Slot,
    cache_name,
    chunk_arguments,
    walk,
    whole_arguments,
)
from strategies.streaming.implementation import using_attention
from strategies.streaming.offload import Away
from strategies.streaming.replay import Circumstances, random_state, set_random_state
from strategies.streaming.store import KeysRecorded, StreamCache, Unstreamable, forget

Input = Tensor | Away


def split(length: int, chunk: int) -> list[tuple[int, int]]:
    """Chunks of nearly equal length, at most `chunk`: a short last one would be a slow product."""
    count = -(-length // chunk)
    size = -(-length // count)
    return [(start, min(start + size, length)) for start in range(0, length, size)]


class Bare(nn.Module):
    """The layer's own forward, without the hooks on the layer, as something to call functionally."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, **named: Any) -> Any:
        return original_class(self.layer).forward(self.layer, **named)


@dataclass
class LayerRun:
    """One call of a layer: its arguments, and what must be as it was when its chunks run again.

    Tensors that want a gradient are `inputs`, by their path among the arguments; the rest stays in `named`.
    """

    layer: nn.Module
    layout: Layout
    attention: str | None
    chunks: list[tuple[int, int]]
    named: dict[str, Any]
    paths: list[Path]
    dtype: torch.dtype
    circumstances: Circumstances
    random_states: list[list[Tensor]] = field(default_factory=list)
    structure: Any = None
    records: int = 0
    """How many keys and values a run of one chunk records: one for each of the layer's attentions."""

    @property
    def length(self) -> int:
        return self.chunks[-1][1]

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs that are tensors, whole; their place in what the layer returns is kept in `structure`."""
        cache, joined = self._cache(), Joined(self.layout, self.length)
        for start, stop in self.chunks:
            self.random_states.append(random_state(self.circumstances.device))
            output = self._call(self._arguments(inputs, start, stop, cache), start, stop, cache)
            self.structure = joined.add(output, start, stop)
            self.records = 0 if cache is None else cache.position.records
        return tuple(joined.tensors)

    def backward(
        self, inputs: tuple[Input, ...], by_outputs: tuple[Tensor, ...], wanted: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Gradients of the inputs, then of the trainable parameters."""
        with self.circumstances.restored(self.layer), using_attention(self.layer, self.attention):
            cache = self._cache()
            inputs = tuple(self._at_hand(path, x) for path, x in zip(self.paths, inputs, strict=True))
            live = {f"layer.{name}": p for name, p in self.layer.named_parameters() if p.requires_grad}
            leaves = {name: p.detach().requires_grad_() for name, p in live.items()}
            sums = Sums([self.layout.cuts.get(path) for path in self.paths], inputs, list(leaves.values()), wanted)
            for index, (start, stop) in enumerate(self.chunks[:-1]):
                self._record(inputs, start, stop, cache, index)
            for index in reversed(range(len(self.chunks))):
                start, stop = self.chunks[index]
                set_random_state(self.random_states[index], self.circumstances.device)
                parts = sums.leaves(start, stop)
                with torch.enable_grad():
                    named = self._arguments(tuple(parts), start, stop, cache, cut=False)
                    writes = index == len(self.chunks) - 1
                    output = self._call(named, start, stop, cache, leaves, writes=writes)
                    sums.add(parts, tensors(output), self._cut_outputs(by_outputs, start, stop), start, stop)
                del named, output
            return sums.take()

    def _at_hand(self, path: Path, value: Input) -> Input:
        """What was put away stays there where it is asked for in parts."""
        cut = None if self.layout.whole else self.layout.cuts.get(path)
        return value.back() if isinstance(value, Away) and (cut is None or cut.own is None) else value

    def _cache(self) -> StreamCache | None:
        return StreamCache(self.length) if self.layout.whole is None else None

    def _record(self, inputs: tuple[Input, ...], start: int, stop: int, cache: StreamCache | None, index: int) -> None:
        set_random_state(self.random_states[index], self.circumstances.device)
        try:
            with torch.no_grad():
                self._call(self._arguments(inputs, start, stop, cache), start, stop, cache, keys_only=self.records)
        except KeysRecorded:
            return
        raise Unstreamable("it recorded no keys and values")

    def _arguments(
        self, inputs: tuple[Input, ...], start: int, stop: int, cache: StreamCache | None, cut: bool = True
    ) -> dict[str, Any]:
        """The layer's arguments for a chunk; `inputs` are whole, or (not `cut`) already the chunk's parts."""
        if cache is None:
            return whole_arguments(put(self.named, self.paths, inputs), self.layout, self.dtype)
        if cut:
            cuts = [self.layout.cuts[path] for path in self.paths]
            inputs = tuple(c.apply(x, start, stop) for c, x in zip(cuts, inputs, strict=True))
        name = cache_name(original_class(self.layer).forward)
        chunk = chunk_arguments(self.named, self.layout, self.dtype, start, stop, cache, name)
        return put(chunk, self.paths, inputs)

    def _call(
        self,
        named: dict[str, Any],
        start: int,
        stop: int,
        cache: StreamCache | None,
        leaves: dict[str, Tensor] | None = None,
        writes: bool = True,
        keys_only: int = 0,
    ) -> Any:
        if cache is not None:
            cache.position.move(start, stop, writes, keys_only)
        try:
            bare = Bare(self.layer)
            return bare(**named) if leaves is None else functional_call(bare, leaves, (), named)
        finally:
            forget()

    def _cut_outputs(self, by_outputs: tuple[Tensor, ...], start: int, stop: int) -> list[Tensor]:
        dims = self.layout.outputs
        return [
            by if dim is None else by.narrow(dim, start, stop - start) for by, dim in zip(by_outputs, dims, strict=True)
        ]


class Joined:
    """The chunks' outputs, written into whole ones."""

    def __init__(self, layout: Layout, length: int) -> None:
        self.layout = layout
        self.length = length
        self.tensors: list[Tensor] = []

    def add(self, output: Any, start: int, stop: int) -> Any:
        """Write a chunk's outputs; the structure they were in, its tensors replaced by their numbers."""
        parts = tensors(output)
        if len(parts) != len(self.layout.outputs):
            raise Unstreamable(f"it returned {len(parts)} tensors, {len(self.layout.outputs)} before")
        for number, (part, dim) in enumerate(zip(parts, self.layout.outputs, strict=True)):
            if number == len(self.tensors):
                self.tensors.append(self._whole(part, dim))
            if dim is not None:
                self.tensors[number].narrow(dim, start, stop - start).copy_(part)
        slots = map(Slot, range(len(parts)))
        return walk(without_attentions(output), lambda _, __: next(slots))

    def _whole(self, part: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return part
        shape = list(part.shape)
        shape[dim] = self.length
        return part.new_empty(shape)


def without_attentions(output: Any) -> Any:
    """What a layer returns, with None in the place of attention weights: no one asks for them in training."""
    if isinstance(output, tuple):
        return tuple(
            None if index and isinstance(item, Tensor) and item.ndim == 4 else item for index, item in enumerate(output)
        )
    return output


def tensors(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    walk(without_attentions(output), lambda _, value: found.append(value))
    return found


def put(named: dict[str, Any], paths: list[Path], values: tuple[Any, ...]) -> dict[str, Any]:
    """`named` with the tensors in their places."""
    named = dict(named)
    for path, value in zip(paths, values, strict=True):
        name, *inner = path
        named[str(name)] = _put(named.get(str(name)), inner, value)
    return named


def _put(held: Any, path: list[str | int], value: Any) -> Any:
    if not path:
        return value
    first, *rest = path
    if isinstance(held, MutableMapping):
        made = copy.copy(held)
        made[first] = _put(held[first], rest, value)
        return made
    assert isinstance(first, int)
    return type(held)((*held[:first], _put(held[first], rest, value), *held[first + 1 :]))


class Sums:
    """Gradients of a layer's inputs and parameters while its chunks are walked back.

    An input that runs over the sequence gets each position's gradient once; everything else is a sum over chunks,
    in float32 at least.
    """

    def __init__(
        self, cuts: list[Any], inputs: tuple[Input, ...], parameters: list[Tensor], wanted: tuple[bool, ...]
    ) -> None:
        self.cuts = cuts
        self.inputs = inputs
        self.parameters = parameters
        self.wanted = wanted[: len(inputs)]
        self.by_inputs: list[Tensor | None] = [None] * len(inputs)
        self.by_parameters: list[Tensor | None] = [None] * len(parameters)

    def leaves(self, start: int, stop: int) -> list[Tensor]:
        """The chunk's part of each input."""
        parts: list[Any] = [
            x if c is None else c.apply(x, start, stop) for c, x in zip(self.cuts, self.inputs, strict=True)
        ]
        return [part.detach().requires_grad_(want) for part, want in zip(parts, self.wanted, strict=True)]

    def add(self, parts: list[Tensor], outputs: list[Tensor], by_outputs: list[Tensor], start: int, stop: int) -> None:
        pairs = [(y, by) for y, by in zip(outputs, by_outputs, strict=True) if y.requires_grad]
        asked = [part for part in parts if part.requires_grad] + self.parameters
        found = torch.autograd.grad([y for y, _ in pairs], asked, [by for _, by in pairs], allow_unused=True)
        gradients = iter(found)
        for index, part in enumerate(parts):
            if part.requires_grad:
                self._add_input(index, next(gradients), start, stop)
        for index, gradient in enumerate(gradients):
            self.by_parameters[index] = _plus(self.by_parameters[index], gradient)

    def _add_input(self, index: int, gradient: Tensor | None, start: int, stop: int) -> None:
        cut, whole = self.cuts[index], self.inputs[index]
        if cut is None or cut.own is None:
            self.by_inputs[index] = _plus(self.by_inputs[index], gradient)
            return
        held = self.by_inputs[index]
        if held is None:
            held = self.by_inputs[index] = torch.empty(whole.shape, dtype=whole.dtype, device=whole.device)
        part = held.narrow(cut.own, start, stop - start)
        part.zero_() if gradient is None else part.copy_(gradient)

    def take(self) -> list[Tensor | None]:
        given = [*self.inputs, *self.parameters]
        sums = [*self.by_inputs, *self.by_parameters]
        return [None if total is None else total.to(x.dtype) for total, x in zip(sums, given, strict=True)]


def _plus(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:
        return total
    if total is None:
        # A copy: autograd may give one tensor to two parameters.
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
    return total.add_(gradient)
