"""A pipeline over nodes: its schedule simulated with what stages take and with what is between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from distrib.pipeline.channels import traffic
from distrib.pipeline.ops import Schedule
from distrib.pipeline.simulate import Costs, simulate
from launch.plan_pipeline import PipelinePlanner
from launch.scaling import Group, Message, Messages, Part, parts_of, replicated, shared, together
from launch.scaling_time import Computes, Price, Spent, sum_s
from launch.shares import SINGLE
from strategies.core.prepare import causal_lm
from strategies.pipelining.partition import Partition
from strategies.twobp import TwoBP


@dataclass
class Pipeline:
    """A recipe's pipeline on the devices of its planner, with the stages that training makes."""

    planner: PipelinePlanner
    per_node: int

    def __post_init__(self) -> None:
        planner = self.planner
        twobp = next(strategy for strategy in planner.chosen if isinstance(strategy, TwoBP))
        inner = causal_lm(planner.model)
        self.rows = planner.recipe.per_device_train_batch_size
        self.parts: Partition = twobp.partition(inner, planner.topology)
        source = replace(twobp.source(planner.device.count), costs=self.parts.costs)
        self.schedule: Schedule = source.made(planner.rows // self.rows)
        self.sharded = planner.recipe.engine.name == "fsdp2"
        self._weights = parts_of(planner.model)
        self._inner = inner

    @cached_property
    def peak(self) -> dict[str, int]:
        """The classes of the rank that holds most."""
        planner, schedule = self.planner, self.schedule
        held = planner.held(self.parts, self.rows)
        static = planner.static(self.parts, held, schedule.homes)
        peaks = [planner.peak(rank, schedule, held, static[rank], self.rows) for rank in range(planner.ranks)]
        return max(peaks, key=lambda peak: sum(peak.values()))

    @property
    def updated(self) -> float:
        """Elements of the optimizer that has most."""
        own = [self.weights(rank) for rank in range(self.planner.ranks)]
        most = max(sum(w.elements for part in parts for w in part.trained) for parts in own)
        return most / (self.planner.replicas if self.sharded else 1)

    @cached_property
    def neighbours(self) -> Group:
        """All of them at once. The ranks of a stage are adjacent."""
        width = self.planner.replicas
        return together([(rank, rank + width) for rank in range(width * (self.planner.ranks - 1))], self.per_node)

    def weights(self, rank: int) -> list[Part]:
        own = [stage for stage, home in self.schedule.homes.items() if home == rank]
        names = dict.fromkeys(name for stage in own for name in self.parts.names(stage))
        ids = {id(p) for name in names for p in self._inner.get_submodule(name).parameters()}
        return [part.of(ids) for part in self._weights]

    def messages(self, rank: int) -> tuple[Messages, Messages]:
        """What a rank sends to its neighbours; what it exchanges with those that have the same weights."""
        planner, homes = self.planner, self.schedule.homes
        width, ranks = planner.replicas, planner.ranks
        parcels = sum(len(found) for channel, found in traffic(self.schedule).items() if channel.sender == rank)
        mail = (Message("send", planner.border_bytes(self.rows), self.neighbours, parcels),)
        replicas = together([range(place * width, (place + 1) * width) for place in range(ranks)], self.per_node)
        own = self.weights(rank)
        before, after = replicated(own, self.sharded, 2 if planner.recipe.bf16 else SINGLE, replicas)
        first, last = homes[0], homes[self.schedule.stages - 1]
        if first != last and rank in (first, last):
            ends = together([(first * width + one, last * width + one) for one in range(width)], self.per_node)
            after += shared(own, width if self.sharded else 1, ends)
        return mail, before + after

    def spent(self, costs: Costs | None, price: Price) -> tuple[Spent, float | None]:
        """And the seconds that the mean rank waits for others. Transfers make it wait longer, or are hidden."""
        both = [self.messages(rank) for rank in range(self.planner.ranks)]
        mails = _most([sum_s(mail, price) for mail, _ in both])
        others = _most([sum_s(other, price) for _, other in both])
        exchange_s = None if mails is None or others is None else mails + others
        if costs is None:
            return Spent(None, exchange_s, others), None
        ops = [op for ops in self.schedule.ranks for op in ops]
        compute_s = sum(map(costs.seconds, ops)) / self.planner.ranks
        transfer_s = price(Message("send", self.planner.border_bytes(self.rows), self.neighbours))
        found = Spent(compute_s, exchange_s, others)
        if transfer_s is None:
            return found, None
        return found, simulate(self.schedule, replace(costs, transfer=transfer_s)).seconds - compute_s

    def timed(self, crowding: float) -> Costs | None:
        """By layers that are timed here."""
        places = self.planner.places(self.rows)
        if places is None:
            return None
        stages = [places.stage(start, stop) for start, stop in pairwise(self.parts.bounds)]
        forward, inputs, weights = (tuple(crowding * one for one in kind) for kind in zip(*stages, strict=True))
        return Costs(forward, inputs, weights)

    def reckoned(self, computes: Computes) -> Costs:
        """By a rate: both parts of a backward take the same."""
        layers = [stop - start for start, stop in pairwise(self.parts.bounds)]
        ends = [0.0] * (len(layers) - 1) + [1.0]

        def stages(way: int, share: float) -> tuple[float, ...]:
            layer, head = computes["layer"][way], computes["head"][way]
            return tuple(share * (count * layer + end * head) for count, end in zip(layers, ends, strict=True))

        return Costs(stages(0, 1.0), stages(1, 0.5), stages(1, 0.5))


def beside(sections: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The strategies that apply within the stages."""
    return [one for one in sections if one["name"] != "twobp"] or [{"name": "plain"}]


def _most(found: Sequence[float | None]) -> float | None:
    known = [one for one in found if one is not None]
    return max(known) if len(known) == len(found) else None
