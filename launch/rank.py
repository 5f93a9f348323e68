"""What makes many ranks look like one program: one error is shown, every rank ends, nobody is orphaned."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

from distrib.errors import Interrupted, NotFinite, NotReached, NotWritten, OutOfMemory, UserError, WrongGradients
from distrib.heartbeat import BEAT_S, END, FAILED, FAILED_CODE, Heart, announce
from distrib.redaction import one_line, without_values
from distrib.told import AT_ONCE, EARS, KINDS, give_back, handle
from launch.spawn import FOLLOWED, FULL, SAID, STOPPED, SUPERVISED, launched, say

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from distrib.topology import Topology

T = TypeVar("T")
ORPHAN_GRACE_S = 60.0
STORE_GRACE = timedelta(seconds=5)
PEERS_GRACE_S = 5.0
"""How long a rank whose mistake is every rank's stays for the others: launchers end all ranks once one is gone."""
ENDING = threading.Lock()


def exit_code(error: BaseException) -> int:
    if isinstance(error, OutOfMemory) and SUPERVISED in os.environ:
        return FULL
    if isinstance(error, UserError):
        return 2
    if isinstance(error, Interrupted):
        return STOPPED
    return failed(FOLLOWED if _lost_a_peer(error) else SAID)


def failed(how: int) -> int:
    """What started the ranks here is told more than others: who failed, and who merely followed."""
    return how if SUPERVISED in os.environ else 1


def _lost_a_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and "gloo/transport" in str(error)


def report(error: BaseException, rank: str | None) -> None:
    """One line for what a user can act on, a traceback for the rest, once."""
    where = f"rank {rank}: " if rank is not None else ""
    if isinstance(error, UserError | Interrupted | NotFinite | NotReached | NotWritten | WrongGradients):
        say(one_line(error))
    elif isinstance(error, KeyboardInterrupt):
        say("interrupted")
    elif _lost_a_peer(error):
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


class Rank:
    """This process as one of a job: what hears its signals, and the heartbeat, once there is a store."""

    def __init__(self) -> None:
        self._heart: Heart | None = None
        self._failed = False

    def run(self, main: Callable[[], T], topology: Topology, store: Store | None, hang_timeout_s: float) -> T:
        """Run `main`; the first rank that fails speaks, and a failure ends the process.

        A failed rank leaves without the usual end of the interpreter, where collectives that its peers still wait
        in could hold it up.
        """
        if store is None:
            return main()
        self._heart = Heart(store, topology.rank, topology.world, hang_timeout_s, _end)
        self._heart.start()
        try:
            result = main()
        except Interrupted as error:
            if topology.main:
                report(error, None)
            _leave(STOPPED)
        except BaseException as error:
            self._failed = True  # and is about to leave: a launcher tells the others of a failed rank to stop
            _leave(_settle(error, topology, store))
        self._heart.close()
        import torch.distributed as dist

        dist.destroy_process_group()
        return result

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """A thread hears the signals: the main thread may wait in a collective, for as long as that takes.

        Where the loop does not listen, and at a second signal, all ranks leave at once.
        """
        heard, signalled = os.pipe()
        os.set_blocking(signalled, False)
        handlers = handle(lambda kind, frame: None)
        before = signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        EARS.in_thread = True
        os.register_at_fork(after_in_child=_deaf)
        threading.Thread(target=self._hear, args=(heard,), daemon=True).start()
        try:
            yield
        finally:
            EARS.in_thread = False
            signal.set_wakeup_fd(before)
            give_back(handlers)

    def _hear(self, heard: int) -> None:
        while True:
            if ord(os.read(heard, 1)) in KINDS and EARS.at_once() and not self._failed:
                if self._heart:
                    self._heart.leave(STOPPED)
                _end(STOPPED, None, False, lambda: None)


def _deaf() -> None:
    """A forked helper would pass its own signals on to this process, and live through them."""
    if EARS.in_thread:
        signal.set_wakeup_fd(-1)
        for kind in KINDS:
            signal.signal(kind, signal.SIG_DFL)


def _end(code: int, line: str | None, mine: bool, linger: Callable[[], None]) -> NoReturn:
    """Called by threads, whatever the main thread is in; the first of them ends the process."""
    ENDING.acquire()
    if line:
        say(line)
    if code == STOPPED and _speaks_for_all():
        say(AT_ONCE)
    linger()
    _leave(failed(SAID if mine else FOLLOWED) if code == 1 else code)


def _settle(error: BaseException, topology: Topology, store: Store) -> int:
    """The exit code of the whole job, said by the rank that failed first; the others' errors follow."""
    code = exit_code(error)
    said = code if code in (2, FULL) else 1
    try:
        store.set_timeout(STORE_GRACE)
        if store.check([END]):
            time.sleep(PEERS_GRACE_S)  # in which the heart, which sees it too, ends this process
        if store.add(FAILED, 1) > 1:
            return _followed(int(store.get(FAILED_CODE)))
        store.set(FAILED_CODE, str(said))
    except RuntimeError:
        # the store ended with the rank that held it: that one failed first and spoke
        return code
    report(error, str(topology.rank))
    announce(store, said, None if _lost_a_peer(error) else topology.rank)
    # launchers end all ranks once one is gone, and rank 0 may hold the store
    time.sleep(3 * BEAT_S)
    return code


def _followed(code: int) -> int:
    return failed(FOLLOWED) if code == 1 else code


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _speaks_for_all() -> bool:
    return not launched(os.environ) or _rank(os.environ) == "0"


@contextmanager
def stoppable() -> Iterator[None]:
    """Before there is anything to save, SIGTERM and Ctrl-C end at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        if _speaks_for_all():
            os.write(2, f"ebbtide: {AT_ONCE}\n".encode())
        os._exit(STOPPED)

    before = handle(stop)
    try:
        yield
    finally:
        give_back(before)


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
