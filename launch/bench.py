"""`ebbtide bench`: every strategy on this recipe's model and data, on this machine, side by side.

Each measurement is a fresh process. Times come first, in repeats with all sides in turn, the first one rotating, so
that a machine's drift meets all of them alike; then what does not vary: memory, the gradient's error, the longest
length. Everything measured is a line of `bench.jsonl` at once: what was stopped goes on with `--resume`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from distrib.errors import Interrupted, UserError
from distrib.files import write_text
from distrib.redaction import clean, clean_text, clean_texts, one_line
from launch.bench_result import HOW, summary
from launch.longest import Row, search
from launch.run_folder import refuse_links, refuse_unusable
from launch.sides import BASELINES, sections
from launch.spawn import say, started

if TYPE_CHECKING:
    from launch.recipe import Recipe

WARM_UP = 2
LENGTH_STEP = 256
EXACT = ("memory", "length")
"""What is measured with an allocator that gives back what is freed."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for. `budget_bytes`: look for the longest length within it."""

    sides: tuple[str, ...]
    lengths: tuple[int, ...]
    repeats: int
    steps: int
    budget_bytes: int | None


@dataclass(frozen=True)
class Task:
    kind: str
    side: str
    length: int
    repeat: int = 0

    @property
    def key(self) -> str:
        return f"{self.kind} {self.side} {self.length} {self.repeat}"


class Stopped(Exception):
    """By Ctrl-C or SIGTERM."""


