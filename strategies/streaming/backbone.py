"""The part of a model that calls its layers: found, run on a few tokens, and held to one gradient from end to end.

Layers that are right one by one may still hand each other something beside their arguments. So where no engine has
cut the weights into shards, the gradient that reaches the embedding must be the one of the model as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distrib.errors import Refused
from distrib.units import blocks
from strategies.core.edits import original_class

LENGTH = 23
CHUNK = 8
ROWS = 2
BOUND = {torch.float64: 1e-9, torch.float32: 1e-3}
# A whole model of rounding, and experts that change hands: only what is lost altogether can be told from it.
HALF_BOUND = 0.5


def find_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Its blocks by name; some models declare their embeddings among them."""
    return [(name, block) for name, block in blocks(model) if next(iter(takes(block)), None) != "input_ids"]


def takes(module: nn.Module) -> list[str]:
    """The names of its forward's arguments."""
    return list(inspect.signature(original_class(module).forward).parameters)[1:]


def find_backbone(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The innermost part that takes token ids and has all the layers."""
    found = None
    for part in model.modules():
        if "input_ids" in takes(part):
            inside = {id(module) for module in part.modules()}
            if all(id(layer) in inside for layer in layers):
                found = part
    if found is None or found is model:
        raise Refused(f"{type(model).__name__}: no part of it, below the head, takes token ids and runs the layers")
    return found


def tokens(backbone: nn.Module) -> Tensor:
    device = next(backbone.parameters()).device
    vocabulary = int(backbone.config.vocab_size)  # type: ignore[union-attr,arg-type]
    return (torch.arange(ROWS * LENGTH, device=device).view(ROWS, LENGTH) * 7 + 1) % vocabulary


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off, and every part as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def precision_of(run: Callable[[], object]) -> torch.dtype:
    """The coarsest type in which a computation keeps something for its backward: models do parts in float32.

    Its graph is of no use: what is changed in place after it was kept goes unnoticed under these hooks.
    """
    found = [torch.float64]

    def note(kept: Tensor) -> Tensor:
        if kept.is_floating_point() and torch.finfo(kept.dtype).eps > torch.finfo(found[0]).eps:
            found[0] = kept.dtype
        # An output that is kept with its history is kept by itself, and the graph with it for ever.
        return kept.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        run()
    return found[0]


def cotangent(output: Tensor, number: int = 0) -> Tensor:
    """The same for the same shapes, different at every entry."""
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return drawn.to(output.device, output.dtype if output.is_floating_point() else torch.float32)


def is_sharded(module: nn.Module) -> bool:
    """Whether an engine gathers its weights: then it must be entered from outside, and not for a trial."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())


def refuse_lost_gradients(backbone: nn.Module, streamed: Callable[[], Iterator[Tensor]]) -> None:
    """Refused when the hidden states that `streamed` gives, at once or in chunks with the last one first, leave the
    embedding another gradient than those of the model as it is."""

    def at_once() -> Tensor:
        return _input_gradient(backbone, lambda: iter([hidden_states(backbone)]))

    with evaluating(backbone), torch.autocast(next(backbone.parameters()).device.type, enabled=False):
        try:
            # With the gradient: where all is frozen, as in a reference's turn, nothing else is kept.
            precision = precision_of(at_once)
            wanted_BTD = at_once()
            found_BTD = _input_gradient(backbone, streamed)
        except Exception as error:
            raise Refused(f"{type(backbone).__name__} cannot be compared with itself: {one_line(error)}") from error
    difference = ((found_BTD - wanted_BTD).norm() / wanted_BTD.norm()).item()
    if not difference < BOUND.get(precision, HALF_BOUND):
        raise Refused(
            f"{type(backbone).__name__} gives its embedding another gradient in chunks, by {difference:.1e}: its "
            "layers share more than their arguments"
        )


def one_line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:200]


def hidden_states(backbone: nn.Module) -> Tensor:
    """[B, T, D] of the few tokens, by the backbone's own forward."""
    output: Tensor = original_class(backbone).forward(backbone, input_ids=tokens(backbone), use_cache=False)[0]
    return output


def _input_gradient(backbone: Any, run: Callable[[], Iterator[Tensor]]) -> Tensor:
    """[B, T, D] of the embedding's output."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        # Some models scale it in place, which a leaf cannot be.
        return leaves[-1].clone()

    handle = backbone.get_input_embeddings().register_forward_hook(cut)
    parts: list[Tensor] = []
    stop = LENGTH
    try:
        with torch.enable_grad():
            for hidden_BCD in run():
                start = stop - hidden_BCD.shape[1]
                whole_BTD = hidden_BCD.new_empty(ROWS, LENGTH, hidden_BCD.shape[-1])
                by_BCD = cotangent(whole_BTD)[:, start:stop]
                parts.insert(0, torch.autograd.grad(hidden_BCD, leaves[-1], by_BCD)[0])
                stop = start
    finally:
        handle.remove()
    return torch.cat(parts, 1)
