"""What makes many ranks look like one program: one error is shown, every rank ends, nobody is orphaned."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from distrib.errors import Interrupted, NotFinite, NotWritten, UserError, WrongGradients
from distrib.redaction import one_line, without_values
from launch.spawn import STOPPED, SUPERVISED, launched, say

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from distrib.topology import Topology

T = TypeVar("T")
ORPHAN_GRACE_S = 60.0
STORE_GRACE = timedelta(seconds=5)
PEERS_GRACE_S = 5.0
SLOWEST_PEER_S = 20.0
"""How long a rank whose mistake is every rank's stays for the others, without a word from them and at most: launchers
end all ranks once one is gone."""


def exit_code(error: BaseException) -> int:
    return 2 if isinstance(error, UserError) else STOPPED if isinstance(error, Interrupted) else 1


def report(error: BaseException, rank: str | None) -> None:
    """One line for what a user can act on, a traceback for the rest, once."""
    where = f"rank {rank}: " if rank is not None else ""
    if isinstance(error, UserError | Interrupted | NotFinite | NotWritten | WrongGradients):
        say(one_line(error))
    elif isinstance(error, KeyboardInterrupt):
        say("interrupted")
    elif isinstance(error, RuntimeError) and "gloo/transport" in str(error):
        # a peer is gone without a word, or hangs: whoever started it knows how it ended
        late = "Timed out" in str(error)
        say(f"{where}{'waited too long for' if late else 'lost the connection to'} another rank")
    else:
        lines = without_values("".join(traceback.format_exception(error))).splitlines()
        print("\n".join(where + line for line in lines), file=sys.stderr, flush=True)


def report_alone(error: BaseException, env: Mapping[str, str]) -> None:
    """Report an error from before the ranks can talk.

    All ranks see a user's mistake alike, so one a node speaks, before the others leave; any other error may be one
    rank's alone, so each adds a line.
    """
    if not launched(env):
        report(error, None)
    elif int(env.get("LOCAL_RANK") or env.get("SLURM_LOCALID") or 0) == 0:
        report(error, _rank(env))
    elif isinstance(error, UserError):
        if SUPERVISED not in env:
            time.sleep(PEERS_GRACE_S)
    elif not isinstance(error, Interrupted | KeyboardInterrupt):
        say(f"rank {_rank(env)}: {type(error).__name__}: {one_line(error)}")


def _rank(env: Mapping[str, str]) -> str:
    return env.get("RANK") or env.get("SLURM_PROCID") or "0"


def run_ranked(main: Callable[[], T], topology: Topology, store: Store | None) -> T:
    """Run `main` on this rank of a job; the first rank that fails speaks, and a failure ends the process.

    A failed rank leaves without the usual end of the interpreter, where collectives that its peers still wait
    in could hold it up.
    """
    if store is None:
        return main()
    try:
        result = main()
    except Interrupted as error:
        if topology.main:
            report(error, None)
        _leave(STOPPED)
    except BaseException as error:
        _leave(_settle(error, topology, store))
    import torch.distributed as dist

    dist.destroy_process_group()
    return result


def _settle(error: BaseException, topology: Topology, store: Store) -> int:
    """The exit code of the whole job, said by the rank that failed first; the others' errors follow."""
    code = exit_code(error)
    try:
        store.set_timeout(STORE_GRACE)
        if store.add("failed", 1) > 1:
            return int(store.get("failed_code"))
        store.set("failed_code", str(code))
    except RuntimeError:
        # the store ended with the rank that held it: that one failed first and spoke
        return code
    report(error, str(topology.rank))
    if isinstance(error, UserError):
        _await_peers(store, topology.world)
    return code


def _await_peers(store: Store, world: int) -> None:
    end = time.monotonic() + SLOWEST_PEER_S
    with suppress(RuntimeError):
        while store.add("failed", 0) < world and time.monotonic() < end:
            time.sleep(0.05)


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def stoppable() -> Iterator[None]:
    """Where the loop does not listen for itself, SIGTERM and Ctrl-C end at once: there is nothing to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if not launched(os.environ) or _rank(os.environ) == "0":
            os.write(2, b"ebbtide: stopped outside of a step; the same command goes on\n")
        os._exit(STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def follow_supervisor() -> None:
    """End with the process that started the ranks, even when that is killed: the pipe it held ends then."""
    if SUPERVISED not in os.environ:
        return

    def wait_for_end() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_GRACE_S)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait_for_end, daemon=True).start()
