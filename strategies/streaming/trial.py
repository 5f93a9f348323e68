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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Cache

from distrib.contracts import IGNORE
from distrib.errors import Refused
from strategies.core.edits import original_class
from strategies.streaming.arguments import Layout, Path, cut_of, learn, named_arguments, walk
from strategies.streaming.backbone import (
    BOUND,
    CHUNK,
    LENGTH,
    ROWS,
    cotangent,
    evaluating,
    find_backbone,
    hidden_states,
    is_sharded,
    one_line,
    precision_of,
    refuse_lost_gradients,
    takes,
    tokens,
)
from strategies.streaming.implementation import NAME, using_attention
from strategies.streaming.layer import Bare, LayerRun, put, split, tensors
from strategies.streaming.replay import Circumstances
from strategies.streaming.store import StreamCache, Unstreamable, forget
from strategies.streaming.visibility import Rows

SAMPLE = 4096
HALF_BOUND = {torch.bfloat16: 5e-2, torch.float16: 1e-2}

log = logging.getLogger("ebbtide")


@dataclass(frozen=True)
class Outcome:
    """A layer's outputs, a sample of its gradients, and how exactly they can be compared."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    bound: float = 0.0

    def difference(self, other: Outcome) -> float:
        """The largest relative one; infinite for other shapes or anything that is not a number."""
        pairs = [*zip(self.outputs, other.outputs, strict=True), *zip(self.gradients, other.gradients, strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            return float("inf")
        scale = max((a.norm().item() for a in self.gradients), default=0.0)
        found = [_distance(a.double(), b.double(), 1e-3 * scale) for a, b in pairs]
        return max((x if x == x else float("inf") for x in found), default=0.0)


def _distance(one: Tensor, other: Tensor, least: float) -> float:
    return float((one - other).norm() / max(one.norm().item(), least, 1e-30))


Calls = dict[int, list[Outcome]]
"""By the layer's number: some models call a layer several times."""


def try_layers(backbone: nn.Module, layers: list[nn.Module], quiet: bool = False) -> tuple[str | None, list[Layout]]:
    """The attention to use, and how each layer is run; Refused when one of them is not even right as a whole."""
    truths: Calls = {index: [] for index in range(len(layers))}
    kept: dict[int, str] = {}
    outputs: dict[int, list[Any]] = {}
    try:
        _run_through(backbone, layers, None, lambda index, trial: truths[index].append(trial.as_it_is()), outputs, kept)
    except Exception as error:
        raise Refused(f"{type(backbone).__name__} cannot be tried: {one_line(error)}") from error
    refusal: Exception | None = None
    for attention in (NAME, None):
        try:
            found = _layouts(backbone, layers, attention, truths, outputs, kept)
        except Exception as error:
            refusal = error
            continue
        if not quiet:
            _tell(layers, found)
        return attention, found
    raise Refused(f"{type(backbone).__name__} cannot be streamed: {one_line(refusal)}") from refusal


def _layouts(
    backbone: nn.Module,
    layers: list[nn.Module],
    attention: str | None,
    truths: Calls,
    outputs: dict[int, list[Any]],
    kept: dict[int, str],
) -> list[Layout]:
    layouts = [Layout(kept=kept.get(index), whole=kept.get(index)) for index in range(len(layers))]
    calls = Counter[int]()

    def choose(index: int, trial: Trial) -> None:
        if index not in kept:
            layouts[index] = trial.best(truths[index][calls[index]], layouts[index] if calls[index] else None)
        calls[index] += 1

    _run_through(backbone, layers, attention, choose, outputs)
    for index, layout in enumerate(layouts):
        if not calls[index]:
            layout.kept = layout.whole = "the model did not call it"
    return layouts


def _tell(layers: list[nn.Module], layouts: list[Layout]) -> None:
    whole = Counter((type(x).__name__, y.whole) for x, y in zip(layers, layouts, strict=True) if y.whole)
    for (name, why), count in whole.items():
        log.warning("%d of %d layers (%s) run whole, not in chunks: %s", count, len(layers), name, why)


