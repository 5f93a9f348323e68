"""`ebbtide timeline`: schedules of the recipe's pipeline on paper, or a recorded one, as figures and as a picture."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.errors import UserError, choose
from distrib.files import write_text
from distrib.pipeline import record
from distrib.pipeline.ops import Schedule, parse
from distrib.pipeline.schedules import NAMES, make
from distrib.pipeline.simulate import Costs, check, simulate
from launch.pages.text import byte_count, figure, percent, si
from launch.pages.timeline import View, micro_batches, png, svg, trace

if TYPE_CHECKING:
    from launch.recipe import Recipe

MOST = 2**14
"""Micro-batches of all ranks together that are still a picture."""


@dataclass(frozen=True)
class Options:
    """What stands on the command line."""

    schedule: str | None = None
    micro_batches: int | None = None
    stages: int | None = None
    costs: str | None = None
    recorded: Path | None = None
    output: Path | None = None


@dataclass(frozen=True)
class _Pipeline:
    """What of the recipe a schedule follows from."""

    ranks: int
    micro_batches: int
    pending: int | None


def timeline(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The figures of every schedule; the picture is written where `output` says."""
    if options.output and options.output.suffix not in (".svg", ".png", ".json"):
        raise choose(f"the ending of --output {options.output}", options.output.suffix, (".svg", ".png", ".json"))
    section = next((one.model_extra or {} for one in recipe.strategy if one.name == "twobp"), {})
    if options.recorded:
        pipeline, views = _recorded(section, options)
    else:
        pipeline = _pipeline(recipe, section, options)
        costs = _costs(options.costs)
        words = options.schedule or _field(section, "schedule", str, "h1")
        schedules = _schedules(words, pipeline, Costs.equal(pipeline.ranks, *costs))
        views = [_view(schedule, pipeline.ranks, costs) for schedule in schedules]
    result = {
        "ranks": pipeline.ranks,
        "micro_batches": pipeline.micro_batches,
        "schedules": [_figures(view) for view in views],
        "written": None if options.output is None else str(options.output),
    }
    if options.output:
        _write(options.output, pipeline, views)
    return result


