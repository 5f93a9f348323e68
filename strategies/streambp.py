from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distrib.topology import Topology
from strategies.core.contract import Claim, Strategy
from strategies.core.edits import Edit, Wrap
from strategies.streaming.backbone import find_backbone, find_layers
from strategies.streaming.blocks import Block, StreamedBackbone, StreamedBlock, Streaming
from strategies.streaming.router import refuse_router_loss
from strategies.streaming.unshared import refuse_latents


@dataclass(frozen=True)
class StreamBP(Strategy):
    """Each layer keeps only its input; its backward runs it again in chunks of the sequence, last to first, against
    recorded keys and values (2506.03077). Exact.

    It costs one more forward of each layer, like gradient checkpointing, and holds the activations of one chunk
    instead of one layer. `offload` also moves the layers' inputs to host memory. Wrong to use where activations fit:
    `plain` recomputes nothing.
    """

    compiles = False
    context_parallel = True
    claims = frozenset({Claim.LAYERS, Claim.CHUNKS})
    chunk: int | Literal["auto"] = "auto"
    offload: bool = False

    def __post_init__(self) -> None:
        if self.chunk != "auto" and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}: a number of positions, or auto")

    def check(self, config: Any, topology: Topology) -> None:
        refuse_router_loss("streambp", config)
        refuse_latents("streambp", config, topology)

    def edits(self, model: nn.Module, topology: Topology) -> Iterable[Edit]:
        chunk = None if self.chunk == "auto" else int(self.chunk)
        streaming = Streaming(chunk, self.offload, quiet=not topology.main)
        layers = find_layers(model)
        if not layers:
            return
        backbone = find_backbone(model, [layer for _, layer in layers])
        name = next(name for name, part in model.named_modules() if part is backbone)
        yield Wrap(name, StreamedBackbone, {"_ebbtide_streaming": streaming})
        for name, _ in layers:
            yield Wrap(name, StreamedBlock, {"_ebbtide_block": Block(streaming)})
