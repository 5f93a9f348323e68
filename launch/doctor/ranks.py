"""What ranks find out together: those of a launcher, or a few that are started for it.

`python -m launch.doctor.ranks ANSWER`, once a rank, is what is started; ANSWER is the file for what was found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distrib.redaction import cleaned_output, one_line
from launch.spawn import started

if TYPE_CHECKING:
    from torch.distributed import Store

    from distrib.topology import Topology

HANG_S = 20.0
START_S = 180.0
"""In which ranks that are started here have to be done, loading torch included."""
Facts = dict[str, Any]
End = Callable[[str | None], None]


def connected() -> tuple[Topology, Store | None, str | None]:
    """This rank among those that a launcher started; where they do not find each other, it is alone, and why."""
    from distrib.topology import Topology, connect, read_environment

    try:
        topology = read_environment()
        if topology.device_type == "cuda" and not _one_each(topology):
            topology = replace(topology, device_type="cpu")
        return topology, connect(topology), None
    except Exception as error:
        return Topology(), None, f"{type(error).__name__}: {one_line(error, 300)}"


def _one_each(topology: Topology) -> bool:
    import torch

    return topology.local_world <= torch.cuda.device_count()


def measure(topology: Topology) -> Facts:
    """All ranks call it; rank 0 gets all that came of it."""
    from distrib.heartbeat import HERE
    from launch.doctor import clocks, links

    HERE.at("measuring links")
    return {"links": links.measure(topology), "clocks": clocks.differences(topology)}


def watched(topology: Topology, store: Store | None, work: Callable[[], Facts], end: End) -> Facts:
    """`work`, while a heartbeat looks whether all ranks go on. If one does not, `end` is given the line that names it
    on one rank, None on others, and each process ends, with 1 so that whoever started the ranks ends the one that
    cannot."""
    if store is None:
        return work()
    from distrib.heartbeat import HERE, Heart

    def leave(code: int, line: str | None, mine: bool, linger: Callable[[], None]) -> NoReturn:
        try:
            end(line)
            linger()
        finally:
            os._exit(1)

    HERE.at("looking at its machine", prompt=False)
    heart = Heart(store, topology.rank, topology.world, HANG_S, leave)
    heart.start()
    try:
        return work()
    finally:
        heart.close()


def started_here(devices: int) -> Facts:
    """What two ranks on this machine find, or one a GPU where there are several; `why` where they find nothing."""
    nproc = max(2, devices)
    environment = {"CUDA_VISIBLE_DEVICES": ""} if devices == 1 else {}
    with tempfile.TemporaryDirectory(prefix="ebbtide-") as folder:
        answer, log = Path(folder, "answer.json"), Path(folder, "log")
        with (
            log.open("wb") as output,
            started("launch.doctor.ranks", [str(answer)], nproc, output, environment) as job,
        ):
            late = threading.Timer(START_S, job.kill)
            late.start()
            try:
                job.wait()
            finally:
                late.cancel()
        return dict(json.loads(answer.read_text())) if answer.exists() else {"why": _ended(job.ranks, log)}


def _ended(ranks: Sequence[subprocess.Popen[bytes]], log: Path) -> str:
    if all(rank.returncode == -9 for rank in ranks):
        return f"the ranks were not done after {START_S:g} s"
    last = (log.read_text(errors="replace").strip().splitlines() or ["the ranks ended without a word"])[-1]
    return one_line(last, 300)


def main() -> None:
    from distrib.topology import connect, read_environment
    from launch.cli import quieten
    from launch.rank import follow_supervisor

    follow_supervisor()
    quieten()
    answer = Path(sys.argv[1])
    topology = read_environment()

    def end(line: str | None) -> None:
        if line:
            _write(answer, {"why": line})

    found = watched(topology, connect(topology), lambda: measure(topology), end)
    if topology.main:
        _write(answer, found)
    # a hundred threads of gloo have no more to do
    os._exit(0)


def _write(path: Path, found: Facts) -> None:
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(found))
    draft.replace(path)


if __name__ == "__main__":
    with cleaned_output():
        main()
