"""Classes and segments of a run without data, on a model whose every tensor is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distrib.trace import CLASSES, Place, Trace
from distrib.tracker import materialise, tracking

ROWS, WIDTH, VOCABULARY = 32, 64, 100
HIDDEN = 4 * ROWS * WIDTH
SQUARE = 4 * WIDTH * WIDTH
HEAD = 4 * VOCABULARY * WIDTH
LOGITS = 4 * ROWS * VOCABULARY


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        twice = hidden * 2
        return twice @ self.weight


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=VOCABULARY)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden).sum()


def traced() -> tuple[dict[Place, dict[str, list[int]]], Trace]:
    fake, trace = FakeTensorMode(), Trace()
    with torch.device("meta"):
        model: Any = Model()
    materialise(model, fake)
    with tracking(fake, trace):
        trace.watch(model, list(model.layers))
        # Whatever is traced first leaves nothing in what is traced then.
        for rows in (3, ROWS):
            model.zero_grad()
            hidden = torch.zeros(rows, WIDTH)
            trace.begin(model)
            model(hidden).backward()
            segments = trace.end(model)
    found = {
        segment.place: {name: segment.bytes_NC[:, at].astype(int).tolist() for at, name in enumerate(CLASSES)}
        for segment in segments
    }
    return found, trace


def test_every_class_is_counted_in_its_segment() -> None:
    found, _ = traced()
    second = found[Place("forward", 1)]
    # The input; of the first layer its doubled input and its output; then the same of this one.
    assert second["activations"] == [HIDDEN * 4, HIDDEN * 5]
    assert set(second["weights"]) == {3 * SQUARE + HEAD}
    assert set(second["workspace"]) == set(second["gradients"]) == set(second["logits"]) == {0}
    head = found[Place("head")]
    assert max(head["logits"]) == LOGITS
    assert max(head["gradients"]) == HEAD
    backward = found[Place("backward", 1)]
    assert max(backward["gradients"]) == HEAD + 2 * SQUARE
    assert max(backward["logits"]) == 0


def test_what_a_layer_uses_up_is_workspace() -> None:
    found, _ = traced()
    # In the first layer's backward nothing wants the gradient of its input.
    first = found[Place("backward", 0)]
    assert max(first["gradients"]) == HEAD + 3 * SQUARE
    # Elsewhere the gradient of the doubled input is made and used.
    assert max(found[Place("backward", 1)]["workspace"]) == HIDDEN


def test_products_are_counted() -> None:
    _, trace = traced()
    forward = 2 * ROWS * WIDTH * (3 * WIDTH + VOCABULARY)
    # Twice that backwards, but for the gradient of the first layer's input.
    assert trace.products == 3 * forward - 2 * ROWS * WIDTH * WIDTH
    assert trace.attention == 0
