"""A step's gradients against the true ones, parameter by parameter, and whether they are what was promised.

With d the difference from the true gradient g, of one parameter or of all, right is

    |mean of d over the draws| <= (tolerance + bound) * (|g| + FLOOR * |g of all|) + quantile * deviation / sqrt(draws)
                                  + ROUNDINGS * rounding

The second term is 0 for a gradient that is no estimate. The quantile is Student's: noise that lies in one direction has
no more to say than one number a draw. FLOOR is for gradients that are 0 but for rounding, as those of a key's bias.

Tolerances were set on 20 families of small models, plain and in chunks: the largest differences were 4e-7 in float64
(norms and others compute in float32), 2e-6 in float32 and 4e-2 in bfloat16. They are larger where a rounding makes a
router choose other experts; so before a verdict of wrong it is measured how far the true gradient itself moves when the
embeddings are rounded otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.contracts import Engine
from distrib.errors import Refused
from distrib.topology import Topology
from strategies.core.contract import Fidelity, Strategy, is_exact
from strategies.core.registry import name_of

FLOOR = 1e-3
ROUNDINGS = 3
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Two-sided, 1e-4 for all parameters together and 1e-7 for each of them.
ALL, EACH = 3.9, 5.3

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Promise:
    """What strategies together promise of their gradients."""

    fidelity: Fidelity
    bound: float
    noise: float

    @classmethod
    def of(cls, strategies: Sequence[Strategy]) -> Promise:
        loose = [strategy for strategy in strategies if not is_exact(strategy)]
        vague = [strategy for strategy in loose if strategy.fidelity is Fidelity.APPROXIMATE]
        for strategy in vague:
            if strategy.bound is None:
                name = name_of(strategy)
                raise Refused(f"strategy {name} is approximate and does not say by how much: set its class's `bound`")
        fidelity = Fidelity.APPROXIMATE if vague else Fidelity.UNBIASED if loose else Fidelity.EXACT
        return cls(fidelity, sum(s.bound or 0.0 for s in vague), math.hypot(*(s.noise for s in loose)))


@dataclass(frozen=True)
class Differences:
    """Norms over all ranks, one a parameter: of the true gradients, of the mean difference from them, of the draws'
    standard deviation, and, where it was measured, of what rounding does to the true ones."""

    names: list[str]
    true: Tensor
    mean: Tensor
    deviation: Tensor
    draws: int
    rounding: Tensor | None = None

    def ratios(self, promise: Promise, tolerance: float) -> tuple[Tensor, Tensor]:
        """(of all together, of each parameter): the mean difference relative to what is right; above 1, or not a
        number, is wrong."""
        rounding = torch.zeros_like(self.true) if self.rounding is None else self.rounding
        everything = self.true.norm()
        each = self._allowed(self.true + FLOOR * everything, self.deviation, promise, tolerance, EACH)
        together = self._allowed(everything, self.deviation.norm(), promise, tolerance, ALL)
        return (
            _ratio(self.mean.norm(), together + ROUNDINGS * rounding.norm()),
            _ratio(self.mean, each + ROUNDINGS * rounding),
        )

    def _allowed(self, size: Tensor, deviation: Tensor, promise: Promise, tolerance: float, normal: float) -> Tensor:
        allowed = (tolerance + promise.bound) * size
        if self.draws > 1:
            deviation = torch.maximum(deviation, promise.noise * size)
            allowed = allowed + quantile(normal, self.draws - 1) * deviation / math.sqrt(self.draws)
        return allowed

    def right(self, promise: Promise, tolerance: float) -> bool:
        together, each = self.ratios(promise, tolerance)
        return bool(together <= 1) and bool((each <= 1).all())

    def moves(self) -> Tensor:
        """How far a draw is from the true gradients, as a root mean square."""
        return torch.hypot(self.mean, self.deviation)


def _ratio(found: Tensor, allowed: Tensor) -> Tensor:
    """0 for no difference, also from a gradient of 0."""
    return torch.where(found == 0, 0.0, found / allowed)


def quantile(normal: float, freedom: int) -> float:
    """Student's, from the normal distribution's of the same level (Cornish and Fisher's expansion)."""
    z = normal
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def own_parts(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Each gradient's part that this rank compares: its shard, or its share of one that other ranks have as well."""
    topology = engine.topology
    holders = {"shard": 1, "tensor": topology.tensor, "replicate": topology.world // topology.stages}
    for name, gradient, placement in engine.gradients():
        if placement == "copy":
            continue
        flat = gradient.detach().reshape(-1)
        yield name, flat.tensor_split(holders[placement])[topology.rank % holders[placement]]


def kept_parts(engine: Engine) -> Parts:
    """In the host's memory, where a second copy of the gradients does not cost the device its room."""
    return {name: part.to("cpu", copy=True) for name, part in own_parts(engine)}


def differences(engine: Engine, true: Parts, run: Callable[[int], object], draws: int) -> Differences:
    """`run` leaves the gradients of a draw with the engine; they are cleared."""
    sums: Parts = {}
    squares = dict.fromkeys(true, 0.0)
    for draw in range(draws):
        run(draw)
        for name, part in own_parts(engine):
            difference = part.cpu() - true[name]
            squares[name] += _square(difference)
            sums[name] = difference if draw == 0 else sums[name].add_(difference)
        engine.zero_grad()
    names = _everyones(list(true), engine.topology)
    own = {name: [_square(true[name]), _square(sums[name]) / draws**2, squares[name]] for name in true}
    total = torch.tensor([own.get(name, [0.0, 0.0, 0.0]) for name in names], dtype=torch.float64)
    if engine.topology.world > 1:
        dist.all_reduce(total)
    true_P, mean_P, squares_P = total.T
    # Around the draws' own mean, which has taken one degree of freedom.
    deviation_P = (squares_P / draws - mean_P).clamp(min=0) * (draws / max(1, draws - 1))
    return Differences(names, true_P.sqrt(), mean_P.sqrt(), deviation_P.sqrt(), draws)


def _everyones(names: list[str], topology: Topology) -> list[str]:
    """Those of all stages."""
    if topology.stages == 1:
        return names
    found: list[list[str]] = [[] for _ in range(topology.world)]
    dist.all_gather_object(found, names)
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def _square(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part, dtype=torch.float64)) ** 2
