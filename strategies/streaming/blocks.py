"""The decoder layers of a model, run in chunks: two mixins and what they share.

The backbone's forward switches the attention and says when layers stream; each layer then runs as `LayerRun` does.
Before the first time, a trial at a tiny length decides how each of them can be (`strategies/streaming/trial.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distrib.errors import Refused
from strategies.core.checkpointing import RecomputesItself
from strategies.core.edits import original_class
from strategies.streaming.arguments import Layout, Path, Slot, named_arguments, walk
from strategies.streaming.backbone import CHUNK, hidden_states, is_sharded, refuse_lost_gradients
from strategies.streaming.implementation import using_attention
from strategies.streaming.layer import LayerRun, split
from strategies.streaming.offload import Away, Shelf
from strategies.streaming.replay import Circumstances
from strategies.streaming.trial import try_layers
from strategies.streaming.unshared import not_shared
from strategies.streaming.visibility import Spread, stripes, within


@dataclass
class Streaming:
    """What the layers of one model share. `attention` and `tried` come from the trial."""

    chunk: int | None
    offload: bool
    quiet: bool
    running: bool = False
    tried: bool = False
    attention: str | None = None
    shelf: Shelf = field(default_factory=Shelf)

    @contextmanager
    def on(self, backbone: nn.Module) -> Iterator[None]:
        self.running = True
        try:
            with using_attention(backbone, self.attention):
                yield
        finally:
            self.running = False


@dataclass
class Block:
    """What one layer keeps. `backwards` counts, so that a loop can be shown to have streamed."""

    streaming: Streaming
    layout: Layout = field(default_factory=Layout)
    backwards: int = 0


BOUNDS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""Where packed documents begin, as other kernels take it."""

AUTO_POSITIONS = {"cpu": 1024, "cuda": 4096}


def chunk_of(chunk: int | None, hidden_BTD: Tensor) -> int:
    """A rank's positions of a chunk: as given, or as many as keep products fast and a chunk's activations small."""
    if chunk is None:
        chunk = max(128, AUTO_POSITIONS[hidden_BTD.device.type] // hidden_BTD.shape[0])
    return -(-chunk // stripes().ranks)


class StreamedBackbone:
    """Mixed into the part of the model that calls the layers."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward: Callable[..., Any] = super().forward  # type: ignore[misc]
        streaming: Streaming = self._ebbtide_streaming
        training = self.training and torch.is_grad_enabled()
        if kwargs.get("past_key_values") is not None or not (training or kwargs.get("use_cache") is False):
            return forward(*args, **kwargs)
        for name in ("output_attentions", "output_router_logits"):
            if kwargs.get(name):
                raise Refused(f"{name}=True: layers that stream do not keep them; leave it off")
        if kwargs.get("position_ids") is None and not BOUNDS.isdisjoint(kwargs):
            raise Refused(
                f"{min(BOUNDS.intersection(kwargs))} without position_ids: pass those of packed documents too"
            )
        if "use_cache" in inspect.signature(original_class(self).forward).parameters:
            kwargs["use_cache"] = False
        if not streaming.tried:
            ranks = stripes().ranks
            # Each rank tries the layers alone.
            with within(Spread()):
                try_streaming(self, streaming)
            if ranks > 1:
                refuse_unshared(self, streaming, ranks)
        with streaming.on(self):
            return forward(*args, **kwargs)


def try_streaming(backbone: nn.Module, streaming: Streaming) -> None:
    """Find out how each layer is run, and that together they give the model's gradient."""
    layers: list[Any] = [part for part in backbone.modules() if "_ebbtide_block" in vars(part)]
    streaming.attention, layouts = try_layers(backbone, layers, quiet=streaming.quiet)
    for layer, layout in zip(layers, layouts, strict=True):
        layer._ebbtide_block.layout = layout
    if not is_sharded(backbone):
        chunk, streaming.chunk = streaming.chunk, CHUNK

        def streamed() -> Iterator[Tensor]:
            with streaming.on(backbone):
                yield hidden_states(backbone)

        try:
            refuse_lost_gradients(backbone, streamed)
        finally:
            streaming.chunk = chunk
        for layer in layers:
            layer._ebbtide_block.backwards = 0
    streaming.tried = True


def refuse_unshared(backbone: nn.Module, streaming: Streaming, ranks: int) -> None:
    """What does not go through the attention in chunks does not exchange anything with other ranks."""
    layers: list[Any] = [part for part in backbone.modules() if "_ebbtide_block" in vars(part)]
    layouts: list[Layout] = [layer._ebbtide_block.layout for layer in layers]
    if streaming.attention is None or any(layout.whole or layout.dense for layout in layouts):
        raise not_shared(backbone, ranks)


class StreamedBlock(RecomputesItself):
    """Mixed into a decoder layer."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        block: Block = self._ebbtide_block
        if not block.streaming.running or block.layout.kept:
            if not block.layout.kept:
                refuse_recomputation()
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        named = named_arguments(original_class(self).forward, self, args, kwargs)
        run, inputs = start_run(self, block, named)
        parameters = [p for p in self.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and (inputs or parameters):
            stream: Any = _Stream
            outputs = stream.apply(run, block, len(inputs), *inputs, *parameters)
        else:
            outputs = run.forward(tuple(inputs))
        return walk(run.structure, lambda _, slot: outputs[slot.number])


def refuse_recomputation() -> None:
    """A checkpoint around a layer would run it as it is in the backward, and not in chunks."""
    if torch._C._current_graph_task_id() != -1:
        raise Refused("layers that stream are recomputed already: switch the checkpointing around them off")


def start_run(layer: nn.Module, block: Block, named: dict[str, Any]) -> tuple[LayerRun, list[Tensor]]:
    """The run of a layer's call, and the tensors of its arguments that want a gradient."""
    inputs: list[Tensor] = []
    paths: list[Path] = []

    def take(path: Path, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            inputs.append(value)
            paths.append(path)
            return Slot(len(paths))
        return value

    layout = block.layout
    if layout.whole is None:
        # Chunks see documents by the masks that Transformers makes of position_ids, as every other attention does.
        named = {name: value for name, value in named.items() if name not in BOUNDS}
    name, hidden_BTD = next((name, value) for name, value in named.items() if isinstance(value, Tensor))
    # Some models stack several hidden states before the rows.
    length = hidden_BTD.shape[layout.cuts[(name,)].own or 0]
    chunks = [(0, length)] if layout.whole else split(length, chunk_of(block.streaming.chunk, hidden_BTD))
    kept = walk(named, take)
    circumstances = Circumstances.of(layer, hidden_BTD.device)
    attention, dtype = block.streaming.attention, hidden_BTD.dtype
    run = LayerRun(layer, layout, attention, chunks, kept, paths, dtype, circumstances)
    return run, inputs


class _Stream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: LayerRun, block: Block, count: int, *tensors: Tensor) -> Any:
        inputs = tensors[:count]
        outputs = run.forward(inputs)
        ctx.run, ctx.block = run, block
        offload = block.streaming.offload
        ctx.away = tuple(block.streaming.shelf.put(x) for x in inputs) if offload else None
        ctx.save_for_backward(*(() if offload else inputs))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_outputs: Tensor) -> Any:
        # Asked for in any case: it raises where the graph has been freed.
        saved: tuple[Tensor | Away, ...] = ctx.saved_tensors
        inputs = saved if ctx.away is None else ctx.away
        ctx.block.backwards += 1
        gradients = ctx.run.backward(inputs, by_outputs, ctx.needs_input_grad[3:])
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.away = None
        return None, None, None, *gradients
