"""How long a script of messages and computations takes on stated links: arithmetic on seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from launch.scaling import Message, Pass, Script, wire_bytes


class Link(NamedTuple):
    """Of one device to another in its node, or of one node to another."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Links:
    """None is not known."""

    within: Link | None = None
    between: Link | None = None
    gloo: bool = False

    def seconds(self, message: Message) -> float | None:
        """A ring that goes through node after node; an all-reduce over nodes is a tree where that is faster."""
        kind, payload_bytes, (ranks, nodes, beside), times = message
        if ranks == 1:
            return 0.0
        inside, outside = ranks > nodes, nodes > 1
        if (inside and self.within is None) or (outside and self.between is None):
            return None
        used = [(self.within, 1)] * inside + [(self.between, beside)] * outside
        bytes_per_s = min(link.bytes_per_s / share for link, share in used if link)
        inner_s = self.within.latency_s if inside and self.within else 0.0
        outer_s = self.between.latency_s if outside and self.between else 0.0
        hop_s = inner_s if not outside else (1 - nodes / ranks) * inner_s + nodes / ranks * outer_s
        if kind == "send":
            hop_s = outer_s if outside else inner_s
        wire = wire_bytes(kind, payload_bytes, ranks, self.gloo)
        ring_s = hops(kind, ranks, self.gloo) * hop_s + wire / bytes_per_s
        if kind != "all_reduce" or not outside or self.gloo:
            return times * ring_s
        deep_s = 2 * ((-(-ranks // nodes) - 1) * inner_s + math.ceil(math.log2(nodes)) * outer_s)
        return times * min(ring_s, deep_s + 2 * payload_bytes / bytes_per_s)


def hops(kind: str, ranks: int, gloo: bool = False) -> int:
    """Of one piece of a tensor, one after the other on a ring."""
    if kind == "send":
        return 1
    return (2 if kind == "all_reduce" or (gloo and kind == "reduce_scatter") else 1) * (ranks - 1)


Price = Callable[[Message], float | None]
"""Seconds of a message."""
Computes = Mapping[str, tuple[float, float]]
"""Seconds of a part's forward and backward, by its role."""


@dataclass(frozen=True)
class Spent:
    """Of one step: `compute_s` forwards and backwards, `exchange_s` all that is exchanged, of which `exposed_s` is
    waited for. None is not known."""

    compute_s: float | None
    exchange_s: float | None
    exposed_s: float | None

    @property
    def hidden_s(self) -> float | None:
        return None if self.exchange_s is None or self.exposed_s is None else max(0.0, self.exchange_s - self.exposed_s)


def sum_s(messages: Iterable[Message], price: Price) -> float | None:
    found = [price(message) for message in messages]
    known = [one for one in found if one is not None]
    return sum(known) if len(known) == len(found) else None


def spent(script: Script, computes: Computes | None, price: Price) -> Spent:
    compute_s = computing_s(script, computes) if computes else None
    exchange_s = sum_s(script.messages(), price)
    if exchange_s is None or not script.hides:
        return Spent(compute_s, exchange_s, exchange_s)
    if computes is None:
        return Spent(None, exchange_s, 0.0 if exchange_s == 0 else None)
    update_s = sum_s(script.update, price)
    assert compute_s is not None
    assert update_s is not None
    passes_s = sum(one.times * pass_s(one, computes, price) for one in script.passes)
    return Spent(compute_s, exchange_s, passes_s - compute_s + update_s)


def computing_s(script: Script, computes: Computes) -> float:
    return sum(
        one.times * computes.get(turn.part, (0.0, 0.0))[one.backward] for one in script.passes for turn in one.turns
    )


def pass_s(one: Pass, computes: Computes, price: Price) -> float:
    """One link carries a pass's messages in their order: what a part needs is asked for when the part before begins,
    and what it leaves goes out behind that. Every message's price is known."""
    now = link = 0.0
    needed = [sum_s(turn.before, price) or 0.0 for turn in one.turns]
    ready = link = needed[0] if needed else 0.0
    for index, turn in enumerate(one.turns):
        start = max(now, ready)
        now = start + computes.get(turn.part, (0.0, 0.0))[one.backward]
        if index + 1 < len(one.turns):
            ready = start
            if needed[index + 1]:
                ready = link = max(link, start) + needed[index + 1]
        if leaving := sum_s(turn.after, price):
            link = max(link, now) + leaving
    return max(now, link)
