"""From a recipe to a finished run, top to bottom."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import strategies
from distrib import checkpoint
from distrib.checkpoint import Progress
from distrib.contracts import Engine
from distrib.energy import Meter, summed
from distrib.errors import Refused, UserError
from distrib.files import write_text, writing
from distrib.guard import Guard
from distrib.heartbeat import HERE
from distrib.journal import read
from distrib.loop import Loop
from distrib.numbers import Plan
from distrib.optim import Schedule
from distrib.pipeline import record
from distrib.redaction import clean, clean_texts, same
from distrib.resume import resume
from distrib.saving import wait
from distrib.topology import Topology
from launch.assemble import Parts
from launch.console import Console
from launch.data import Data, open_data
from launch.evaluate import evaluator
from launch.export import LOCK, write_folder
from launch.network import say_once
from launch.pages.run import summary, write_pages
from launch.recipe_file import dump_recipe, load_recipe
from launch.reference import annotator
from launch.restarts import failure
from launch.run_folder import refuse_links, refuse_unusable
from launch.verify import check_gradients, check_pipeline
from launch.would_fit import saying_what_would_fit
from strategies import Prepared, Strategy

if TYPE_CHECKING:
    from launch.recipe import Recipe

JOULES_PER_KWH = 3.6e6
# What may differ between the two halves of one run: the rest decides what a step computes.
MAY_CHANGE = {
    "max_steps", "num_train_epochs", "nproc", "save_steps", "save_total_limit", "save_best", "save_async",
    "on_save_error", "logging_steps", "eval_steps",
    "profile", "eval_rows", "eval_samples", "eval_dataset", "report_to", "resume_from_checkpoint", "output_dir",
    "per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "verify", "energy",
    "on_nonfinite", "loss_spike", "on_oom", "max_restarts", "min_nproc", "hang_timeout_s",
}  # fmt: skip


def train(recipe: Recipe, topology: Topology) -> dict[str, Any]:
    """Train, or go on where the run in `output_dir` stopped; returns what `report.json` holds."""
    say_once(topology)
    with closing(Meter(topology)) as meter:
        return _train(recipe, topology, meter)


def _train(recipe: Recipe, topology: Topology, meter: Meter) -> dict[str, Any]:
    run = Path(recipe.output_dir)
    _check_folder(run, recipe)
    if recipe.report_to == "tensorboard" and not find_spec("tensorboard"):
        raise UserError("report_to='tensorboard' needs the tensorboard package: pip install tensorboard")
    chosen_checkpoint = _chosen_checkpoint(recipe)
    parts = Parts.of(recipe, topology)
    if recipe.min_nproc and parts.topology.stages > 1:
        raise Refused(f"min_nproc={recipe.min_nproc}: a pipeline needs all of its stages; leave it out")
    held_out = open_data(recipe, parts.tokenizer, topology, evaluation=True) if recipe.eval_steps else None
    plan = _plan(recipe, run, parts.data, parts.global_batch)

    meter.measure_idle(recipe.energy.idle_s)
    HERE.at("loading the model", prompt=False)
    step = parts.model()
    engine = step.engine
    if recipe.verify and parts.topology.stages > 1:
        check_pipeline(parts, step)
    guard = Guard(recipe.on_nonfinite, recipe.loss_spike)
    progress = resume(plan, engine, step, guard, chosen_checkpoint)

    console = Console(plan.steps, progress.step) if topology.main else None
    annotate = annotator(recipe, parts.config, engine, step)
    loop = Loop(
        plan,
        engine,
        step,
        window=parts.window,
        weight=parts.objective.weight,
        annotate=annotate,
        evaluate=evaluator(recipe, parts.tokenizer, held_out, engine, step, parts.objective, annotate),
        report=_reporters(recipe, run, console),
        meter=meter,
        guard=guard,
    )
    if progress.step < plan.steps:
        HERE.at("the first forward and backward", prompt=False)
        with saying_what_would_fit(recipe, topology.world):
            loop.preflight(parts.data.longest(recipe.per_device_train_batch_size))
            if recipe.verify and parts.topology.stages == 1:
                check_gradients(parts, step, annotate)
            _claim(run, recipe, engine)
            progress = loop.run(progress)
    if console:
        console.close()
    return _finish(recipe, parts.config, run, step, progress)


def _check_folder(run: Path, recipe: Recipe) -> None:
    """A folder belongs to one run: nothing in it is overwritten by another."""
    refuse_unusable(run)
    if not run.exists() or not any(run.iterdir()):
        return
    if not (run / LOCK).exists():
        raise UserError(f"output_dir={str(run)!r} is in use, and not by a run (it has no {LOCK}): name another")
    refuse_links(run)
    if recipe.resume_from_checkpoint is False:
        raise UserError(
            f"output_dir={str(run)!r} holds a run and resume_from_checkpoint=false: name another folder, or go on "
            "with resume_from_checkpoint=true"
        )
    before, now = (_lasting(one) for one in (load_recipe(str(run / LOCK)), recipe))
    for key in now:
        if key not in MAY_CHANGE and not same(before[key], now[key]):
            raise UserError(
                f"output_dir={str(run)!r} holds the run of another recipe: {key} was {before[key]!r}, is "
                f"{clean(now[key])!r}; name another output_dir"
            )


def _lasting(recipe: Recipe) -> dict[str, Any]:
    """Without the pipeline: its stages hold the same model however many they are."""
    kept = [section for section in recipe.strategy if strategies.get(section.name).pipeline is Strategy.pipeline]
    return recipe.model_dump() | {"strategy": [section.model_dump() for section in kept] or [{"name": "plain"}]}


def _claim(run: Path, recipe: Recipe, engine: Engine) -> None:
    wait(engine)
    if engine.topology.main:
        with writing(run):
            run.mkdir(parents=True, exist_ok=True)
            write_text(run / LOCK, dump_recipe(recipe))
    wait(engine)


def _plan(recipe: Recipe, run: Path, data: Data, size: int) -> Plan:
    rows = None
    if recipe.max_steps is None:
        assert data.rows is not None
        rows = math.ceil(data.rows * recipe.num_train_epochs)
    steps = recipe.max_steps or math.ceil((rows or 0) / size)
    warmup = recipe.warmup_steps or round(recipe.warmup_ratio * steps)
    return Plan(
        run=run,
        steps=steps,
        global_batch=size,
        rows=rows,
        schedule=Schedule(recipe.learning_rate, steps, warmup, recipe.lr_scheduler_type),
        seed=recipe.seed,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=recipe.logging_steps,
        save_steps=recipe.save_steps,
        save_total_limit=recipe.save_total_limit,
        eval_steps=recipe.eval_steps,
        profile_steps=recipe.profile.steps if recipe.profile else None,
        save_best=recipe.save_best,
        save_async=recipe.save_async,
        on_save_error=recipe.on_save_error,
        strategy=[strategy.name for strategy in recipe.strategy],
        versions=_versions(),
        failure=failure(os.environ),
    )


def _versions() -> dict[str, str | None]:
    """Of what writes a checkpoint; `code` is a hash of our own, which a checkout may have changed."""
    home = Path(__file__).resolve().parent.parent
    ours = sorted(path for package in ("distrib", "strategies", "launch") for path in (home / package).rglob("*.py"))
    found: dict[str, str | None] = {"code": checkpoint.digest(b"".join(path.read_bytes() for path in ours))}
    for name in ("ebbtide", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _chosen_checkpoint(recipe: Recipe) -> Path | None:
    if isinstance(recipe.resume_from_checkpoint, bool):
        return None
    chosen = Path(recipe.resume_from_checkpoint)
    if not (chosen / checkpoint.MANIFEST).exists():
        raise UserError(f"resume_from_checkpoint={str(chosen)!r} is not a checkpoint: name a folder checkpoints/step-N")
    return chosen


def _reporters(recipe: Recipe, run: Path, console: Console | None) -> Callable[[dict[str, Any]], None]:
    if console is None:
        return lambda line: None
    if recipe.report_to == "none":
        return console.log
    from torch.utils.tensorboard import SummaryWriter

    # The folder is the run's only from its first line on: a run that fails before leaves none behind.
    open_writer = cache(lambda: SummaryWriter(run / "tensorboard"))

    def both(line: dict[str, Any]) -> None:
        console.log(line)
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                open_writer().add_scalar(name, value, line["step"])
        open_writer().flush()

    return both


def _finish(recipe: Recipe, config: Any, run: Path, step: Prepared, progress: Progress) -> dict[str, Any]:
    """Write `final/`, `report.json` and its pages, unless an earlier call has."""
    engine = step.engine
    report = run / "report.json"
    known = json.loads(report.read_text()) if report.exists() and (run / "final").exists() else {}
    # A rank that reads late would otherwise see what rank 0 is about to write.
    wait(engine)
    if known.get("step") == progress.step:
        if engine.topology.main:
            print(
                f"{run} is finished, with step {progress.step}: nothing to do; a larger max_steps goes on",
                file=sys.stderr,
            )
        return dict(known)
    state, accounts = engine.full_state(), step.accounts()
    recorded = step.timeline(progress.step)
    result: dict[str, Any] = {}
    if engine.topology.main:
        with writing(run):
            write_folder(recipe, config, state, run / "final")
            if recorded:
                record.write(run / record.FILE, recorded)
            result = _summary(recipe, run, engine, accounts, progress)
            result = clean_texts(result)
            write_text(report, json.dumps(result, indent=1))
            write_pages(run)
    wait(engine)
    return result


def _summary(recipe: Recipe, run: Path, engine: Engine, accounts: dict[str, Any], progress: Progress) -> dict[str, Any]:
    energy = _energy(recipe, run, progress)
    return {
        "final": str(run / "final"),
        **asdict(progress),
        **summary(read(run / "metrics.jsonl")),
        "joules": energy["joules"],
        "energy": energy,
        "strategy": [strategy.name for strategy in recipe.strategy],
        "accounts": accounts,
        "engine": engine.name,
        "world": engine.topology.world,
        "device": torch.cuda.get_device_name()
        if engine.topology.device_type == "cuda"
        else platform.processor() or "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "deepspeed")},
    }


def _energy(recipe: Recipe, run: Path, progress: Progress) -> dict[str, Any]:
    """The run's account, as far as its checkpoints have one, and what it emitted where the recipe says how clean
    its electricity is."""
    account = summed(read(run / "energy.jsonl"))
    energy = account.as_dict()
    if account.joules is not None and account.steps != progress.step:
        energy["notes"] += (f"of {progress.step} steps, {account.steps} were measured",)
    if (grams := recipe.energy.grams_co2_per_kwh) is not None:
        energy |= {
            "grams_co2": None if account.joules is None else account.joules / JOULES_PER_KWH * grams,
            "grams_co2_per_kwh": grams,
            "intensity_source": recipe.energy.intensity_source,
        }
    return energy
