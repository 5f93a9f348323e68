"""Several machines, on each of which the command is given once, as one job: which one this is, where the ranks meet,
what its ranks say. The environment tells the first two, by names of torchrun's, which PyTorchJob sets too."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import IO, TextIO

from distrib.errors import UserError
from distrib.files import why_not
from distrib.redaction import without_values

PORT = 29500
KEPT_LINES = 10_000
DRAIN_S = 2.0


@dataclass(frozen=True)
class Nodes:
    count: int = 1
    index: int = 0
    host: str = "127.0.0.1"
    port: int = PORT

    @classmethod
    def of(cls, env: Mapping[str, str]) -> Nodes:
        count = _whole(env, "PET_NNODES", 1)
        if count < 2:
            return cls()
        host = env.get("PET_MASTER_ADDR") or env.get("MASTER_ADDR")
        if not host:
            raise UserError(f"PET_NNODES={count} but no MASTER_ADDR in the environment: name the machine of rank 0")
        if not env.get("PET_NODE_RANK"):
            raise UserError(f"PET_NNODES={count} but no PET_NODE_RANK in the environment: 0 to {count - 1}")
        index = _whole(env, "PET_NODE_RANK", 0)
        if index >= count:
            raise UserError(f"PET_NODE_RANK={index} in the environment: must be below PET_NNODES={count}")
        port = "PET_MASTER_PORT" if env.get("PET_MASTER_PORT") else "MASTER_PORT"
        return cls(count, index, host, _whole(env, port, PORT))


def _whole(env: Mapping[str, str], name: str, default: int) -> int:
    given = env.get(name) or str(default)
    if not given.isdecimal():
        raise UserError(f"{name}={given!r} in the environment: must be a whole number")
    return int(given)


class Relay:
    """Passes on what the ranks of this machine say, with the rank before each line, and keeps it in the run's folder.
    What is printed as a result goes on as it is.

    The file is begun once the run has claimed its folder: a command that is refused leaves nothing in another's.
    """

    def __init__(self, nodes: Nodes, run: Path) -> None:
        self.nodes = nodes
        self.file = run / "logs" / f"node-{nodes.index}.log"
        self._claim = run / "recipe.lock.yaml"
        self._before = _written(self._claim)
        self._kept: deque[str] = deque(maxlen=KEPT_LINES)
        self._claimed = self._failed = False
        self._one = threading.RLock()  # a signal's handler may say something, too
        self._threads: list[threading.Thread] = []

    def take(self, process: Popen[bytes], rank: int) -> None:
        for pipe, stream, before in ((process.stdout, sys.stdout, ""), (process.stderr, sys.stderr, f"[rank {rank}] ")):
            assert pipe is not None
            self._threads.append(threading.Thread(target=self._pass_on, args=(pipe, rank, stream, before), daemon=True))
            self._threads[-1].start()

    def _pass_on(self, pipe: IO[bytes], rank: int, stream: TextIO, before: str) -> None:
        for raw in pipe:
            line = raw.decode(errors="replace").rstrip()
            print(f"{before}{line}", file=stream, flush=True)
            self.keep(f"[rank {rank}] {line}")

    def keep(self, line: str) -> None:
        with self._one:
            self._kept.append(f"{without_values(line)}\n")
            self._claimed = self._claimed or _written(self._claim) != self._before
            if not self._claimed or self._failed:
                return
            try:
                self.file.parent.mkdir(exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.writelines(self._kept)
            except OSError as error:
                self._failed = True
                print(f"ebbtide: {why_not(self.file, error)}; what ranks say is not kept", file=sys.stderr, flush=True)
            self._kept.clear()

    def drain(self) -> None:
        """The ranks have ended; what one of them started may still hold a pipe."""
        for thread in self._threads:
            thread.join(DRAIN_S)
        self._threads.clear()


def _written(path: Path) -> int | None:
    with suppress(OSError):
        return path.stat().st_mtime_ns
    return None
