"""The engine of someone else's loop: their model as it is, in one process; they own the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from distrib.engines import Fill, Settings
from distrib.engines.torch_engine import TorchEngine
from distrib.topology import Topology


class Local(TorchEngine):
    """Nothing is moved, filled or sharded. There is no optimizer, so `step`, `save` and `load` are not for
    it."""

    name = "local"

    def __init__(self, model: nn.Module) -> None:
        device = next(model.parameters()).device
        super().__init__(model, lambda _, __: None, Topology(device_type=device.type), Settings(optimizer=None))

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Their autocast stays as it is."""
        yield

    def _place(self, fill: Fill) -> nn.Module:
        return self.model
