"""What a second run of the same code must find as the first run did: random numbers, precision, modes, adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_MODES = ("training", "_disable_adapters", "_active_adapter")


def random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@dataclass(frozen=True)
class Circumstances:
    """Of a module's forward, taken in it, restored around its replay."""

    device: torch.device
    autocast: bool
    autocast_dtype: torch.dtype
    modes: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, module: nn.Module, device: torch.device) -> Circumstances:
        kind = device.type
        return cls(device, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), _modes(module))

    @contextmanager
    def restored(self, module: nn.Module) -> Iterator[None]:
        modes, state = _modes(module), random_state(self.device)
        _set_modes(module, self.modes)
        try:
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast):
                yield
        finally:
            set_random_state(state, self.device)
            _set_modes(module, modes)


def _modes(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return tuple({name: vars(part)[name] for name in _MODES if name in vars(part)} for part in module.modules())


def _set_modes(module: nn.Module, modes: tuple[dict[str, Any], ...]) -> None:
    for part, mode in zip(module.modules(), modes, strict=True):
        vars(part).update(mode)
