"""Random numbers that are a function of what they are for, so that they come out the same after a resume and in a layer
that runs again, differ between ranks, and leave the global random state alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_STEPS = 2.0**-16


def seed_of(*key: int | str) -> int:
    """63 bits; another number for every key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


@torch.library.custom_op("ebbtide::random_bits", mutates_args=())
def random_bits(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """16 random bits an element. One operator, so that whoever runs operators again has the same."""
    return next_bits(shape, torch.Generator(device).manual_seed(seed))


def next_bits(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The same a part at a time, as long as parts but the last are a multiple of four."""
    count = torch.Size(shape).numel()
    # 64 bits at a time cost the least.
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].clone().view(*shape) if count % 4 else words.view(torch.int16).view(*shape)


@random_bits.register_fake
def _(shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int16, device=device)


def uniform(bits: Tensor, out: Tensor | None = None) -> Tensor:
    """In (0, 1), float32, 1/2 on average to the last bit. There are 2^16 of them: what a number that is rounded with
    them has beyond 2^-17 of a step is lost."""
    return (bits.float() if out is None else out.copy_(bits)).add_(32768.5).mul_(_STEPS)


@dataclass
class Draws:
    """The seeds of one model's backward passes on one rank. The calls of a module are counted within a step: each is
    another micro-batch, or chunk of one. A loop that says nothing of steps draws anew with every call."""

    rank: int
    world: int = 1
    seed: int | None = None
    step: int = 0
    calls: dict[str, int] = field(default_factory=dict)

    def begin(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step
        self.calls.clear()

    def next(self, module: str) -> tuple[int | str, ...]:
        """The key of a module's next backward."""
        call = self.calls.get(module, 0)
        self.calls[module] = call + 1
        seed = torch.initial_seed() if self.seed is None else self.seed
        return seed, self.step, self.rank, module, call
