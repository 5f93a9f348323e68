"""Going on from a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

from distrib import checkpoint
from distrib.checkpoint import Manifest, Progress
from distrib.contracts import Engine, Remembers, Step
from distrib.errors import UserError
from distrib.guard import Guard
from distrib.numbers import Plan
from distrib.saving import from_main

log = logging.getLogger("ebbtide")


def resume(plan: Plan, engine: Engine, step: Step, guard: Guard, chosen: Path | None) -> Progress:
    """Load `chosen`, or the newest checkpoint of the run that is whole; a fresh start where nothing was saved."""

    def find() -> tuple[Path | None, list[str]]:
        return (chosen, checkpoint.require(chosen)) if chosen else checkpoint.newest(plan.run)

    source, notes = from_main(engine.topology, find)
    for note in notes if engine.topology.main else ():
        log.warning("%s", note)
    if source is None:
        return Progress()
    manifest = checkpoint.read_manifest(source)
    _check_fit(plan, engine, source, manifest)
    engine.load(source / "engine")
    if isinstance(step, Remembers):
        step.restore(manifest.step)
    guard.restore(manifest.guard)
    return manifest.progress


def _check_fit(plan: Plan, engine: Engine, source: Path, manifest: Manifest) -> None:
    done = manifest.progress
    if manifest.engine != engine.name:
        raise UserError(
            f"engine.name={engine.name!r}: {source} was written by {manifest.engine!r}; use that engine, "
            "or start from its export"
        )
    if manifest.global_batch != plan.global_batch:
        raise UserError(
            f"the global batch is {plan.global_batch} rows, {source} was trained with "
            f"{manifest.global_batch}: the same rows would come again or never; set global_batch_size"
        )
    if done.rows < done.step * plan.global_batch and done.step < plan.steps:
        raise UserError(
            f"step {done.step} of {source} ended with the data, after {done.rows} rows: the next step would "
            "leave out the rows up to a whole batch; set resume_from_checkpoint to an earlier one, or another "
            "output_dir"
        )