def _pipeline(recipe: Recipe, section: dict[str, Any], options: Options) -> _Pipeline:
    ranks = options.stages if options.stages is not None else _field(section, "stages", int, None)
    if ranks is None:
        raise UserError("the recipe has no strategy twobp with its stages: add --stages N, the ranks of the pipeline")
    micro_batches = options.micro_batches
    if micro_batches is None:
        micro_batches = _micro_batches(recipe, max(1, recipe.nproc // max(1, ranks)))
    if ranks < 1 or micro_batches < 1:
        raise UserError(f"--stages {ranks} with --micro-batches {micro_batches}: must be at least 1 each")
    if ranks * micro_batches > MOST:
        raise UserError(
            f"{micro_batches} micro-batches on {ranks} ranks: at most {MOST} together; lower --micro-batches"
        )
    return _Pipeline(ranks, micro_batches, _field(section, "pending", int, None))


def _micro_batches(recipe: Recipe, replicas: int) -> int:
    from launch.recipe_file import global_batch

    return global_batch(recipe, replicas) // (recipe.per_device_train_batch_size * replicas)


def _field(section: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = section.get(name)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UserError(f"strategy.{name}={value!r}: must be {'a whole number' if kind is int else 'text'}")
    return default if value is None else value


def _costs(text: str | None) -> tuple[float, float, float]:
    try:
        forward, input, weight = (float(part) for part in (text or "1:1:1").split(":"))
    except ValueError:
        raise UserError(f"--costs {text}: must be three numbers, as in 1:1.2:0.7") from None
    if not all(0 < cost < math.inf for cost in (forward, input, weight)):
        raise UserError(f"--costs {text}: must be above 0")
    return forward, input, weight


def _schedules(words: str, pipeline: _Pipeline, costs: Costs) -> list[Schedule]:
    return [
        make(word, pipeline.ranks, pipeline.micro_batches, costs, pending=pipeline.pending if word == "h1" else None)
        if word in NAMES
        else _from_file(word, pipeline)
        for word in words.split(",")
    ]


def _from_file(word: str, pipeline: _Pipeline) -> Schedule:
    if not Path(word).is_file():
        raise choose("schedule", word, (*NAMES, "a file"))
    try:
        schedule = parse(Path(word).read_text(encoding="utf-8"), Path(word).name)
    except (OSError, ValueError) as error:
        raise UserError(f"schedule {word}: {getattr(error, 'strerror', None) or error}") from None
    check(schedule)
    for what, given, needed in (
        ("ranks", len(schedule.ranks), pipeline.ranks),
        ("micro-batches", schedule.micro_batches, pipeline.micro_batches),
    ):
        if given != needed:
            raise UserError(f"schedule {word}: has {given} {what}, and the pipeline {needed}")
    return schedule


def _view(schedule: Schedule, ranks: int, costs: tuple[float, float, float]) -> View:
    """Costs and memory are those of a rank's share of the model, in however many stages it is."""
    share = ranks / schedule.stages
    each = replace(Costs.equal(schedule.stages, *(share * cost for cost in costs)), held=share, stashed=share)
    return View(simulate(schedule, each), each)


def _recorded(section: dict[str, Any], options: Options) -> tuple[_Pipeline, list[View]]:
    """What a run recorded, then the schedules that were asked for at the costs that it had."""
    assert options.recorded
    for flag in ("stages", "micro_batches", "costs"):
        if getattr(options, flag) is not None:
            raise UserError(f"--{flag.replace('_', '-')} with --recorded, which has its own: leave it out")
    line = record.read(options.recorded)
    ran = Schedule(line.schedule, tuple(tuple(span.op for span in spans) for spans in line.ranks))
    check(ran)
    share = len(ran.ranks) / ran.stages
    costs = replace(Costs.measured(line), held=share, stashed=share)
    pipeline = _Pipeline(len(ran.ranks), ran.micro_batches, _field(section, "pending", int, None))
    schedules = _schedules(options.schedule, pipeline, costs) if options.schedule else []
    simulated = [View(simulate(schedule, costs), costs, in_seconds=True) for schedule in schedules]
    return pipeline, [View(line, costs, in_seconds=True, recorded=True), *simulated]


def _figures(view: View) -> dict[str, Any]:
    """Seconds are null where costs were relative; bytes where they were not measured."""
    line = view.timeline
    return {
        "schedule": line.schedule,
        "recorded": view.recorded,
        "step": line.step,
        "seconds": line.seconds if view.in_seconds else None,
        "units": None if view.in_seconds else line.seconds,
        "bubble": line.bubble,
        "peak_micro_batches": view.peaks,
        "peak_bytes": list(line.peak_bytes) if view.recorded else [None] * len(line.ranks),
    }


def _write(path: Path, pipeline: _Pipeline, views: list[View]) -> None:
    title = f"Pipeline of {pipeline.ranks} ranks, {pipeline.micro_batches} micro-batches"
    try:
        match path.suffix:
            case ".svg":
                write_text(path, svg(title, views))
            case ".png":
                path.write_bytes(png(views))
            case _:
                write_text(path, json.dumps(trace(views)) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from None


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['ranks']} ranks, {result['micro_batches']} micro-batches"]
    lines.append(f"{'schedule':16} {'':10} {'step':>10} {'idle':>9} {'peak of a rank':>20}")
    for row in result["schedules"]:
        step = figure(row["units"]) if row["seconds"] is None else si(row["seconds"], "s")
        known = [peak for peak in row["peak_bytes"] if peak is not None]
        peak = byte_count(max(known)) if known else micro_batches(max(row["peak_micro_batches"]))
        source = "recorded" if row["recorded"] else "simulated"
        lines.append(f"{row['schedule']:16} {source:10} {step:>10} {percent(row['bubble']):>9} {peak:>20}")
    if result["written"]:
        lines.append(f"written: {result['written']}")
    return "\n".join(lines)
