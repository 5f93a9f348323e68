"""Small runs whose checkpoints can be spoilt and whose saves can be killed: a real engine and the real loop, in a
process that has both ready and forks for every case.

    python checkpoint_cases.py FOLDER MODE     # kills a save at each of its points; prints what came of it as JSON
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine_cases import make_engine, recipe
from torch import Tensor

from distrib import checkpoint, saving
from distrib.checkpoint import Manifest, Progress
from distrib.contracts import Batch, Context, Result, Window
from distrib.engines import storage
from distrib.loop import Loop
from distrib.numbers import Plan
from distrib.optim import Schedule
from distrib.resume import resume
from distrib.topology import Topology

STEPS, INTERVAL = 6, 2


class FakeEngine:
    """Writes these files."""

    name = "ddp"

    def __init__(self, files: dict[str, bytes] | None = None, topology: Topology | None = None) -> None:
        self.files = {"weights": b"0123456789" * 10, "zero/state": b"abc"} if files is None else files
        self.topology = topology or Topology()

    def save(self, create: Any) -> None:
        for name, data in self.files.items():
            with create(name) as file:
                file.write(data)


def save(run: Path, step: int, keep: int | None = None, background: bool = False, **changes: Any) -> str | None:
    """What `finish` says: why nothing was saved."""
    fields = {"strategy": ["plain"], "versions": {"torch": torch.__version__}} | changes
    engine: Any = fields.pop("engine", None) or FakeEngine()
    best = fields.pop("best", False)
    manifest = Manifest(Progress(step, 10 * step, 9, 8, 4 * step), engine.topology.world, "ddp", 4, **fields)
    return saving.Saving(run, engine, manifest, saving.CopyBuffer() if background else None).finish(keep, best)


def plan(run: Path, **changes: Any) -> Plan:
    run.mkdir(exist_ok=True, parents=True)
    known: dict[str, Any] = {
        "run": run,
        "steps": STEPS,
        "global_batch": 4,
        "rows": None,
        "schedule": Schedule(1e-2, STEPS, kind="linear"),
        "seed": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_steps": INTERVAL,
        "save_total_limit": 2,
        "eval_steps": None,
    }
    return Plan(**{**known, **changes})


class Real:
    """A small model under an engine, trained by the loop on numbered rows."""

    def __init__(self, engine: str = "ddp", topology: Topology | None = None, **changes: Any) -> None:
        made_from = recipe(engine=engine if isinstance(engine, dict) else {"name": engine}, **changes)
        self.engine, _ = make_engine(topology or Topology(), made_from, None)
        self.evaluate: Callable[[int], dict[str, Any]] = lambda index: {}

    def step(self, batches: list[Batch], context: Context) -> Result:
        (batch,) = batches
        with self.engine.micro_batch(last=True):
            loss = self.engine.module(**batch, labels=batch["input_ids"]).loss
            self.engine.backward(loss)
        return Result(loss.detach(), 4)

    def window(self, start: int, stop: int) -> Window:
        topology = self.engine.topology
        ids = list(range(start, stop))[topology.rank :: topology.world]
        batch = {"input_ids": torch.tensor([[number % 50 for number in ids]])}
        return Window([batch], ids, tokens=4, nonpad_tokens=4, loss_tokens=4)

    def run(self, made: Plan, chosen: Path | None = None) -> Progress:
        meter: Any = SimpleNamespace(read=lambda: None, between=lambda *_, **__: _NoAccount())
        step: Any = self.step
        loop = Loop(made, self.engine, step, self.window, lambda batch: 4.0, _nothing, self.evaluate, _nothing, meter)
        return loop.run(resume(made, self.engine, step, loop.guard, chosen))

    def state(self) -> dict[str, Any]:
        """Weights and the optimizer's state."""
        parts: Any = self.engine
        return {f"{part}.{name}": value for part, values in parts._state().items() for name, value in values.items()}


def equal(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        for name, value in expected.items()
    )


