"""Starting the ranks again after a failure: how often, how many of them, and what they know of it."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.errors import UserError

if TYPE_CHECKING:
    from launch.recipe import Recipe

FAILURE = "EBBTIDE_FAILURE"
"""In the environment of ranks that were started again: why, and when the ranks before them failed."""


class Restarts:
    """As many as `max_restarts` without a newer checkpoint between; those with fewer sequences at once come on top."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.allowed = recipe.max_restarts
        self.count = 0
        self.reached = newest_step(Path(recipe.output_dir))

    def another(self) -> bool:
        if (now := newest_step(Path(self.recipe.output_dir))) > self.reached:
            self.count, self.reached = 0, now
        self.count += 1
        return self.count <= self.allowed

    def smaller(self) -> list[str] | None:
        """What `on_oom: halve` changes: fewer sequences at once, as many a step. None where there are none fewer."""
        recipe = self.recipe
        rows, steps = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
        together = rows * steps if recipe.global_batch_size is None else recipe.global_batch_size // recipe.nproc
        fewer = next((count for count in range(rows // 2, 0, -1) if together % count == 0), None)
        if recipe.on_oom != "halve" or fewer is None:
            return None
        keys = {"per_device_train_batch_size": fewer}
        if recipe.global_batch_size is None or steps > 1:
            keys["gradient_accumulation_steps"] = together // fewer
        self.recipe = recipe.model_copy(update=keys)
        return [f"{key}={value}" for key, value in keys.items()]

    def left(self, slots: Sequence[int], culprits: Collection[int]) -> list[int]:
        """Without the ranks that failed, where `min_nproc` allows it and the global batch can be shared."""
        well = [slot for rank, slot in enumerate(slots) if rank not in culprits]
        least = self.recipe.min_nproc or self.recipe.nproc
        for count in range(len(well), least - 1, -1):
            if _fits(self.recipe, count):
                return well[:count]
        return list(slots)

    def environment(self, why: str, failed_at: float | None, nproc: int, slots: Sequence[int]) -> dict[str, str]:
        found = {FAILURE: json.dumps([why, failed_at or time.time()])}
        devices = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(nproc)))).split(",")
        if nproc > len(slots) and len(devices) >= nproc:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(devices[slot] for slot in slots)
        return found


def newest_step(run: Path) -> int:
    steps = [re.fullmatch(r"step-(\d+)", path.name) for path in run.glob("checkpoints/step-*")]
    return max((int(step[1]) for step in steps if step), default=0)


def _fits(recipe: Recipe, nproc: int) -> bool:
    from launch.recipe_file import global_batch

    copies = recipe.engine.copies
    try:
        global_batch(recipe, nproc // copies)
    except UserError:
        return False
    return nproc % copies == 0


def failure(environment: Mapping[str, str]) -> tuple[str, float] | None:
    """Why these ranks were started again, and when the ones before failed."""
    if FAILURE not in environment:
        return None
    why, when = json.loads(environment[FAILURE])
    return str(why), float(when)
