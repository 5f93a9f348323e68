"""A few processes with a gloo group between them, kept alive for many tests: starting them costs seconds."""

from __future__ import annotations

import gc
import importlib
import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT_S = 180


class Ranks:
    """`ranks("module:function", ...)` runs it on every rank, with the topology first, and returns what each gave.

    After a failure the processes are replaced: a rank may be left in the middle of a collective.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def __call__(self, target: str, *args: Any) -> list[Any]:
        if not self._workers:
            self._start()
        for pipe in self._pipes:
            pipe.send((target, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self._kill()
                raise TimeoutError(f"rank {rank} did not finish {target} within {TIMEOUT_S} s")
            answers.append(pipe.recv())
        failures = [f"rank {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if failures:
            self._kill()
            raise RuntimeError("\n".join(failures))
        return [result for result, _ in answers]

    def _start(self) -> None:
        context = get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, rank, self.world, port), daemon=True)
            worker.start()
            self._workers.append(worker)
            self._pipes.append(ours)

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []


LEFT: list[Any] = []
MANY = 16


@contextmanager
def own_groups() -> Iterator[None]:
    """The process groups that a case makes end with it, or soon after: gloo's threads wake up all the time, by the
    hundred. Not for FSDP2, as tensors over equal meshes share what torch remembers of the first."""
    import torch.distributed as dist

    groups = dist.distributed_c10d._world.pg_map
    before = set(groups)
    try:
        yield
    finally:
        LEFT.extend(group for group in groups if group not in before)
        if len(LEFT) > MANY:
            while LEFT:
                dist.destroy_process_group(LEFT.pop())
            gc.collect()


def _serve(pipe: Connection, rank: int, world: int, port: int) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    import torch

    from distrib.topology import connect, read_environment

    torch.set_num_threads(1)
    topology = read_environment()
    connect(topology)
    while True:
        try:
            target, args = pipe.recv()
        except EOFError:
            return
        try:
            module, function = target.split(":")
            pipe.send((getattr(importlib.import_module(module), function)(topology, *args), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
