"""What fits, before anything is bought or started: memory by class for every strategy, the longest sequence, the speed,
and which one to take.

Nothing is read but the model's configuration. Memory is counted by running the training code without data
(`launch/forecast.py`), what engines shard is predicted (`launch/shares.py`), and speed is the count of FLOPs over the
rate that one layer reaches here.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

import strategies
from distrib.engines import NAMES as ENGINES
from distrib.engines import check as check_engine
from distrib.errors import Refused, UserError, choose
from distrib.redaction import one_line
from distrib.topology import Topology
from distrib.trace import CLASSES
from launch import sides
from launch.device import Device
from launch.forecast import Forecast, Regime, depths_of
from launch.models import build, load_config, refuse_packing
from launch.plan_pipeline import pipelined, plan_pipeline
from launch.recipe import Engine, Recipe
from launch.settings import settings_of
from launch.shares import regime_of, share_of, sizes_of

if TYPE_CHECKING:
    from launch.shares import Share

GRID = 256
"""Lengths are rounded down to chunks, or to this."""
MOST_LENGTH = 2**22
CALIBRATION_LENGTH = 256
CALIBRATION_VOCABULARY = 4096

Row = dict[str, Any]


@dataclass
class Planner:
    """One recipe on one device. Sides that compute alike are traced once, whatever the engine."""

    recipe: Recipe
    device: Device

    def __post_init__(self) -> None:
        self.config = load_config(self.recipe)
        if self.recipe.packing:
            refuse_packing(self.config)
        if self.recipe.objective.name != "sft":
            raise Refused(f"objective={self.recipe.objective.name}: a plan counts sft only; set objective=sft")
        model = build(self.recipe, self.config)
        self.sizes = sizes_of(model)
        self.depths = depths_of(model, self.config)
        spec = settings_of(self.recipe).optimizer
        assert spec is not None
        self.spec = spec
        self.topology = Topology(world=self.device.count, device_type=self.device.type)
        self._forecasts: dict[tuple[str, Regime], Forecast] = {}

    def on(self, device: Device) -> Planner:
        """The same for another number of the same devices, with what was traced so far."""
        other = copy(self)
        other.device = device
        other.topology = Topology(world=device.count, device_type=device.type)
        return other

    def row(self, side: str, engine: Engine) -> Row:
        row: Row = {"strategy": side, "engine": label_of(engine), "world": self.device.count}
        row |= {"length": self.recipe.max_length, "fidelity": _fidelity(side)}
        try:
            self._check(side, engine)
        except Refused as refusal:
            return row | {"status": "refused", "why": str(refusal)}
        if pipelined(sides.strategies_of(side), self.device.count):
            return row | {"status": "unknown", "why": f"a pipeline is planned by itself: --strategies {side}"}
        if any(strategy.sized for strategy in sides.strategies_of(side)):
            return row | {
                "status": "unknown",
                "why": "it is another strategy at every length; train says what it holds",
            }
        regime = regime_of(engine, self.recipe, self.device.count)
        try:
            forecast = self.forecast(side, regime)
        except Exception as error:
            return row | _failure(error)
        share = share_of(engine, self.recipe, self.sizes, self.spec, self.device.count, self.device.type)
        row |= self._figures(forecast, share)
        if any(strategy.own_forward for strategy in sides.strategies_of(side)):
            # Its products are not those whose rate was taken.
            row |= {"flops": None, "tokens_per_s": None}
        return row

    def _check(self, side: str, engine: Engine) -> None:
        settings = settings_of(self.recipe.model_copy(update={"engine": engine}))
        check_engine(engine.name, settings, self.topology)
        chosen = sides.strategies_of(side)
        if chosen:
            strategies.check(chosen, self.config, self.topology, self.recipe.compile)
        if any(strategy.sized for strategy in chosen):
            from launch.dry import refuse_size

            recipe = self.recipe.model_copy(update={"engine": engine})
            topology = strategies.staged(chosen, self.topology)
            refuse_size(recipe, self.config, chosen, recipe.per_device_train_batch_size, recipe.max_length, topology)

    def forecast(self, side: str, regime: Regime) -> Forecast:
        key = (side, regime)
        if key not in self._forecasts:
            made = Forecast(self.recipe, self.config, side, regime, self.depths, self.device.type)
            made.look_at(self.recipe.max_length)
            self._forecasts[key] = made
        return self._forecasts[key]

    def _figures(self, forecast: Forecast, share: Share) -> Row:
        """Of a row that is not refused."""
        length, peaks, update = self.recipe.max_length, forecast.under(share.of), share.update()

        def classes(length: int) -> dict[str, int]:
            peak = max(peaks.at(length), update, key=lambda row: row.sum())
            return {name: round(value) for name, value in zip(CLASSES, peak, strict=True)}

        held = classes(length)
        total = sum(held.values())
        longest, limit = self._longest(lambda at: sum(classes(at).values()), forecast.chunk)
        flops = forecast.flops(length)
        tokens = self.recipe.per_device_train_batch_size * length * self.device.count
        return {
            "status": "fits" if total <= self.device.usable_bytes else "too large",
            "bytes": held,
            "total_bytes": total,
            "max_length": longest,
            "limit": limit,
            "flops": flops,
            "tokens_per_s": tokens * self.flops_per_s / flops if self.flops_per_s else None,
        }

    def _longest(self, total_bytes: Callable[[int], int], chunk: int | None) -> tuple[int, str]:
        """The longest length that fits, and what ends it: memory, or what the model takes."""
        most = getattr(self.config, "max_position_embeddings", None) or MOST_LENGTH
        if total_bytes(most) <= self.device.usable_bytes:
            return most, "model"
        step = chunk or GRID
        if total_bytes(step) > self.device.usable_bytes:
            step = GRID
        low, high = 0, -(-most // step)
        while high - low > 1:
            middle = (low + high) // 2
            inside = total_bytes(middle * step) <= self.device.usable_bytes
            low, high = (middle, high) if inside else (low, middle)
        return low * step, "memory"

    @cached_property
    def flops_per_s(self) -> float | None:
        """Given, or reached by one layer here; not known of a device that is elsewhere."""
        if self.device.flops or not self.device.here:
            return self.device.flops
        return calibrate(self.recipe, self.config, self.depths.full, self.device.type)


def _failure(error: Exception) -> Row:
    """Refused by us, or a model that asks its tensors for values in a way that cannot be answered for it; what a
    strategy's trial stumbles over is wrapped in a refusal."""
    cause = error.__cause__ or error
    if isinstance(cause, UserError):
        return {"status": "refused", "why": str(error)}
    why = one_line(cause, 200)
    return {"status": "unknown", "why": f"it does not run without data ({type(cause).__name__}: {why})"}