class _NoAccount:
    joules = joules_per_token = source = None
    coverage = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {}


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def points(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with a count before everything that a save does to the disk: opening, writing, syncing, renaming,
    making and removing, of files and folders."""
    count = [0]
    lock = threading.Lock()

    def point() -> None:
        with lock:
            count[0] += 1
            number = count[0]
        act(number)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if act is _nothing or not active[0]:
            return
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open") and "checkpoints" in str(args[0]):
            point()

    active = [True]
    sys.addaudithook(hook)
    fsync, write_all = os.fsync, saving.write_all

    def counted(original: Any) -> Any:
        def call(*args: Any) -> Any:
            point()
            return original(*args)

        return call

    os.fsync, saving.write_all = counted(fsync), counted(write_all)
    try:
        yield
    finally:
        active[0] = False
        os.fsync, saving.write_all = fsync, write_all


@contextmanager
def files_up_to(count: int) -> Iterator[None]:
    """The kernel's own limit: what lies beyond is refused as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _in_fork(work: Callable[[], None]) -> int:
    """How a forked process ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def kill_everywhere(folder: Path, background: bool) -> dict[str, Any]:
    """Every point of the saves of a run, killed there and started again; what it comes to."""
    real = Real()
    total = folder / "total"

    def whole() -> None:
        seen = [0]
        with points(lambda number: seen.__setitem__(0, number)):
            real.run(plan(folder / "whole", save_async=background, save_total_limit=1))
        total.write_text(str(seen[0]))
        torch.save(real.state(), folder / "whole.pt")

    assert _in_fork(whole) == 0
    expected = torch.load(folder / "whole.pt")
    ids = (folder / "whole" / "samples.jsonl").read_text()
    told: dict[str, Any] = {"points": int(total.read_text()), "killed": 0, "same": 0, "lost": []}
    for number in range(1, told["points"] + 1):
        made = plan(folder / str(number), save_async=background, save_total_limit=1)

        def cut(made: Plan = made, number: int = number) -> None:
            with points(lambda seen: os.kill(os.getpid(), signal.SIGKILL) if seen == number else None):
                real.run(made)

        def again(made: Plan = made, number: int = number) -> None:
            found, _ = checkpoint.newest(made.run)
            (made.run / "from").write_text(str(checkpoint.step_of(found) if found else 0))
            real.run(made)
            torch.save(real.state(), made.run / "state.pt")

        told["killed"] += _in_fork(cut) == signal.SIGKILL
        samples = made.run / "samples.jsonl"
        done = len(samples.read_text().splitlines()) if samples.exists() else 0
        assert _in_fork(again) == 0
        same = equal(torch.load(made.run / "state.pt"), expected)
        told["same"] += same and samples.read_text() == ids
        told["lost"].append(done - int((made.run / "from").read_text()))
    return told


def two_agree(topology: Topology, folder: str, engine: str) -> dict[str, Any]:
    """Rank 1 cannot write its part of step 4; then the newest is damaged; then all are."""
    from distrib.errors import NotWritten, UserError

    run, told = Path(folder), {}
    real = Real(engine, topology)
    real.run(plan(run, steps=2))
    write_all = saving.write_all
    if topology.rank == 1:
        saving.write_all = _broken
    try:
        # Under ddp rank 1 may have nothing to write.
        engine_save = real.engine.save
        real.engine.save = lambda create: (engine_save(create), create(f"rank-{topology.rank}").write(b"x"))[1]  # type: ignore[method-assign]
        real.run(plan(run, steps=8))
    except NotWritten as error:
        told["failed"] = str(error)
    saving.write_all = write_all
    saving.wait(real.engine)
    if topology.main:
        broken = run / "checkpoints" / "step-3"
        broken.mkdir()
        (broken / checkpoint.MANIFEST).write_text("{")
    saving.wait(real.engine)
    source, _ = saving.from_main(topology, lambda: checkpoint.newest(run))
    told["resumed"] = checkpoint.step_of(source)
    if topology.main:
        checkpoint.drop_after(run, 2)
    saving.wait(real.engine)
    told["left"] = sorted(path.name for path in (run / "checkpoints").iterdir())
    if topology.main:
        (run / "checkpoints" / "step-2" / checkpoint.COMMITTED).unlink()
    saving.wait(real.engine)
    try:
        Real(engine, topology).run(plan(run, steps=8))
    except UserError as error:
        told["refused"] = str(error)
    return told


def _broken(file: Any, data: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Canary:
    """A pickle that makes a file when it is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def planted_under_zero(topology: Topology, folder: str) -> list[str]:
    """What is said when each file holds a planted pickle: both ranks read it, or rewrite it, or read its weights."""
    from distrib.engines import zero
    from distrib.engines.zero import TAG, read_weights
    from distrib.errors import UserError

    run = Path(folder) / "run"
    real = Real({"name": "zero", "stage": 2}, topology)
    real.run(plan(run, steps=2))
    saving.wait(real.engine)
    source = run / "checkpoints" / "step-2" / "engine"
    for path in sorted((source / TAG).iterdir()) if topology.main else ():
        torch.save({"module": {}, "optimizer_state_dict": Canary(Path(folder) / "canary")}, path)
    saving.wait(real.engine)
    said = []
    engine: Any = real.engine

    def reshard() -> None:
        with storage.only_data(source, *zero._classes()):
            zero._convert_to_universal(source / TAG, Path(folder) / f"universal-{topology.rank}")

    for read in (lambda: engine.load(source), reshard, lambda: read_weights(source)):
        try:
            read()
        except UserError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(kill_everywhere(Path(sys.argv[1]), sys.argv[2] == "background")))
