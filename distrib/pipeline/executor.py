"""Runs a schedule on the ranks of one pipeline.

Every channel has a process group of its own: with NCCL nothing then waits behind what comes later, and two neighbours
may send to each other at once. A rank asks for what comes next before it needs it and goes on while it sends; what
stays on the rank is handed over as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distrib.pipeline.channels import AHEAD, Channel, Parcel, given, needed, traffic, under_way
from distrib.pipeline.ops import Op, Schedule
from distrib.pipeline.record import Span
from distrib.topology import TIMEOUT


class Stage(Protocol):
    """One part of a model on this rank. The tensors it gets and gives carry no graph."""

    def border(self, micro_batch: int) -> tuple[torch.Size, torch.dtype]:
        """Of this micro-batch's hidden state, the same between all stages."""

    def forward(self, micro_batch: int, received: Tensor | None) -> Tensor | None:
        """What the next stage gets; None from the last."""

    def backward(self, micro_batch: int, received: Tensor | None, whole: bool) -> Tensor | None:
        """The gradient of the input, None from stage 0. If not `whole`, the weights' gradients may wait."""

    def weights(self, micro_batch: int) -> None:
        """The rest of a backward that was not whole."""


@dataclass(frozen=True)
class Links:
    """The channels of one pipeline: `ranks` of the job in order, of which this is the one at `place`."""

    ranks: tuple[int, ...]
    place: int
    device: torch.device
    groups: Mapping[Channel, dist.ProcessGroup]

    @classmethod
    def make(
        cls,
        schedule: Schedule,
        pipelines: Iterable[Sequence[int]],
        device: torch.device,
        timeout: timedelta = TIMEOUT,
    ) -> Links:
        """All ranks of the job call it at once, with all pipelines. It serves every schedule that has each stage
        where this one has it. `timeout` is how long a rank waits for another."""
        backend, found = "nccl" if device.type == "cuda" else "gloo", None
        for ranks in map(tuple, pipelines):
            groups = {
                channel: dist.new_group([ranks[channel.sender], ranks[channel.receiver]], timeout, backend)
                for channel in sorted(traffic(schedule))
            }
            if dist.get_rank() in ranks:
                found = cls(ranks, ranks.index(dist.get_rank()), device, groups)
        assert found is not None, "a rank outside of all pipelines"
        found._connect()
        return found

    def _connect(self) -> None:
        """NCCL connects two ranks when both first use a group, and waits for it: here, in one order everywhere."""
        word = torch.zeros(1, device=self.device)
        for channel, group in self.groups.items():
            if self.place == channel.sender:
                dist.send(word, self.ranks[channel.receiver], group)
            elif self.place == channel.receiver:
                dist.recv(word, self.ranks[channel.sender], group)


def run(schedule: Schedule, stages: Mapping[int, Stage], links: Links, record: list[Span] | None = None) -> None:
    """This rank's operations, in order; `stages` are those it holds. `record` gets when each ran, in seconds since
    this call: to compare ranks, let them begin together."""
    mail, watch = _Mail(schedule, stages, links), _Watch(links.device) if record is not None else None
    for op in schedule.ranks[links.place]:
        received = mail.take(op)
        with watch.over(op) if watch else nullcontext():
            result = _perform(stages[op.stage], op, received)
        mail.give(op, result)
    mail.finish()
    if record is not None and watch:
        record += watch.spans()


def _perform(stage: Stage, op: Op, received: Tensor | None) -> Tensor | None:
    if op.kind == "F":
        return stage.forward(op.micro_batch, received)
    if op.kind == "W":
        stage.weights(op.micro_batch)
        return None
    return stage.backward(op.micro_batch, received, whole=op.kind == "B")


