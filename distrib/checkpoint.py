"""Checkpoints of a run: `checkpoints/step-N/`, complete once `manifest.json` is in it.

A checkpoint is written under a temporary name and renamed, so a kill at any moment leaves the one before intact. The
position in the data and all randomness follow from the step, so beside the engine's state there is little to keep.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from distrib.contracts import Engine
from distrib.errors import UserError
from distrib.files import sync, write_text

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """What is known of a run after `step` optimizer steps, over all ranks."""

    step: int = 0
    tokens: int = 0
    nonpad_tokens: int = 0
    loss_tokens: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Manifest:
    progress: Progress
    world: int
    engine: str
    global_batch: int
    step: dict[str, Any] = field(default_factory=dict)
    """What the step must know to go on as it would have."""


def checkpoints(run: Path) -> list[Path]:
    """Complete ones, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if (path / MANIFEST).exists()]
    named = [path for path in found if re.fullmatch(r"step-\d+", path.name)]
    return sorted(named, key=step_of)


def exists(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step-{step}" / MANIFEST).exists()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_manifest(checkpoint: Path) -> Manifest:
    try:
        fields = json.loads((checkpoint / MANIFEST).read_text())
        return Manifest(**fields | {"progress": Progress(**fields["progress"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint that can be read: {error}") from None


def save(run: Path, engine: Engine, manifest: Manifest, keep: int | None) -> Path:
    """Every rank calls it; returns when all have written."""
    final = run / "checkpoints" / f"step-{manifest.progress.step}"
    draft = final.with_name(f".{final.name}.draft")
    if engine.topology.main:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    wait(engine)
    engine.save(draft / "engine")
    wait(engine)
    if engine.topology.main:
        write_text(draft / MANIFEST, json.dumps(asdict(manifest), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        sync(final.parent)
        for old in checkpoints(run)[: -keep if keep else 0]:
            shutil.rmtree(old)
    wait(engine)
    return final


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints of steps that are about to be trained again, and what kills left half written.

    They belong to a course that the run has left; kept, the next start would go on from them.
    """
    for left in (run / "checkpoints").glob(".step-*.draft"):
        shutil.rmtree(left)
    for later in checkpoints(run):
        if step_of(later) > step:
            shutil.rmtree(later)


def wait(engine: Engine) -> None:
    if engine.topology.world > 1:
        dist.barrier()
