"""Can a layer be run in chunks? Found out by doing it, at a tiny length, before the first real batch.

The backbone runs on a few tokens twice: once as it is, where every layer's outputs and gradients are noted, and
once with the streaming attention, where every layer runs in chunks and must give the same. A layer that does not,
because it mixes positions in other ways than by keys and values, is run whole: recomputed in the backward like any
checkpointed layer. No list of families is involved, and nothing that fails is trained with.

Everything happens inside the layers' own calls, with gradients asked of copies, so that it works under every
engine and leaves no gradient behind.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distrib.contracts import IGNORE
from distrib.errors import Refused
from strategies.core.edits import original_class
from strategies.streaming.arguments import Layout, Path, Rows, cut_of, learn, named_arguments, walk
from strategies.streaming.implementation import NAME, using_attention
from strategies.streaming.layer import Bare, LayerRun, put, split, tensors
from strategies.streaming.replay import Circumstances
from strategies.streaming.store import StreamCache, Unstreamable

LENGTH = 23
CHUNK = 8
ROWS = 2
SAMPLE = 4096
BOUND = {torch.float64: 1e-9, torch.float32: 1e-3}
HALF_BOUND = {torch.bfloat16: 5e-2, torch.float16: 1e-2}

log = logging.getLogger("ebbtide")


@dataclass(frozen=True)
class Outcome:
    """A layer's outputs and a sample of its gradients."""

    outputs: list[Tensor]
    gradients: list[Tensor]

    def difference(self, other: Outcome) -> float:
        """The largest relative one; infinite for other shapes or anything that is not a number."""
        pairs = [*zip(self.outputs, other.outputs, strict=True), *zip(self.gradients, other.gradients, strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            return float("inf")
        scale = max((a.norm().item() for a in self.gradients), default=0.0)
        found = [(a - b).norm().item() / max(a.norm().item(), 1e-3 * scale, 1e-30) for a, b in pairs]
        return max((x if x == x else float("inf") for x in found), default=0.0)


def try_layers(backbone: nn.Module, layers: list[nn.Module], quiet: bool = False) -> tuple[str | None, list[Layout]]:
    """The attention to use, and how each layer is run; Refused when one of them is not even right as a whole."""
    truths: dict[int, Outcome] = {}
    _run_through(backbone, layers, None, lambda index, trial: truths.__setitem__(index, trial.as_it_is()))
    refusal: Exception | None = None
    for attention in (NAME, None):
        layouts: dict[int, Layout] = {}

        def choose(index: int, trial: Trial, layouts: dict[int, Layout] = layouts) -> None:
            layouts[index] = trial.best(truths[index])

        try:
            _run_through(backbone, layers, attention, choose)
        except Exception as error:
            refusal = error
            continue
        found = [layouts[index] for index in range(len(layers))]
        if not quiet:
            _tell(layers, found)
        return attention, found
    raise Refused(f"{type(backbone).__name__} cannot be streamed: {_line(refusal)}") from refusal


def _tell(layers: list[nn.Module], layouts: list[Layout]) -> None:
    whole = Counter((type(x).__name__, y.whole) for x, y in zip(layers, layouts, strict=True) if y.whole)
    for (name, why), count in whole.items():
        log.warning("%d of %d layers (%s) run whole, not in chunks: %s", count, len(layers), name, why)


def _line(error: Exception | None) -> str:
    return " ".join(str(error).split())[:200]


def _run_through(
    backbone: nn.Module, layers: list[nn.Module], attention: str | None, visit: Callable[[int, Trial], None]
) -> None:
    """The backbone's forward on a few tokens, in evaluation mode and full precision, each layer's call visited."""
    ids_BT = _tokens(backbone)
    with (
        torch.no_grad(),
        torch.autocast(ids_BT.device.type, enabled=False),
        using_attention(backbone, attention),
        evaluating_parts(backbone),
        _visited(layers, attention, visit),
    ):
        original_class(backbone).forward(backbone, input_ids=ids_BT, use_cache=False)


def _tokens(backbone: nn.Module) -> Tensor:
    device = next(backbone.parameters()).device
    vocabulary = int(backbone.config.vocab_size)  # type: ignore[union-attr,arg-type]
    return (torch.arange(ROWS * LENGTH, device=device).view(ROWS, LENGTH) * 7 + 1) % vocabulary


@contextmanager
def evaluating_parts(module: nn.Module) -> Iterator[None]:
    """Dropout off, and every part as it was afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def try_model(module: nn.Module, model: nn.Module, layers: list[nn.Module]) -> str | None:
    """The attention with which a whole model runs in chunks; Refused when a layer, or what is between them, cannot.

    `module` is what an engine has around `model`: engines want to be entered from outside.
    """
    backbone: Any = model.base_model
    found: list[str | None] = []

    def forward(**kwargs: Any) -> Any:
        attention, layouts = try_layers(backbone, layers, quiet=True)
        whole = [(layer, layout.whole) for layer, layout in zip(layers, layouts, strict=True) if layout.whole]
        if whole:
            layer, why = whole[0]
            raise Refused(f"{len(whole)} of {len(layers)} layers ({type(layer).__name__}) cannot run in chunks: {why}")
        if any(layout.dense for layout in layouts):
            attention = None
        _compare_chunked(backbone, attention)
        found.append(attention)
        return original_class(backbone).forward(backbone, **kwargs)

    ids_BT = _tokens(backbone)
    vars(backbone)["forward"] = forward
    try:
        with evaluating_parts(module):
            module(input_ids=ids_BT, shift_labels=torch.full_like(ids_BT, IGNORE), use_cache=False)
    finally:
        vars(backbone).pop("forward")
    return found[0]


def _compare_chunked(backbone: nn.Module, attention: str | None) -> None:
    """The hidden states of a run in chunks are those of a run at once."""
    ids_BT, cache = _tokens(backbone), StreamCache(LENGTH)
    own = original_class(backbone).forward
    with evaluating_parts(backbone), torch.autocast(ids_BT.device.type, enabled=False):
        wanted = own(backbone, input_ids=ids_BT, use_cache=False)[0]
        parts = []
        for start, stop in split(LENGTH, CHUNK):
            cache.position.move(start, stop)
            with using_attention(backbone, attention):
                output = own(backbone, input_ids=ids_BT[:, start:stop], past_key_values=cache, use_cache=True)
            parts.append(output[0])
    difference = (torch.cat(parts, 1) - wanted).norm() / wanted.norm()
    if not difference < HALF_BOUND.get(wanted.dtype, BOUND.get(wanted.dtype, 0.0)):
        raise Refused(f"{type(backbone).__name__} gives other hidden states in chunks, by {difference:.1e}")


@contextmanager
def _visited(
    layers: list[nn.Module], attention: str | None, visit: Callable[[int, Trial], None]
) -> Iterator[None]:
    def visiting(index: int, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            own = original_class(layer).forward
            visit(index, Trial(layer, attention, named_arguments(own, layer, args, kwargs)))
            return own(layer, *args, **kwargs)

        return forward

    for index, layer in enumerate(layers):
        vars(layer)["forward"] = visiting(index, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward")


class Trial(nn.Module):
    """One layer's call, to be run in several ways with gradients, in float32 at least."""

    def __init__(self, layer: nn.Module, attention: str | None, named: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.attention = attention
        self.named: dict[str, Any] = walk(named, lambda _, value: _exact(value))

    def as_it_is(self) -> Outcome:
        """By autograd alone."""
        for name, value in self.named.items():
            if isinstance(value, MutableMapping) and not isinstance(value, dict) or (type(value) is dict and value):
                raise Refused(f"layers of {type(self.layer).__name__} hand each other state in {name!r}")
        return self._copied(self._plainly)

    def best(self, truth: Outcome) -> Layout:
        """The first way that gives the same: in chunks if it can be."""
        masked = [value for value in self.named.values() if isinstance(value, Rows)]
        reasons: list[str] = []
        for whole in (False, True):
            for dense in (False, True) if masked else (False,):
                layout = Layout(dense=dense, whole=reasons[0] if whole else None)
                try:
                    layout.outputs = [cut_of(output, LENGTH).own for output in truth.outputs]
                    found = self._copied(lambda layout=layout: self._streamed(layout))  # type: ignore[misc]
                    difference = truth.difference(found)
                except Exception as error:
                    reasons.append(_line(error) or type(error).__name__)
                    continue
                if difference < BOUND[found.outputs[0].dtype]:
                    return layout
                reasons.append(f"its gradients differ by {difference:.1e}")
        raise Unstreamable(f"{type(self.layer).__name__}: {reasons[-1]}")

    def _copied(self, run: Callable[[], Outcome]) -> Outcome:
        """`run` while the layer's parameters are copies, which take gradients without anyone noticing."""
        copies = {}
        for name, parameter in self.layer.named_parameters():
            copies[f"layer.{name}"] = _exact(parameter.detach()).requires_grad_(parameter.requires_grad)
        outcome: Outcome = functional_call(self, copies, (run,))
        return outcome

    def forward(self, run: Callable[[], Outcome]) -> Outcome:
        return run()

    def _plainly(self) -> Outcome:
        paths, inputs = self._inputs()
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = tensors(Bare(self.layer)(**put(self.named, paths, tuple(leaves))))
            pairs = [(y, by) for y, by in zip(outputs, _cotangents(outputs), strict=True) if y.requires_grad]
            gradients = torch.autograd.grad(
                [y for y, _ in pairs], [*leaves, *parameters], [by for _, by in pairs], materialize_grads=True
            )
        return Outcome([y.detach() for y in outputs], [_sample(g) for g in gradients])

    def _streamed(self, layout: Layout) -> Outcome:
        paths, inputs = self._inputs()
        layout.cuts.update(learn(self.named, LENGTH))
        chunks = [(0, LENGTH)] if layout.whole else split(LENGTH, CHUNK)
        circumstances = Circumstances.of(self.layer, inputs[0].device)
        run = LayerRun(
            self.layer, layout, self.attention, chunks, self.named, paths, inputs[0].dtype, circumstances
        )
        outputs = run.forward(tuple(inputs))
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        wanted = (True,) * (len(inputs) + len(parameters))
        found = run.backward(tuple(inputs), tuple(_cotangents(list(outputs))), wanted)
        given = [*inputs, *parameters]
        gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(given, found, strict=True)]
        return Outcome(list(outputs), [_sample(g) for g in gradients])

    def _inputs(self) -> tuple[list[Path], list[Tensor]]:
        """The tensors that may want a gradient: floating ones with an entry for each position."""
        paths: list[Path] = []
        inputs: list[Tensor] = []

        def take(path: Path, value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
                cut = cut_of(value, LENGTH)
                if cut.own is not None and cut.seen is None:
                    paths.append(path)
                    inputs.append(value)
            return value

        walk(self.named, take)
        return paths, inputs


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
        return value.float()
    return value


def _cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """The same for the same shapes, different at every entry."""
    made = []
    for number, output in enumerate(outputs):
        generator = torch.Generator().manual_seed(number)
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        made.append(drawn.to(output.device, output.dtype if output.is_floating_point() else torch.float32))
    return made


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)].clone()