def _run_through(
    backbone: nn.Module,
    layers: list[nn.Module],
    attention: str | None,
    visit: Callable[[int, Trial], None],
    outputs: dict[int, list[Any]],
    kept: dict[int, str] | None = None,
) -> None:
    """The backbone's forward on a few tokens, in evaluation mode and full precision, each layer's call visited.

    The first time (with `kept`) `outputs` gets what the layers return, afterwards they return that again: in half
    precision another attention's rounding would reach the layers above. `kept` gets the layers that put tensors into
    their arguments, for others to find there.
    """
    calls = Counter[int]()

    def visiting(index: int, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            own = original_class(layer).forward
            named = named_arguments(own, layer, args, kwargs)
            visit(index, Trial(layer, attention, named))
            before = _held(named)
            output = own(layer, *args, **kwargs)
            if kept is None:
                calls[index] += 1
                return walk(outputs[index][calls[index] - 1], lambda _, value: value.clone())
            if _held(named) != before:
                kept[index] = "it hands tensors to other layers in its arguments"
            outputs.setdefault(index, []).append(walk(output, lambda _, value: value.clone()))
            return output

        return forward

    device = next(backbone.parameters()).device
    # What a packed batch will bring must be known by then.
    position_BT = torch.arange(LENGTH, device=device).repeat(ROWS, 1)
    positions = {"position_ids": position_BT} if "position_ids" in takes(backbone) else {}
    for index, layer in enumerate(layers):
        vars(layer)["forward"] = visiting(index, layer)
    try:
        with (
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            using_attention(backbone, attention),
            evaluating(backbone),
        ):
            original_class(backbone).forward(backbone, input_ids=tokens(backbone), use_cache=False, **positions)
    finally:
        for layer in layers:
            vars(layer).pop("forward")


def _held(named: dict[str, Any]) -> list[int]:
    found: list[int] = []
    walk(named, lambda _, value: found.append(id(value)))
    return found


def try_model(module: nn.Module, model: nn.Module, layers: list[nn.Module]) -> str | None:
    """The attention with which a whole model runs in chunks; Refused when a layer, or what is between them, cannot.

    `module` is what an engine has around `model`, as engines want to be entered from outside; or the part of it below
    the head.
    """
    backbone: Any = find_backbone(model, layers)
    found: list[str | None] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        attention, layouts = try_layers(backbone, layers, quiet=True)
        whole = [(layer, layout.whole) for layer, layout in zip(layers, layouts, strict=True) if layout.whole]
        if whole:
            layer, why = whole[0]
            raise Refused(f"{len(whole)} of {len(layers)} layers ({type(layer).__name__}) cannot run in chunks: {why}")
        if any(layout.dense for layout in layouts):
            attention = None
        _try_chunks(backbone, attention)
        found.append(attention)
        return original_class(backbone).forward(backbone, *args, **kwargs)

    ids_BT = tokens(backbone)
    vars(backbone)["forward"] = forward
    try:
        with evaluating(module):
            unlearned = {} if module is backbone else {"shift_labels": torch.full_like(ids_BT, IGNORE)}
            module(input_ids=ids_BT, use_cache=False, **unlearned)
    finally:
        vars(backbone).pop("forward")
    return found[0]


def _try_chunks(backbone: nn.Module, attention: str | None) -> None:
    """The hidden states of a run in chunks are those of a run at once, and so is their gradient."""
    device = next(backbone.parameters()).device
    with evaluating(backbone), torch.autocast(device.type, enabled=False), torch.no_grad():
        wanted = hidden_states(backbone)
        cache = StreamCache(LENGTH)
        try:
            parts = [_chunk(backbone, attention, cache, start, stop) for start, stop in split(LENGTH, CHUNK)]
        except Exception as error:
            raise Refused(f"{type(backbone).__name__} does not run in chunks: {one_line(error)}") from error
    difference = (torch.cat(parts, 1) - wanted).norm() / wanted.norm()
    if not difference < HALF_BOUND.get(wanted.dtype, BOUND[torch.float32]):
        raise Refused(f"{type(backbone).__name__} gives other hidden states in chunks, by {difference:.1e}")
    if not is_sharded(backbone):
        refuse_lost_gradients(backbone, lambda: _chunks_backwards(backbone, attention))


def _chunks_backwards(backbone: nn.Module, attention: str | None) -> Iterator[Tensor]:
    """The hidden states of each chunk with its graph, the last one first."""
    cache, bounds = StreamCache(LENGTH), split(LENGTH, CHUNK)
    with torch.no_grad():
        for start, stop in bounds:
            _chunk(backbone, attention, cache, start, stop)
    for start, stop in reversed(bounds):
        yield _chunk(backbone, attention, cache, start, stop, writes=False)


def _chunk(
    backbone: nn.Module, attention: str | None, cache: StreamCache, start: int, stop: int, writes: bool = True
) -> Tensor:
    cache.position.move(start, stop, writes)
    ids_BC = tokens(backbone)[:, start:stop]
    with using_attention(backbone, attention):
        own = original_class(backbone).forward
        output: Tensor = own(backbone, input_ids=ids_BC, past_key_values=cache, use_cache=True)[0]
    forget()
    return output


class Trial(nn.Module):
    """One layer's call, to be run in several ways with gradients, in float32 at least."""

    def __init__(self, layer: nn.Module, attention: str | None, named: dict[str, Any]) -> None:
        super().__init__()
        self.layer = layer
        self.attention = attention
        self.named: dict[str, Any] = walk(named, lambda _, value: _exact(value))

    def as_it_is(self) -> Outcome:
        """By autograd alone."""
        first = next(iter(self.named.values()), None)
        if not isinstance(first, Tensor) or LENGTH not in first.shape[1:-1]:
            raise Unstreamable(f"{type(self.layer).__name__} takes other things first than [rows, positions, size]")
        if any(isinstance(value, Cache) for value in self.named.values()):
            raise Unstreamable(f"{type(self.layer).__name__} is given a cache in spite of use_cache=False")
        return self._copied(self._plainly)

    def best(self, truth: Outcome, earlier: Layout | None) -> Layout:
        """The first way that gives the same: in chunks if it can be. `earlier` is the way of an earlier call."""
        masked = any(isinstance(value, Rows) for value in self.named.values())
        reasons = [earlier.whole] if earlier and earlier.whole else []
        for whole in (False, True)[len(reasons) :]:
            for dense in (False, True) if masked else (False,):
                layout = Layout(dict(earlier.cuts) if earlier else {}, dense=dense, whole=reasons[0] if whole else None)
                try:
                    layout.outputs = [cut_of(output, LENGTH).own for output in truth.outputs]
                    found = self._copied(lambda layout=layout: self._streamed(layout))  # type: ignore[misc]
                    difference = truth.difference(found)
                except Exception as error:
                    said = isinstance(error, Unstreamable | Refused)
                    kind = "" if said else f"it fails in chunks, {type(error).__name__}: "
                    reasons.append(kind + one_line(error))
                    continue
                if difference < truth.bound:
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
        bound = BOUND[precision_of(lambda: Bare(self.layer)(**self.named))]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            outputs = tensors(Bare(self.layer)(**put(self.named, paths, tuple(leaves))))
            pairs = [(y, by) for y, by in zip(outputs, map(cotangent, outputs), strict=True) if y.requires_grad]
            gradients = torch.autograd.grad(
                [y for y, _ in pairs], [*leaves, *parameters], [by for _, by in pairs], materialize_grads=True
            )
        return Outcome([y.detach() for y in outputs], [_sample(g) for g in gradients], bound)

    def _streamed(self, layout: Layout) -> Outcome:
        paths, inputs = self._inputs()
        layout.cuts.update(learn(self.named, LENGTH))
        chunks = [(0, LENGTH)] if layout.whole else split(LENGTH, CHUNK)
        circumstances = Circumstances.of(self.layer, inputs[0].device)
        run = LayerRun(self.layer, layout, self.attention, chunks, self.named, paths, inputs[0].dtype, circumstances)
        outputs = run.forward(tuple(inputs))
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        wanted = (True,) * (len(inputs) + len(parameters))
        found = run.backward(tuple(inputs), tuple(map(cotangent, outputs)), wanted)
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


def _sample(gradient: Tensor) -> Tensor:
    flat = gradient.detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE)].clone()