def calibrate(recipe: Recipe, config: Any, layers: int, device_type: str) -> float:
    """FLOP/s of one layer, forwards and backwards under `plain`, with a head and embeddings made small."""
    import torch

    from distrib.contracts import Context
    from launch.forecast import Whole, shallow

    one = shallow(config, layers, 1)
    one.vocab_size, one.pad_token_id = min(config.vocab_size, CALIBRATION_VOCABULARY), None
    length = min(recipe.max_length, CALIBRATION_LENGTH if device_type == "cpu" else 4096)
    counted = Forecast(recipe, one, "plain", Regime(), depths_of(build(recipe, one), one), device_type)
    counted.look_at(length)
    model = build(recipe, one).train()
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                # The bytes of a 4-bit base become zeros.
                values = (torch.randn(old.shape, device=device_type) * 0.02).to(old.dtype)
                module._parameters[name] = torch.nn.Parameter(values, old.requires_grad)
    model.to(device_type)
    settings = settings_of(recipe.model_copy(update={"engine": Engine()}))
    sides.edit("plain", model)
    engine = Whole(model, lambda *_: None, Topology(device_type=device_type), settings)
    step = sides.prepare("plain", model, engine=engine)
    ids = torch.zeros(recipe.per_device_train_batch_size, length, dtype=torch.int64, device=device_type)
    times = []
    for _ in range(3):
        start = perf_counter()
        step([{"input_ids": ids, "labels": ids}], Context(0, 0, 1.0))
        if device_type == "cuda":
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return counted.flops(length) / min(times)


