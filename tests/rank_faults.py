"""Ranks of the real command that fail in a way and at a place that the environment names, once.

`sitecustomize.py`, which Python imports by itself, puts `train` in the place of the trainer's; it arms the fault, and
then the real one trains.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train_cases import recipe

from distrib.topology import Topology
from launch.recipe_file import dump_recipe

ROOT = Path(__file__).resolve().parents[1]
SITE = """
import sys
from types import ModuleType

def train(recipe, topology):
    del sys.modules["launch.train"]
    import rank_faults
    from launch import train
    rank_faults.arm(topology)
    return train.train(recipe, topology)

module = ModuleType("launch.train")
module.train = train
sys.modules["launch.train"] = module
"""
ASLEEP_S = 600


def again(number: int) -> None:
    os.kill(os.getpid(), number)
    if os.fork() == 0:
        time.sleep(1.3)
        os.kill(os.getppid(), number)
        os._exit(0)
    time.sleep(ASLEEP_S)


def full() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


FAULTS: dict[str, Callable[[], Any]] = {
    "KILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "STOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "SEGV": lambda: ctypes.string_at(0),
    "exception": lambda: 1 / 0,
    "memory": full,
    "sleep": lambda: time.sleep(ASLEEP_S),
    "cut": lambda: subprocess.run(["ip", "link", "set", "tide", "down"], check=True),
    "pause": lambda: time.sleep(2),
    "exit": lambda: os._exit(3),
    "quiet exit": lambda: os._exit(0),
    "sys.exit": lambda: sys.exit(3),
    "TERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "USR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "TERM twice": lambda: again(signal.SIGTERM),
    "USR1 twice": lambda: again(signal.SIGUSR1),
}


@dataclass(frozen=True)
class Fault:
    """`steps`: before which steps (from 0) it strikes, in the phases that have steps; each once."""

    name: str
    phase: str
    rank: int
    steps: tuple[int, ...] = (3,)


def arm(topology: Topology) -> None:
    name, phase, rank, steps, notes = os.environ["FAULT"].split("|")
    (Path(notes) / f"pid-{topology.rank}").write_text(str(os.getpid()))
    if topology.rank != int(rank):
        return
    import launch.assemble
    from distrib import loop
    from launch import train

    def before(owner: Any, function: str, step: Callable[..., int | None] = lambda *args: None) -> None:
        real = getattr(owner, function)

        def acting(*args: Any, **kwargs: Any) -> Any:
            at = step(*args)
            note = Path(notes) / f"struck-{at}"
            if (at is None or str(at) in steps.split(",")) and not note.exists():
                note.write_text(str(time.time()))
                FAULTS[name]()
            return real(*args, **kwargs)

        setattr(owner, function, acting)

    if phase == "loading":
        before(launch.assemble.Parts, "model")
    if phase == "preflight":
        before(loop.Loop, "preflight")
    if phase == "step":
        before(loop.Loop, "_update", lambda self, index, *args: index)
    if phase == "saving":
        before(loop.Loop, "_save", lambda self, progress: progress.step)
    if phase == "evaluation":
        before(loop.Loop, "_now_and_then", lambda self, progress: progress.step)
    if phase == "finishing":
        before(train, "_finish")


def command(folder: Path, dataset: str, fault: Fault, *launcher: str, **changes: Any) -> tuple[list[str], Any]:
    """The command line and the environment that train under this fault."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    common = {"max_steps": 6, "save_steps": 2, "energy": {"idle_s": 0.0}, "hang_timeout_s": 3.0}
    made = recipe(folder / "run", dataset, **{**common, **changes})
    (folder / "recipe.yaml").write_text(dump_recipe(made))
    path = os.pathsep.join([str(folder), str(ROOT / "tests"), str(ROOT)])
    steps = ",".join(map(str, fault.steps))
    told = f"{fault.name}|{fault.phase}|{fault.rank}|{steps}|{folder}"
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FAULT": told}
    return [sys.executable, *launcher, "-m", "launch", "train", str(folder / "recipe.yaml")], {**os.environ, **own}


@dataclass(frozen=True)
class Outcome:
    """Seconds are from the last fault on."""

    code: int
    said: list[str]
    said_s: float
    ended_s: float


def run(folder: Path, dataset: str, fault: Fault, *launcher: str, **changes: Any) -> Outcome:
    words, environment = command(folder, dataset, fault, *launcher, **changes)
    said, times = [], [0.0]
    with subprocess.Popen(words, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(("ebbtide: ", "rank ")):
                said.append(line.rstrip())
                times.append(time.time())
    now = time.time()
    struck = max((float(note.read_text()) for note in folder.glob("struck-*")), default=now)
    return Outcome(process.returncode, said, min([at for at in times if at > struck] or [now]) - struck, now - struck)


def alive(folder: Path) -> list[int]:
    """Ranks of which a process is left."""

    def runs(pid: str) -> bool:
        try:
            return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
        except FileNotFoundError:
            return False

    return [int(note.name[4:]) for note in folder.glob("pid-*") if runs(note.read_text())]