class Book:
    """What was measured, in a file that is as long as what was done."""

    def __init__(self, folder: Path, head: Row, resume: bool) -> None:
        self.path = folder / "bench.jsonl"
        lines = _whole_lines(self.path) if resume else []
        if resume and (not lines or lines[0] != head):
            raise UserError(f"--resume: {folder} holds no comparison of this recipe with these options: leave it out")
        self._known: dict[str, Row] = {line["task"]: line["answer"] for line in lines[1:]}
        folder.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in (lines or [head])))

    def __contains__(self, task: Task) -> bool:
        return task.key in self._known

    def __getitem__(self, task: Task) -> Row:
        return self._known[task.key]

    def add(self, task: Task, answer: Row) -> None:
        answer = clean_texts(answer)
        self._known[task.key] = answer
        with self.path.open("a") as file:
            file.write(json.dumps({"task": task.key, "answer": answer}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def times(self, side: str, length: int) -> list[Row]:
        """One a repeat, as far as they are done."""
        found = [self._known.get(Task("time", side, length, repeat).key) for repeat in range(len(self._known))]
        return [row for row in found if row is not None]

    def machine(self) -> Row:
        """The device, as the first measurement that could see it did."""
        unknown = {"device": None, "devices": None, "device_memory_bytes": None}
        return next((row["machine"] for row in self._known.values() if "machine" in row), unknown)

    def failed(self, side: str, length: int) -> Row | None:
        return next((row for row in self.times(side, length) if row["status"] != "ok"), None)


def _whole_lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def bench(recipe: Recipe, options: Options, output: Path | None, resume: bool, command: str) -> Row:
    """The object of `bench --json`, also written as `bench.json`, `bench.md` and `bench.html`."""
    from launch.machine import host
    from launch.recipe_file import dump_recipe

    folder = folder_of(recipe, output, resume)
    refuse_unusable(folder)
    refuse_links(folder)
    refused, described = check(recipe, options)
    kept = clean(recipe.model_dump(mode="json"))
    head = {"recipe": kept, "options": json.loads(json.dumps(asdict(options)))}
    book = Book(folder, head, resume)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    described |= {"created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "command": clean_text(command)}
    described |= {"repeats": options.repeats, "steps": options.steps, "warm_up_steps": WARM_UP}
    described |= {"recipe": kept, "how": HOW}
    run = Run(recipe, options, folder, book, refused)
    stopped = False
    try:
        with stoppable():
            run.all()
    except Stopped:
        stopped = True
    described["machine"] = host() | book.machine()
    result = described | {
        "status": "partial" if stopped else "complete",
        "rows": clean_texts(summary(options, book, recipe, refused)),
    }
    _write(folder, result)
    if stopped:
        raise Interrupted(f"stopped; what is done is in {folder}, and --resume goes on")
    say(f"{folder}/bench.html, bench.md and bench.json are written")
    return result


def check(recipe: Recipe, options: Options) -> tuple[dict[str, str], Row]:
    """Why each side that is refused without weights is, and what model it is about. A mistake ends the command."""
    import strategies
    from distrib.topology import Topology
    from launch.assemble import Parts, checked, described

    topology = Topology(world=recipe.nproc, local_world=recipe.nproc, device_type=_device_type())
    for side in options.sides:
        strategies.build(sections(side, recipe))
    refused: dict[str, str] = {}
    plain = recipe.with_strategies([{"name": "plain"}])
    # Rows are tokenised here, once, and cached for the processes.
    for length in options.lengths:
        parts = Parts.of(plain.model_copy(update={"max_length": length}), topology)
    # A side is compared as it is, whatever it promises.
    measured = recipe.model_copy(update={"verify": False})
    for side in options.sides:
        try:
            if side not in BASELINES:
                checked(measured.with_strategies(sections(side, recipe)), topology)
        except UserError as error:
            refused[side] = str(error)
    return refused, {"model": described(parts)}


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def folder_of(recipe: Recipe, output: Path | None, resume: bool) -> Path:
    """A new folder, or the one to go on with: nothing that was measured is written over."""
    if output is not None:
        if not resume and output.exists() and any(output.iterdir()):
            raise UserError(f"--output {output} is in use: name another folder, or go on with --resume")
        return output
    first = Path(f"{recipe.output_dir}-bench")
    used = [first] if first.exists() else []
    while used and (following := Path(f"{first}-{len(used) + 1}")).exists():
        used.append(following)
    if resume:
        if not used:
            raise UserError(f"--resume: there is no {first}; leave --resume out to begin")
        return used[-1]
    return Path(f"{first}-{len(used) + 1}") if used else first


@contextmanager
def stoppable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Run:
    recipe: Recipe
    options: Options
    folder: Path
    book: Book
    refused: dict[str, str]

    def all(self) -> None:
        tasks = [task for task in self.tasks() if task.side not in self.refused]
        begin, done = time.monotonic(), 0
        for index, task in enumerate(tasks):
            if task in self.book or self.book.failed(task.side, task.length):
                continue
            answer = self.measure(task)
            done += 1
            left_s = (time.monotonic() - begin) / done * (len(tasks) - index - 1)
            say(f"{index + 1}/{len(tasks)} {_told(task, answer)}, about {left_s / 60:.0f} min left")
        for side in self.options.sides if self.options.budget_bytes is not None else ():
            if side not in self.refused and not self.book.failed(side, self.options.lengths[0]):
                self.longest(side)

    def tasks(self) -> Iterator[Task]:
        sides, lengths = self.options.sides, self.options.lengths
        for repeat in range(self.options.repeats):
            first = repeat % len(sides)
            for length in lengths:
                for side in sides[first:] + sides[:first]:
                    yield Task("time", side, length, repeat)
        for side in sides:
            for length in lengths:
                yield Task("memory", side, length)
        for side in sides:
            if side not in BASELINES:
                yield Task("error", side, lengths[0])

    def longest(self, side: str) -> None:
        summary = Task("longest", side, 0)
        if summary in self.book:
            return

        def probe(steps: int) -> Row:
            task = Task("length", side, steps * LENGTH_STEP)
            answer = self.book[task] if task in self.book else self.measure(task)
            return answer | {"peak_bytes": answer.get("total_peak_bytes")}

        found = search(probe, self.options.budget_bytes, _longest_possible(self.recipe) // LENGTH_STEP)
        self.book.add(summary, found | {"max_length": found["steps"] * LENGTH_STEP if "steps" in found else None})

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """An empty folder; what a killed comparison left there goes."""
        folder = self.folder / "scratch"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def measure(self, task: Task) -> Row:
        from distrib.meters import EXACT_MALLOC

        with self._scratch() as scratch:
            answer = scratch / "answer.json"
            job = {
                "recipe": str(self.folder / "recipe.yaml"),
                "side": task.side,
                "length": task.length,
                "max_length": self.options.lengths[0] if task.kind == "length" else task.length,
                "kind": task.kind,
                "steps": self.options.steps,
                "warm_up": WARM_UP,
                "answer": str(answer),
            }
            log = scratch / "log"
            environment = EXACT_MALLOC if task.kind in EXACT else {}
            with log.open("wb") as output:
                arguments = ([json.dumps(job)], self.recipe.nproc, output, environment)
                with started("launch.bench_worker", *arguments) as ranks:
                    ranks.wait()
            found = json.loads(answer.read_text()) if answer.exists() else _died(ranks.ranks, log)
        self.book.add(task, found)
        return dict(found)


def _died(ranks: Any, log: Path) -> Row:
    """What can be said of a worker that left no answer."""
    if any(rank.returncode == -signal.SIGKILL for rank in ranks):
        return {"status": "oom", "why": "the system ended the process, which had taken all memory"}
    last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]
    return {"status": "failed", "why": one_line(last, 500)}


def _told(task: Task, answer: Row) -> str:
    from statistics import median

    what = f"{task.side} at {task.length}"
    if answer["status"] != "ok":
        return f"{what}: {answer['status']}: {answer.get('why')}"
    if task.kind == "time":
        return f"{what}: {median(answer['step_s']):.3g} s a step"
    if "grad_error" in answer:
        return f"{what}: gradients off by {answer['grad_error']:.1e}, {answer['verdict']}"
    if answer.get("activation_peak_bytes"):
        return f"{what}: {answer['activation_peak_bytes'] / 2**20:.0f} MiB of activations"
    return f"{what}: {task.kind} measured"


def _longest_possible(recipe: Recipe) -> int:
    from launch.models import load_config

    return int(getattr(load_config(recipe), "max_position_embeddings", None) or 2**20)


def _write(folder: Path, result: Row) -> None:
    from launch.pages.bench import bench_html, bench_markdown

    write_text(folder / "bench.json", json.dumps(result, indent=1))
    write_text(folder / "bench.md", bench_markdown(result))
    write_text(folder / "bench.html", bench_html(result))