class _Mail:
    """What this rank's operations need and give, across ranks and on this one."""

    def __init__(self, schedule: Schedule, stages: Mapping[int, Stage], links: Links) -> None:
        self.stages, self.count = stages, schedule.stages
        self.here: dict[Parcel, Tensor] = {}
        self.arriving: dict[Parcel, _Inbox] = {}
        self.leaving: dict[Parcel, _Outbox] = {}
        bound = under_way(schedule)
        for channel, parcels in traffic(schedule).items():
            if channel.receiver == links.place:
                self.arriving |= dict.fromkeys(parcels, _Inbox(channel, parcels, links, stages))
            elif channel.sender == links.place:
                self.leaving |= dict.fromkeys(parcels, _Outbox(channel, links, bound))

    def take(self, op: Op) -> Tensor | None:
        parcel = needed(op, self.count)
        if parcel is None:
            return None
        return self.arriving[parcel].take(parcel) if parcel in self.arriving else self.here.pop(parcel)

    def give(self, op: Op, result: Tensor | None) -> None:
        parcel = given(op, self.count)
        if parcel is None:
            return
        border = self.stages[op.stage].border(op.micro_batch)
        if result is None or (result.shape, result.dtype) != border:
            found = None if result is None else (*result.shape, result.dtype)
            raise RuntimeError(f"{op} gave {found}, though the border is {(*border[0], border[1])}")
        if parcel in self.leaving:
            self.leaving[parcel].give(result.detach().contiguous())
        else:
            self.here[parcel] = result.detach()

    def finish(self) -> None:
        for outbox in self.leaving.values():
            outbox.wait(0)


class _Inbox:
    """The end of a channel: what comes next is asked for before it is needed."""

    def __init__(self, channel: Channel, parcels: Sequence[Parcel], links: Links, stages: Mapping[int, Stage]) -> None:
        self.links, self.stages = links, stages
        self.source, self.group = links.ranks[channel.sender], links.groups[channel]
        self.places = {parcel: place for place, parcel in enumerate(parcels)}
        self.waiting = deque(parcels)
        self.coming: dict[Parcel, tuple[dist.Work | None, Tensor]] = {}
        self._ask(AHEAD)

    def take(self, parcel: Parcel) -> Tensor:
        self._ask(self.places[parcel] + 1 + AHEAD)
        work, tensor = self.coming.pop(parcel)
        _wait(work)
        return tensor

    def _ask(self, count: int) -> None:
        """For the first `count` of all parcels."""
        while self.waiting and self.places[self.waiting[0]] < count:
            parcel = self.waiting.popleft()
            shape, dtype = self.stages[parcel.stage].border(parcel.micro_batch)
            tensor = torch.empty(shape, dtype=dtype, device=self.links.device)
            work = dist.irecv(tensor, self.source, self.group, tag=self.places[parcel])
            self.coming[parcel] = work, tensor


class _Outbox:
    """The beginning of a channel; tensors are kept until they are sent."""

    def __init__(self, channel: Channel, links: Links, bound: int) -> None:
        self.target, self.group, self.bound = links.ranks[channel.receiver], links.groups[channel], bound
        self.going: deque[tuple[dist.Work | None, Tensor]] = deque()
        self.count = 0

    def give(self, tensor: Tensor) -> None:
        self.wait(self.bound - 1)
        self.going.append((dist.isend(tensor, self.target, self.group, tag=self.count), tensor))
        self.count += 1

    def wait(self, left: int) -> None:
        """Until no more than `left` are under way."""
        while len(self.going) > left:
            _wait(self.going[0][0])
            self.going.popleft()


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "a rank outside of its own group"
    work.wait()


class _Watch:
    """When operations ran, in seconds since now; a GPU notes it itself, and nobody waits for it before `spans`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.moments: list[tuple[Op, Any, Any]] = []
        self.zero = self._now()

    @contextmanager
    def over(self, op: Op) -> Iterator[None]:
        start = self._now()
        yield
        self.moments.append((op, start, self._now()))

    def spans(self) -> list[Span]:
        return [Span(op, self._seconds(start), self._seconds(end)) for op, start, end in self.moments]

    def _now(self) -> Any:
        if not self.cuda:
            return perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, moment: Any) -> float:
        if not self.cuda:
            return float(moment - self.zero)
        moment.synchronize()
        return float(self.zero.elapsed_time(moment)) / 1000