@contextmanager
def unheard(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


# A model that does not run without data is a row that says so.
@unheard("torch._subclasses.fake_tensor")
def plan(recipe: Recipe, device: Device, wanted: str | None = None, engines: str | None = None) -> dict[str, Any]:
    """Rows for every side and engine, and the recommendation."""
    from tqdm import tqdm

    # The libraries' objects are there to stay: without them, collecting between runs costs nothing.
    gc.collect()
    gc.freeze()
    chosen = sides.sides_of(wanted) if wanted else default_sides(recipe)
    for side in chosen:
        sides.strategies_of(side)
    kinds = engines_of(recipe, engines)
    if (alone := _pipeline(recipe, device, chosen, wanted)) is not None:
        if len(kinds) > 1:
            raise UserError(f"--engines {engines}: a pipeline is planned under one engine; give one")
        # What strategies say of every stage is too much.
        with unheard("ebbtide"):
            return plan_pipeline(recipe.model_copy(update={"engine": kinds[0]}), device, alone)
    planner = Planner(recipe, device)
    refuse_split(kinds)
    cases = [(side, engine) for side in chosen for engine in kinds]
    rows = [planner.row(*case) for case in tqdm(cases, desc="plan", unit="row", leave=False, file=sys.stderr)]
    best = recommend(rows, recipe)
    if best["strategy"] is not None:
        engine = next(kind for kind in kinds if label_of(kind) == best["engine"])
        best["recipe"] = {
            "strategy": sides.sections(best["strategy"]),
            "engine": engine.model_dump(exclude_unset=True) | {"name": engine.name},
            "max_length": best["max_length"],
        }
    return {
        "model": recipe.model_name_or_path,
        "max_length": recipe.max_length,
        "device": device.as_dict(),
        "flops_per_s": planner.flops_per_s,
        "flops_source": "given" if device.flops else "one layer, timed here" if device.here else None,
        "rows": rows,
        "recommendation": best,
    }


def _pipeline(recipe: Recipe, device: Device, chosen: Sequence[str], wanted: str | None) -> list[dict[str, Any]] | None:
    """The sections of a pipeline, where it is what is asked for alone, or the recipe's own."""
    if wanted and len(chosen) > 1:
        return None
    found = sides.sections(chosen[0], recipe)
    if pipelined(strategies.build(found), device.count):
        return found
    if wanted and any(section["name"] == "twobp" for section in found):
        raise Refused(f"{chosen[0]} on {device.count} device is no pipeline: give device.count=4, or nproc")
    return None


def default_sides(recipe: Recipe) -> list[str]:
    """The recipe's own, every strategy as it is, the exact ones also with `offload`, and checkpointing beside them."""
    own = sides.side_of([section.model_dump() for section in recipe.strategy])
    found = []
    for name in strategies.names():
        kind = strategies.get(name)
        found.append(name)
        if kind.fidelity is strategies.Fidelity.EXACT and "offload" in kind.__dataclass_fields__:
            found.append(f"{name}:offload=true")
    return list(dict.fromkeys([own, *found, "gc", "gc+ce"]))


def refuse_split(kinds: Sequence[Engine]) -> None:
    for key in ("tensor_parallel", "context_parallel"):
        if split := [ranks for kind in kinds if (ranks := getattr(kind, key)) > 1]:
            raise Refused(
                f"engine.{key}={split[0]}: a plan does not count what is split over ranks; set engine.{key}=1"
            )


def label_of(engine: Engine) -> str:
    return f"zero{engine.stage}" if engine.name == "zero" else engine.name


def engines_of(recipe: Recipe, text: str | None) -> list[Engine]:
    """By name: `zero` in the recipe's stage, or `zero1`, `zero2`, `zero3`."""
    if text is None:
        return [recipe.engine]
    found = []
    for name in text.split(","):
        stage = name.removeprefix("zero")
        if name == recipe.engine.name:
            found.append(recipe.engine)
        elif name in ENGINES:
            found.append(Engine.model_validate({"name": name}))
        elif name != stage and stage in ("1", "2", "3"):
            found.append(Engine.model_validate({"name": "zero", "stage": int(stage)}))
        else:
            raise choose("--engines", name, [*ENGINES, "zero1", "zero2", "zero3"])
    return found


def _fidelity(side: str) -> str:
    kinds = [strategy.fidelity for strategy in sides.strategies_of(side)]
    order = list(strategies.Fidelity)
    return max(kinds, key=order.index).name.lower() if kinds else "exact"


def recommend(rows: Sequence[Row], recipe: Recipe) -> dict[str, Any]:
    """The exact strategy that fits and computes least; else the exact one that reaches furthest."""
    able = [row for row in rows if row["status"] in ("fits", "too large") and row["strategy"] not in sides.BASELINES]
    exact = [row for row in able if row["fidelity"] == "exact"]
    fitting = [row for row in exact if row["status"] == "fits"]
    if fitting:
        best = min(fitting, key=lambda row: row["flops"])
        slower = f"the exact one of {len(fitting)} that fit with the least to compute"
        return _advice(best, recipe.max_length, slower if len(fitting) > 1 else "the only exact one that fits")
    others = [row["strategy"] for row in able if row["status"] == "fits"]
    aside = f"; {', '.join(others)} would fit, and is not exact" if others else ""
    furthest = max(exact, key=lambda row: row["max_length"], default=None)
    if furthest is None or furthest["max_length"] == 0:
        why = "no exact strategy fits at any length: more or larger devices, bf16, lora_r or a sharding engine are left"
        return {"strategy": None, "engine": None, "max_length": None, "reason": why + aside, "recipe": None}
    reason = f"nothing exact fits at {recipe.max_length} tokens; this one reaches furthest{aside}"
    return _advice(furthest, furthest["max_length"], reason)


def _advice(row: Row, length: int, reason: str) -> dict[str, Any]:
    return {"strategy": row["strategy"], "engine": row["engine"], "max_length": length, "reason": reason}
