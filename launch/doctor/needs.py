"""What strategies, engines and meters miss here: asked of the checks that a run makes itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from distrib.errors import UserError
from distrib.redaction import one_line

if TYPE_CHECKING:
    from distrib.topology import Topology
    from launch.recipe import Recipe
    from strategies import Strategy

Facts = dict[str, Any]


def look(topology: Topology) -> Facts:
    """For every strategy and engine. `topology`: this rank's, of one rank where none were started."""
    import strategies
    from distrib import engines

    return {
        "strategies": [_strategy(name, topology) for name in strategies.names()],
        "engines": [_engine(name, topology) for name in engines.NAMES],
        "compile": _compile(topology),
        "offload": _offload(topology),
        "energy": _energy(topology),
    }


def of_recipe(recipe: Recipe, topology: Topology) -> Facts:
    """What this recipe needs, and whether it can start here. Its data are not looked at."""
    from launch.assemble import checked

    if topology.world == 1:
        topology = replace(topology, world=recipe.nproc, local_world=recipe.nproc)
    missing = [_missing(lambda: checked(recipe, topology)), _missing(lambda: _refuse_ranks(topology))]
    if recipe.report_to == "tensorboard" and not find_spec("tensorboard"):
        missing.append("report_to='tensorboard' needs the tensorboard package: pip install tensorboard")
    names = [section.name for section in recipe.strategy]
    rows = [
        _strategy(name, topology, section.model_dump()) for name, section in zip(names, recipe.strategy, strict=True)
    ]
    engine = _engine(recipe.engine.name, topology)
    missing += [row["missing"] for row in (*rows, engine)]
    said = list(dict.fromkeys(one for one in missing if one))
    return {
        "strategies": rows,
        "engines": [engine],
        "compile": _compile(topology) if recipe.compile else None,
        "offload": _offload(topology) if any(getattr(one, "offload", False) for one in _built(recipe)) else None,
        "energy": _energy(topology),
        "recipe": {"starts": not said, "missing": said, "ranks": topology.world},
    }


def _built(recipe: Recipe) -> list[Strategy]:
    import strategies

    try:
        return strategies.build([section.model_dump() for section in recipe.strategy])
    except UserError:
        return []


def _missing(check: Callable[[], object]) -> str | None:
    """What stands in the way, as the check says it."""
    try:
        check()
    except UserError as error:
        return one_line(error)
    except Exception as error:
        return f"{type(error).__name__}: {one_line(error, 300)}"
    return None


def _refuse_ranks(topology: Topology) -> None:
    import torch

    if topology.device_type == "cuda" and topology.local_world > (devices := torch.cuda.device_count()):
        raise UserError(f"{topology.local_world} ranks on a machine with {devices} CUDA devices: start {devices}")


def _strategy(name: str, topology: Topology, section: dict[str, Any] | None = None) -> Facts:
    """Of a model that is built in, with the fields that it has of itself; or of a recipe's section, which is checked
    with the recipe's model."""
    import strategies
    from launch.models import load_config
    from launch.recipe import Recipe
    from strategies.lowbit.strategy import LowBit

    notes: list[str] = []

    def check() -> None:
        (made,) = strategies.build([section or {"name": name}])
        if section is None:
            strategies.check([made], load_config(Recipe()), topology)
        if isinstance(made, LowBit):
            how = made.products(topology.device)
            notes.append(", ".join(f"{kind}: {count} of {how.total()} products" for kind, count in how.items()))
        if type(made).pipeline is not strategies.Strategy.pipeline and topology.world == 1:
            notes.append("a stage a rank: start several (nproc, torchrun)")

    missing = _missing(check)
    return {"name": name, "missing": missing, "note": "; ".join(notes) or None}


def _engine(name: str, topology: Topology) -> Facts:
    from distrib import engines

    def check() -> None:
        engines.check(name, engines.Settings(), topology)
        if name == "zero":
            import deepspeed  # noqa: F401

    return {"name": name, "missing": _missing(check)}


def _compile(topology: Topology) -> Facts:
    from distrib import engines

    settings = engines.Settings(compile=True)
    return {"missing": _missing(lambda: engines.check("ddp", settings, topology))}


def _offload(topology: Topology) -> Facts:
    """Where what is put outside the device goes: by putting something there."""
    import torch

    from strategies.streaming.offload import PinnedMemory, outside

    where: list[str] = []

    def check() -> None:
        memory = outside(torch.Size([1024]), torch.float32, topology.device)
        memory.tensor().fill_(1)
        where.append(
            "pinned host memory" if isinstance(memory, PinnedMemory) else "a file in the folder for temporary ones"
        )

    missing = _missing(check)
    return {"to": where[0] if where else None, "missing": missing}


def _energy(topology: Topology) -> Facts:
    """Which meter each device has, and what is said of those that have none."""
    from distrib.energy import rapl
    from distrib.energy.clock import Clock

    sources, notes = rapl.open_domains(rapl.POWERCAP, Clock())
    for gpus, said in _gpu_meters(topology):
        sources, notes = [*gpus, *sources], [*said, *notes]
    return {"sources": [{"device": source.name, "how": source.how} for source in sources], "notes": notes}


def _gpu_meters(topology: Topology) -> Iterator[tuple[list[Any], list[str]]]:
    import torch

    from distrib.energy import nvml
    from distrib.energy.clock import Clock

    if topology.device_type == "cuda":
        for index in range(torch.cuda.device_count()):
            yield nvml.open_device(replace(topology, local_rank=index), Clock(), os.environ)
