"""Starts the ranks of one machine and answers for them: `nproc: 2` is all a user writes.

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
from typing import IO

STOPPED = 75
GRACE_S = 5.0
"""How long peers of a failed rank get to notice and end by themselves."""
POLL_S = 0.05
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SUPERVISED = "EBBTIDE_SUPERVISED"
"""Set for ranks started here: their standard input is a pipe that ends when this process does."""


def launched(env: Mapping[str, str]) -> bool:
    """Whether torchrun, `accelerate launch` or srun already started this process as one rank of a job. A batch
    script of SLURM that calls us without srun is one process."""
    tasks = env.get("SLURM_NTASKS", "1")
    return "RANK" in env or ("SLURM_STEP_ID" in env and tasks.isdecimal() and int(tasks) > 1)


def spawn(arguments: Sequence[str], nproc: int) -> int:
    """Run `ebbtide` with these arguments as `nproc` ranks; the exit code that the job as a whole deserves.

    Ctrl-C, SIGTERM and SIGHUP reach the ranks as SIGTERM, which stops them with a checkpoint; another
    Ctrl-C kills. Each rank leads a process group of its own, so that nothing it started outlives it.
    """
    with started("launch", arguments, nproc) as job, job.signals():
        job.wait()
    return job.exit_code()


@contextmanager
def started(
    module: str,
    arguments: Sequence[str],
    nproc: int,
    output: IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Job]:
    """`python -m module` as `nproc` ranks, which end with the block at the latest; `output` takes what they print."""
    with _reserved_port() as port:
        command = [sys.executable, "-P", "-m", module, *arguments]
        job = Job([_start(command, rank, nproc, port, output, environment or {}) for rank in range(nproc)])
        try:
            yield job
        finally:
            job.kill()


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that only a server asking for this very one can take, while the ranks start."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("", 0))
        yield reserved.getsockname()[1]


def _start(
    command: Sequence[str], rank: int, nproc: int, port: int, output: IO[bytes] | None, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        **os.environ,
        **environment,
        "RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
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
    """The ranks of this machine, until the last has ended."""

    def __init__(self, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
        self.ranks = ranks
        self.told_to_stop = False
        self.killed: set[int] = set()

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
        if number == signal.SIGINT and self.told_to_stop:
            self.kill()
            return
        if self.told_to_stop:
            return
        self.told_to_stop = True
        say("stopping with a checkpoint after this step; Ctrl-C again stops at once")
        for rank in self.ranks:
            rank.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until every rank has ended; a failed rank's peers, perhaps stuck waiting, end after a grace."""
        failed_s: float | None = None
        while None in (codes := [rank.poll() for rank in self.ranks]):
            if failed_s is None and any(code not in (None, 0, STOPPED) for code in codes):
                failed_s = time.monotonic()
            if failed_s is not None and time.monotonic() - failed_s > GRACE_S:
                self.kill()
            time.sleep(POLL_S)

    def kill(self) -> None:
        for index, rank in enumerate(self.ranks):
            if rank.poll() is None:
                self.killed.add(index)
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()

    def exit_code(self) -> int:
        """2 if a rank says that the user erred, 75 if all stopped early, 0 if all are done, 1 otherwise."""
        codes: set[int] = set()
        for index, rank in enumerate(self.ranks):
            code = rank.returncode
            if code < 0 and index not in self.killed:
                if self.told_to_stop and code == -signal.SIGTERM:
                    code = STOPPED
                else:
                    hint = "; memory may have run out" if code == -signal.SIGKILL else ""
                    say(f"rank {index} was ended by {signal.Signals(-code).name}{hint}")
            codes.add(code)
        codes.discard(0)
        if 2 in codes:
            return 2
        return 0 if not codes else STOPPED if codes == {STOPPED} else 1


def say(line: str) -> None:
    print(f"ebbtide: {line}", file=sys.stderr, flush=True)
