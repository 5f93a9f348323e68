"""Replicas of a training that come and go, through torchft. Each has the whole model; those that are there share the
rows of a step, and one that comes, or comes back, takes over the state of another.

A step's gradient is the sum over all of its rows, whoever has them, and a step in which a replica is lost is made again
by the others: weights are those of one process that had all rows, to rounding. For a loop of one's own; `ebbtide train`
starts ranks again instead.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.errors import NotReached, UserError
from distrib.topology import address_towards

log = logging.getLogger("ebbtide")

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
CONNECT_S = 10.0
MOST_TRIES = 10
"""Of one step."""


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Share:
    """Of a step, counted from 0: rows [rank::count] of its batch."""

    step: int
    rank: int
    count: int


class Replicas:
    """Gives this replica's share of every step, which `update` ends:

        with Replicas(model, optimizer, schedule) as replicas:
            for share in replicas.steps(1000):
                loss = my_loss(model, batch(share.step)[share.rank :: share.count]) / weight_of_the_whole_batch
                loss.backward()
                replicas.update(loss)

    `others` are what else a replica that comes late must take over. The lighthouse (`torchft_lighthouse`) is named by
    TORCHFT_LIGHTHOUSE. Tensors and plain values are taken over, never pickled objects.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *others: Stateful, timeout_s: float = 30.0
    ) -> None:
        if not find_spec("torchft"):
            raise UserError("replicas need the torchft package: pip install 'ebbtide[torchft]'")
        lighthouse = os.environ.get(LIGHTHOUSE, "")
        host = urlsplit(lighthouse).hostname
        if not host:
            raise UserError(f"{LIGHTHOUSE}={lighthouse!r}: name the lighthouse, as http://HOST:29510")
        self.model = model
        self.optimizer = optimizer
        self._held: list[Stateful] = [model, optimizer, *others]
        here = address_towards(host)
        if not here:
            raise UserError(f"{LIGHTHOUSE}={lighthouse!r}: no way there from here")
        timeout = timedelta(seconds=timeout_s)
        self._store = dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)
        self._manager = self._made(lighthouse, here, timeout)
        self._tries = 0

    def _made(self, lighthouse: str, here: str, timeout: timedelta) -> Any:
        from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL

        # It says every tensor that a lost replica leaves unsummed, with a traceback.
        logging.getLogger("torchft").setLevel(logging.CRITICAL)
        cuda = any(parameter.is_cuda for parameter in self.model.parameters())
        try:
            return Manager(
                pg=(ProcessGroupNCCL if cuda else ProcessGroupGloo)(timeout),
                load_state_dict=self._load,
                state_dict=self._state,
                min_replica_size=1,
                # Whoever comes has the others' state before the first forward, and shares its rows.
                use_async_quorum=False,
                timeout=timeout,
                quorum_timeout=timeout,
                connect_timeout=timedelta(seconds=CONNECT_S),
                rank=0,
                world_size=1,
                store_addr=here,
                store_port=self._store.port,
                lighthouse_addr=lighthouse,
                hostname=here,
                checkpoint_transport=_transport(here, timeout),
            )
        except RuntimeError as error:
            raise UserError(f"{LIGHTHOUSE}={lighthouse!r} does not answer: {str(error).splitlines()[0]}") from None

    def steps(self, count: int) -> Iterator[Share]:
        """From the step that the others are at, or from the first."""
        manager = self._manager
        while manager.current_step() < count:
            manager.start_quorum()
            if (step := manager.current_step()) < count:
                yield Share(step, manager.participating_rank(), manager.num_participants())

    def update(self, loss: Tensor) -> float | None:
        """Sum gradients and loss over the replicas and let the optimizer make its step; None where one was lost, and
        the same step comes again."""
        total = loss.detach().clone()
        summed = [total, *(_gradient(p) for p in self.model.parameters() if p.requires_grad)]
        for work in [self._manager.allreduce(tensor, reduce_op=dist.ReduceOp.SUM) for tensor in summed]:
            work.wait()
        step, error = self._manager.current_step(), self._manager.errored()
        if done := self._manager.should_commit():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._tries = 0 if done else self._tries + 1
        if done:
            return total.item()
        why = str(error.original_exception if error else "another replica's part of it failed").splitlines()[0]
        if self._tries == MOST_TRIES:
            raise NotReached(f"step {step + 1} failed {MOST_TRIES} times: {why}")
        log.warning("step %s is made again by the replicas that are there: %s", step + 1, why)
        return None

    def _state(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self._held)}

    def _load(self, state: dict[str, Any]) -> None:
        for index, part in enumerate(self._held):
            part.load_state_dict(state[str(index)])

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.shutdown()


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _transport(here: str, timeout: timedelta) -> Any:
    from urllib.request import urlopen

    from torch.distributed._serialization import _streaming_load
    from torchft.checkpointing import HTTPTransport

    class OnlyData(HTTPTransport):  # type: ignore[misc]
        """torchft's own reads pickled objects of whoever answers, and gives a host's name that others may not know."""

        def address(self) -> str:
            return f"http://{here}:{self._server.socket.getsockname()[1]}/checkpoint/"

        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> Any:
            with urlopen(address, timeout=timeout.total_seconds()) as answer, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")  # it is copied from
                return _streaming_load(answer, weights_only=True)

        def shutdown(self, wait: bool = True) -> None:
            super().shutdown(wait)
            self._server.server_close()

    return OnlyData(timeout, num_chunks=0)
