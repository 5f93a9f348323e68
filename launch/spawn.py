"""Starts the ranks of one machine and answers for them: `nproc: 2` is all a user writes. Several machines are one such
command each.

torch's elastic agent is not used: it would import torch in the parent, loses a rank's exit code 75 when it is
told to stop itself, ends every rank after a fixed grace however long a checkpoint takes, and prints its own
report over the rank's error. What is left of its work is small: torchrun's variables, a free port, watching.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

from distrib.told import AGAIN_S, AT_ONCE, KINDS, Told
from launch.nodes import Nodes, Relay

if TYPE_CHECKING:
    from launch.restarts import Restarts

Process = subprocess.Popen[bytes]
STOPPED = 75
SAID, FOLLOWED, FULL = 70, 71, 72
"""With what the ranks of `spawn` end instead of 1: one that failed and has said why, and one that lost another; and
instead of 2 one whose memory ran out."""
GRACE_S = 2.0
"""How long peers of a failed rank get to notice and end by themselves."""
POLL_S = 0.05
STOP_SIGNALS = (*KINDS, signal.SIGHUP)
SUPERVISED = "EBBTIDE_SUPERVISED"
"""Set for ranks started here: their standard input is a pipe that ends when this process does."""


def launched(env: Mapping[str, str]) -> bool:
    """Whether torchrun, `accelerate launch` or srun already started this process as one rank of a job. A batch
    script of SLURM that calls us without srun is one process."""
    tasks = env.get("SLURM_NTASKS", "1")
    return "RANK" in env or ("SLURM_STEP_ID" in env and tasks.isdecimal() and int(tasks) > 1)


def spawn(arguments: Sequence[str], nproc: int, restarts: Restarts | None = None, relay: Relay | None = None) -> int:
    """Run `ebbtide` with these arguments as `nproc` ranks; the exit code that the job as a whole deserves.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP reach the ranks as SIGTERM, which stops them with a checkpoint; a second one
    ends them. Each rank leads a process group of its own, so that nothing it started outlives it.
    """
    slots, environment = list(range(nproc)), dict[str, str]()
    while True:
        words = [*arguments, f"nproc={len(slots)}"]
        with started("launch", words, len(slots), environment=environment, relay=relay) as job, job.signals():
            job.wait()
        code = job.exit_code()
        if code == FULL and restarts and (smaller := restarts.smaller()):
            say(f"on_oom=halve: starting again from the newest checkpoint with {' '.join(smaller)}")
            arguments = [*arguments, *smaller]
            environment = restarts.environment("out of memory", job.failed_at, nproc, slots)
            continue
        if code == FULL:
            return 2
        if code != 1 or job.told.asked or not restarts or not restarts.allowed:
            return code
        if not restarts.another():
            say(f"max_restarts={restarts.allowed} without a new checkpoint: giving up")
            return code
        slots = restarts.left(slots, job.culprits())
        environment = restarts.environment(job.why(), job.failed_at, nproc, slots)
        say(f"restart {restarts.count} of {restarts.allowed}, from step {restarts.reached}, ranks: {len(slots)}")


@contextmanager
def started(
    module: str,
    arguments: Sequence[str],
    nproc: int,
    output: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
    relay: Relay | None = None,
) -> Iterator[Job]:
    """`python -m module` as `nproc` ranks, which end with the block at the latest; `output` takes what they print, or
    the relay of one of several machines."""
    with _reserved_port() as port:
        nodes = relay.nodes if relay else Nodes(port=port)
        command = [sys.executable, "-P", "-m", module, *arguments]
        first = nodes.index * nproc
        variables = [{**(environment or {}), **_place(nodes, rank, nproc)} for rank in range(nproc)]
        job = Job([_start(command, own, subprocess.PIPE if relay else output) for own in variables], first, relay)
        try:
            yield job
        finally:
            job.kill()
            if relay:
                relay.drain()


def _place(nodes: Nodes, rank: int, nproc: int) -> dict[str, str]:
    """torchrun's variables, of the machine's rank `rank`."""
    return {
        "RANK": str(nodes.index * nproc + rank),
        "WORLD_SIZE": str(nodes.count * nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": nodes.host,
        "MASTER_PORT": str(nodes.port),
    }


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that only a server asking for this very one can take, while the ranks start."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


def _start(command: Sequence[str], variables: Mapping[str, str], output: IO[bytes] | int | None) -> Process:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {
        "OMP_NUM_THREADS": str(max(1, cores // int(variables["LOCAL_WORLD_SIZE"]))),
        **os.environ,
        **variables,
        SUPERVISED: "1",
    }
    home = Path(__file__).resolve().parent.parent
    if Path(sys.path[0] or ".").resolve() == home:
        # started from a checkout that is not installed: -P below hides the working directory
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), env.get("PYTHONPATH")]))
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
    )


class Job:
    """The ranks of this machine, from `first` on, until the last has ended."""

    def __init__(self, ranks: Sequence[Process], first: int = 0, relay: Relay | None = None) -> None:
        self.ranks = ranks
        self.first = first
        self._relay = relay
        for index, rank in enumerate(ranks):
            if relay:
                relay.take(rank, first + index)
        self.told = Told()
        self.killed: set[int] = set()
        self.failed_at: float | None = None

    @contextmanager
    def signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            self.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        first = not self.told.asked
        if self.told.again():
            self._say(AT_ONCE)
            self.kill()
        elif first:
            self._say(f"stopping with a checkpoint after this step; Ctrl-C again, after {AGAIN_S:g} s, stops at once")
            self._tell()

    def _say(self, line: str) -> None:
        say(line)
        if self._relay:
            self._relay.keep(f"ebbtide: {line}")

    def _tell(self) -> None:
        for rank in self.ranks:
            rank.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until every rank has ended; a failed rank's peers, perhaps stuck waiting, end after a grace."""
        ended_s: float | None = None
        while None in (codes := [rank.poll() for rank in self.ranks]):
            now = time.monotonic()
            if ended_s is None and any(codes):
                ended_s = now
            if self.failed_at is None and any(code not in (None, 0, STOPPED) for code in codes):
                ended_s, self.failed_at = now, time.time()
            if ended_s is not None and now - ended_s > GRACE_S:
                if self.failed_at:
                    self.kill()
                elif not self.told.asked:
                    # one was told, before the ranks could talk
                    self.told.again()
                    self._tell()
            time.sleep(POLL_S)

    def kill(self) -> None:
        for index, rank in enumerate(self.ranks):
            if rank.poll() is None:
                self.killed.add(index)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
            if rank.stdin:
                rank.stdin.close()

    def exit_code(self) -> int:
        """2 if a rank says that the user erred, 75 if all stopped early, 0 if all are done, 1 otherwise; and FULL."""
        for index in self._silent():
            self._say(self._end(index))
        codes = {self._code(index) for index in range(len(self.ranks))} - {0}
        for said in (2, FULL):
            if said in codes:
                return said
        if STOPPED in codes:
            codes.discard(FOLLOWED)
        return 0 if not codes else STOPPED if codes == {STOPPED} else 1

    def _code(self, index: int) -> int:
        code = self.ranks[index].returncode
        return STOPPED if self.told.asked and (index in self.killed or code == -signal.SIGTERM) else code

    def _silent(self) -> list[int]:
        """Ranks that ended without a word; an exit code of 0 or 1 is no surprise unless the others miss that rank."""
        codes = [rank.returncode if index not in self.killed else FOLLOWED for index, rank in enumerate(self.ranks)]
        known = {0, 1, 2, SAID, FOLLOWED, FULL, STOPPED}
        if self.told.asked:
            known.add(-signal.SIGTERM)
        silent = [index for index, code in enumerate(codes) if code not in known]
        if not silent and FOLLOWED in codes and SAID not in codes and not self.killed:
            silent = [index for index, code in enumerate(codes) if code in (0, 1)]
        return silent

    def _end(self, index: int) -> str:
        code, rank = self.ranks[index].returncode, self.first + index
        if code >= 0:
            return f"rank {rank} ended with exit code {code}, without a word"
        hint = "; memory may have run out" if code == -signal.SIGKILL else ""
        return f"rank {rank} was ended by {signal.Signals(-code).name}{hint}"

    def culprits(self) -> set[int]:
        """Ranks that failed by themselves: with or without a word, or by not ending with the others."""
        said = {index for index, rank in enumerate(self.ranks) if rank.returncode == SAID}
        return set(self._silent()) | said or self.killed

    def why(self) -> str:
        if silent := self._silent():
            return self._end(silent[0])
        if said := self.culprits() - self.killed:
            return f"rank {min(said)} failed"
        return f"rank {min(self.killed)} did not answer" if self.killed else "the ranks lost each other"


def say(line: str) -> None:
    print(f"ebbtide: {line}", file=sys.stderr, flush=True)
