"""A run's live bytes by class, in segments: which layer, forwards or backwards, or the head.

A storage's class is known when the run is over:

    weights       parameters and buffers, and copies of them in another precision
    gradients     what is in `.grad` in the end
    logits        what has a dimension as long as the vocabulary and was made in the head
    activations   what outlived the segment that made it: kept for the backward, passed on to the next layer, recorded
    workspace     what did not

A segment begins where a layer or the head is called, and where the gradient of a layer's output arrives; it ends where
the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrib.tracker import Tracker

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSES = ("weights", "gradients", "optimizer", "activations", "logits", "workspace")
aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """`phase` is start, forward, head or backward; `layer` is -1 outside the layers."""

    phase: str
    layer: int = -1


@dataclass(eq=False)
class Block:
    """A storage. `made_in` and `freed_in` are numbers of segments."""

    size_bytes: int
    made_in: int
    known: str | None
    freed_in: int | None = None

    @property
    def kind(self) -> str:
        return self.known or ("workspace" if self.freed_in == self.made_in else "activations")


@dataclass(frozen=True)
class Segment:
    """`bytes_NC`: live bytes of each of CLASSES after each of N allocations."""

    place: Place
    bytes_NC: NDArray[Any]


class Trace(Tracker):  # type: ignore[no-untyped-call]
    """What a model that is watched does between `begin` and `end`, any number of times. `products` and `attention`
    are their FLOPs, causal attention's at half."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.attention = 0
        self._blocks: dict[int, Block] = {}
        self._changes: list[tuple[Block, int]] = []
        self._marks: list[tuple[int, Place]] = [(0, Place("start"))]
        self._segment = 0
        self._vocabulary = 0

    def watch(self, model: Any, layers: list[nn.Module]) -> None:
        """Mark the model's segments, and count its weights."""
        self._vocabulary = model.config.vocab_size
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._entering(Place("forward", index)))
            layer.register_forward_hook(self._on_gradient(Place("backward", index)))
        model.get_output_embeddings().register_forward_pre_hook(self._entering(Place("head")))
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor.untyped_storage()) not in self._known:
                self.count(tensor)
                self._of(tensor).known = "weights"

    def begin(self, model: nn.Module) -> None:
        """Gradients that are there already are gradients."""
        self._name_gradients(model)
        self.products = self.attention = 0
        self._changes = [(block, 1) for block in self._blocks.values()]
        self._marks = []
        self._mark(Place("start"))

    def end(self, model: nn.Module) -> list[Segment]:
        import numpy as np

        self._name_gradients(model)
        changes_NC = np.zeros((len(self._changes), len(CLASSES)))
        for index, (block, sign) in enumerate(self._changes):
            changes_NC[index, CLASSES.index(block.kind)] = sign * block.size_bytes
        live_NC = changes_NC.cumsum(0)
        grew_N = np.array([sign > 0 for _, sign in self._changes])
        marks = [*self._marks, (len(self._changes), Place("end"))]
        found = []
        for (start, place), (stop, _) in pairwise(marks):
            if grew_N[start:stop].any():
                found.append(Segment(place, live_NC[start:stop][grew_N[start:stop]]))
        return found

    def count(self, tensor: Tensor, func: Any = None, args: Any = ()) -> None:
        before = self.live_bytes
        super().count(tensor, func, args)
        known = None
        if func is aten._to_copy.default and self._of(args[0]).known == "weights":
            known = "weights"
        elif self._marks[-1][1].phase == "head" and self._vocabulary in tensor.shape:
            known = "logits"
        block = Block(self.live_bytes - before, self._segment, known)
        self._blocks[id(tensor.untyped_storage())] = block
        self._changes.append((block, 1))

    def forget(self, key: int, size_bytes: int) -> None:
        super().forget(key, size_bytes)
        block = self._blocks.pop(key)
        block.freed_in = self._segment
        self._changes.append((block, -1))

    def note(self, func: Any, args: Any) -> None:
        packet = func.overloadpacket
        if packet in (aten.mm, aten.bmm):
            self.products += _product(*args[:2])
        elif packet in (aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_):
            self.products += _product(*args[1:3])
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            query, key, value, *options = args
            self.attention += _attention(query, key, value, causal=len(options) > 1 and options[1])
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            # Scores again, and the gradients of query, key, value and weights.
            _, query, key, value, _, _, _, causal = args[:8]
            self.attention += _attention(query, key, value, causal) * 5 // 2

    def _of(self, tensor: Tensor) -> Block:
        return self._blocks[id(tensor.untyped_storage())]

    def _name_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                self._of(parameter.grad).known = "gradients"

    def _mark(self, place: Place) -> None:
        self._segment += 1
        self._marks.append((len(self._changes), place))

    def _entering(self, place: Place) -> Callable[..., None]:
        return lambda *_: self._mark(place)

    def _on_gradient(self, place: Place) -> Callable[..., None]:
        def hang(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(self._entering(place))

        return hang


def _product(first: Tensor, second: Tensor) -> int:
    return 2 * first.numel() * second.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> int:
    whole = 2 * query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    return whole // 2 if causal else whole
