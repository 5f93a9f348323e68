"""Are the gradients what the strategy promises? Each parameter's, against plain autograd, on the user's model and rows.

`ebbtide verify` builds the model in float64 where it can; a training run looks at its own model before its first step,
on a few tokens, and leaves nothing behind. The truth is the same model as it was before its edits
(`strategies/core/truth.py`), in the same engine, so that what differs is the strategy and the head alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.contracts import Batch, Context, evaluating
from distrib.engines.torch_engine import TorchEngine
from distrib.errors import UserError, WrongGradients
from distrib.meters import forget_peak, free_bytes, peak_bytes
from distrib.redaction import one_line
from distrib.topology import Topology
from launch.assemble import Parts
from launch.data.short import short_rows
from launch.models import Weights, build
from launch.reference import Annotate, annotator
from launch.whole import WholeModel, check_stages
from strategies import Fidelity, Prepared, Strategy, name_of
from strategies.core.compare import TOLERANCES, Differences, Promise, differences, kept_parts
from strategies.core.truth import rounded_otherwise, true_gradients, without_dropout

if TYPE_CHECKING:
    from launch.recipe import Recipe

LENGTH, DRAWS = 128, 32
TINY_LENGTH, FEW_DRAWS = 32, 16
MICRO_BATCHES, ROWS, CHUNKS, ROUNDED = 2, 2, 4, 4
SHOWN = 5
VERDICTS = {Fidelity.EXACT: "exact", Fidelity.UNBIASED: "unbiased", Fidelity.APPROXIMATE: "within bound"}

log = logging.getLogger("ebbtide")


def gradient_error(recipe: Recipe, topology: Topology, length: int = LENGTH) -> dict[str, Any]:
    """What `ebbtide verify --json` prints, of the recipe's strategies together; every rank calls it and gets it."""
    parts = Parts.of(recipe, topology)
    refused = _why_not_float64(parts)
    if refused is None:
        try:
            return _built(parts, torch.float64, length)
        except RuntimeError as error:
            refused = f"float64 failed ({one_line(error, 120)})"
    return {**_built(parts, None, length), "why_not_float64": refused}


def _built(parts: Parts, dtype: torch.dtype | None, length: int) -> dict[str, Any]:
    step = parts.model(dtype, TrainedAdapter)
    annotate = annotator(parts.recipe, parts.config, step.engine, step)
    whole = WholeModel(parts, dtype, TrainedAdapter, step.strategies) if parts.topology.stages > 1 else None
    found = compared(parts, step, annotate, length, DRAWS, whole)
    if found is None:
        raise UserError("the first rows have no loss tokens; look at them with `ebbtide data`")
    return found


class TrainedAdapter(Weights):
    """LoRA starts with B = 0, where A has no gradient: here with a small one."""

    def fill(self, model: nn.Module, unit_name: str) -> None:
        super().fill(model, unit_name)
        for name, parameter in model.get_submodule(unit_name).named_parameters(prefix=unit_name):
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))


def _why_not_float64(parts: Parts) -> str | None:
    if parts.recipe.engine.name == "zero":
        return "DeepSpeed computes gradients in float32"
    needed, free = _needed_bytes(parts), _free_bytes(parts.topology)
    # Ranks must agree, and each sees its own memory.
    if over_ranks(parts.topology, float(free is not None and needed > free)):
        return f"it needs about {needed / 2**30:.1f} GiB a rank"
    return None


def _needed_bytes(parts: Parts) -> int:
    """Weights and gradients in float64, and on a CPU the copy that they are compared with."""
    held = sum(
        parameter.numel() * (8 if parameter.is_floating_point() else 1)
        for parameter in build(parts.recipe, parts.config).parameters()
    )
    shards = parts.topology.world if parts.recipe.engine.name == "fsdp2" else 1
    return held * (3 if parts.topology.device_type == "cpu" else 2) // shards


def _free_bytes(topology: Topology) -> int | None:
    if topology.device_type == "cuda":
        return int(torch.cuda.mem_get_info(topology.device)[0])
    free = free_bytes()
    return None if free is None else free // topology.local_world


def check_pipeline(parts: Parts, step: Prepared) -> None:
    """On a few tokens, with the weights that a run begins with."""
    begin = time.perf_counter()
    batches, _ = _batches(parts, TINY_LENGTH)
    with _hushed():
        check_stages(parts, step, batches)
    if parts.topology.main:
        log.info("verify: the stages reproduce the whole model (%.1f s)", time.perf_counter() - begin)


def check_gradients(parts: Parts, step: Prepared, annotate: Annotate) -> None:
    """Before a run's first step, in its engine and precision; WrongGradients ends the run."""
    begin, peak = time.perf_counter(), peak_bytes(parts.topology)
    found = compared(parts, step, annotate, TINY_LENGTH, FEW_DRAWS)
    if (peak_bytes(parts.topology) or 0) > (peak or 0):
        forget_peak(parts.topology)
    if found is None:
        log.info("verify: the first rows have no loss tokens, so no gradient was checked")
    elif found["verdict"] == "wrong":
        raise WrongGradients(f"{wrong(found)}; choose another strategy, or train in spite of it with verify=false")
    elif parts.topology.main:
        log.info("verify: %s (%.1f s)", headline(found), time.perf_counter() - begin)


def compared(
    parts: Parts, step: Prepared, annotate: Annotate, length: int, draws: int, whole: WholeModel | None = None
) -> dict[str, Any] | None:
    """The verdict on `step`, with rows of at most `length` tokens; None when they have nothing to learn. The truth is
    its own model's, or `whole`'s."""
    batches, width = _batches(parts, length)
    weight = over_ranks(parts.topology, sum(parts.objective.weight(batch) for batch in batches))
    if weight == 0:
        return None
    context = Context(parts.recipe.seed, 0, weight)
    chosen = [_in_chunks(strategy, width) for strategy in step.strategies]
    model = step.engine.model
    with _hushed(), without_dropout(model), without_dropout(whole.engine.model) if whole else nullcontext():
        annotate(batches, context)
        check = Check(parts, step, batches, context, draws, whole)
        found = check.verdict(chosen)
        if found["verdict"] == "wrong" and check.is_random():
            # By something that is no dropout: there is one gradient to compare with in evaluation only.
            with evaluating(model), evaluating(check.reference):
                found = check.verdict(chosen)
    lines = over_ranks(parts.topology, sum(len(batch["input_ids"]) for batch in batches))
    return {**found, "length": width, "rows": int(lines)}


def _batches(parts: Parts, length: int) -> tuple[list[Batch], int]:
    """This rank's micro-batches, and the longest line over all ranks."""
    recipe, topology = parts.recipe, parts.topology
    size = min(recipe.per_device_train_batch_size, ROWS)
    share = MICRO_BATCHES * size
    rows = short_rows(parts.data, share * topology.data_world, length)
    own = rows[topology.data_rank * share :][:share]
    made = [parts.data.layout.batch(own[start : start + size]) for start in range(0, share, size)]
    lines = [sum(len(s.tokens) for s in row) if recipe.packing else max(len(s.tokens) for s in row) for row in rows]
    return [{name: tensor.to(topology.device) for name, tensor in batch.items()} for batch in made], max(lines)


def over_ranks(topology: Topology, value: float | Tensor) -> float:
    """The sum over the data-parallel ranks."""
    total = torch.tensor(float(value), dtype=torch.float64)
    if topology.world > 1:
        dist.all_reduce(total)
    return float(total) / topology.copies


def _in_chunks(strategy: Strategy, width: int) -> Strategy:
    """With chunks small enough that a row is several; its other fields as they are."""
    chunk = getattr(strategy, "chunk", None)
    if chunk is None or (isinstance(chunk, int) and 2 * chunk <= width):
        return strategy
    try:
        return replace(strategy, **{"chunk": max(1, -(-width // CHUNKS))})
    except (ValueError, UserError):
        return strategy


@contextmanager
def _hushed() -> Iterator[None]:
    """What strategies say of themselves they say at the run's own length."""
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


class Check:
    """A step on some micro-batches, held to the true gradients of its model."""

    def __init__(
        self, parts: Parts, step: Prepared, batches: list[Batch], context: Context, draws: int, whole: WholeModel | None
    ) -> None:
        self.parts = parts
        self.topology = parts.topology
        self.step = step
        self.engine = step.engine
        self.batches = batches
        self.context = context
        self.draws = draws
        trained = next(parameter for parameter in self.engine.model.parameters() if parameter.requires_grad)
        self.precision = torch.bfloat16 if self.engine.settings.bf16 else trained.dtype
        self.tolerance = TOLERANCES[self.precision]
        self.whole = whole

    def verdict(self, chosen: list[Strategy]) -> dict[str, Any]:
        """On the strategies as they are; before that, on those that estimate with the fields that make them exact."""
        self.engine.zero_grad()
        true_loss = self._over_ranks(self._true())
        true = kept_parts(self.engine)
        self.engine.zero_grad()
        exact = [s if s.own_forward else replace(s, **s.exact_with) for s in chosen]
        exact_error = None
        if exact != chosen:
            found = self._against(true, exact)
            if found["fidelity"] == "exact":
                if found["verdict"] == "wrong":
                    return {**found, "loss_reference": true_loss, "exact_error": found["grad_error"]}
                exact_error = found["grad_error"]
        return {**self._against(true, chosen), "loss_reference": true_loss, "exact_error": exact_error}

    def is_random(self) -> bool:
        """Whether the model itself gives another loss with other random numbers."""
        one, other = (self._over_ranks(self._true(number, backward=False)) for number in (0, 1))
        return abs(one - other) > 1e-6 * abs(one)

    def _true(self, number: int = 0, backward: bool = True) -> Tensor:
        context = replace(self.context, step=number)
        if self.whole:
            assert isinstance(self.engine, TorchEngine)
            return self.whole.true_gradients(self.engine, self.parts.objective, self.batches, context, backward)
        return true_gradients(self.engine, self.parts.objective, self.batches, context, backward)

    @property
    def reference(self) -> nn.Module:
        return self.whole.engine.model if self.whole else self.engine.model

    def _over_ranks(self, value: float | Tensor) -> float:
        return over_ranks(self.topology, value)

    def _against(self, true: dict[str, Tensor], chosen: list[Strategy]) -> dict[str, Any]:
        with self.step.under(chosen) as trial:
            promise = Promise.of(trial.strategies)
            losses: list[float] = []

            def run(draw: int) -> None:
                losses.append(float(trial(self.batches, replace(self.context, step=draw)).loss))

            found = differences(self.engine, true, run, 1 if promise.fidelity is Fidelity.EXACT else self.draws)
            if not found.right(promise, self.tolerance):
                found = replace(found, rounding=differences(self.engine, true, self._rounded, ROUNDED).moves())
            mean = self._over_ranks(sum(losses) / len(losses))
            return {**self._report(trial, promise, found), "loss": mean}

    def _rounded(self, number: int) -> None:
        with rounded_otherwise(self.reference, self.precision, number):
            self._true()

    def _report(self, trial: Prepared, promise: Promise, found: Differences) -> dict[str, Any]:
        _, each = found.ratios(promise, self.tolerance)
        order = each.nan_to_num(torch.inf).argsort(descending=True, stable=True)[:SHOWN].tolist()
        errors = {found.names[i]: _relative(found.mean[i], found.true[i]) for i in order}
        everything = found.true.norm()
        return {
            "strategy": [name_of(strategy) for strategy in trial.strategies],
            "settings": _changed(self.step.strategies, trial.strategies),
            "fidelity": promise.fidelity.name.lower(),
            "engine": self.engine.name,
            "world": self.topology.world,
            "dtype": str(self.precision).removeprefix("torch."),
            "draws": found.draws,
            "grad_error": _relative(found.mean.norm(), everything),
            "deviation": _relative(found.deviation.norm(), everything) if found.draws > 1 else None,
            "rounding": None if found.rounding is None else _relative(found.rounding.norm(), everything),
            "worst": [{"name": name, "error": error} for name, error in errors.items()],
            "parameters": len(found.names),
            "without_gradient": int((found.true == 0).sum()),
            "verdict": VERDICTS[promise.fidelity] if found.right(promise, self.tolerance) else "wrong",
            "tolerance": self.tolerance,
            "bound": promise.bound if promise.fidelity is Fidelity.APPROXIMATE else None,
        }


def _relative(difference: Tensor, size: Tensor) -> float | None:
    """None where there is nothing that it could be relative to, or where it is not a number."""
    found = float(difference / size)
    return found if math.isfinite(found) else None


def _changed(before: Sequence[Strategy], after: Sequence[Strategy]) -> dict[str, Any]:
    """The fields that are not the recipe's."""
    found = {}
    for old, new in zip(before, after, strict=True):
        for field in dataclasses.fields(new):
            if getattr(old, field.name) != getattr(new, field.name):
                found[f"{name_of(new)}.{field.name}"] = getattr(new, field.name)
    return found


def headline(found: dict[str, Any]) -> str:
    """One line, of what is right or not."""
    names = ", ".join(found["strategy"])
    given = ", ".join(f"{key}={value}" for key, value in found["settings"].items())
    error = "no gradient" if found["grad_error"] is None else f"gradient error {found['grad_error']:.1e}"
    parts = [f"{names}: {found['verdict']}", error]
    if found["draws"] > 1:
        parts.append(f"mean of {found['draws']} draws with a deviation of {found['deviation'] or 0:.2g}")
    return ", ".join([*parts, _allowed(found)]) + (f" ({given})" if given else "")


def _allowed(found: dict[str, Any]) -> str:
    words = f"tolerance {found['tolerance']:.0e} in {found['dtype']}"
    if found["bound"] is not None:
        words += f", bound {found['bound']:g}"
    if found["rounding"] is not None:
        words += f", rounding moves it by {found['rounding']:.1e}"
    return words


def wrong(found: dict[str, Any]) -> str:
    worst = found["worst"][0]
    off = "is not what it should be" if worst["error"] is None else f"is off by {worst['error']:.2g} of its norm"
    draws = f"on the mean of {found['draws']} draws, " if found["draws"] > 1 else ""
    given = "".join(f", {key}={value}" for key, value in found["settings"].items())
    names = " and ".join(found["strategy"])
    return f"strategy {names} gives a wrong gradient: {worst['name']} {off} ({draws}{_allowed(found)}{given})"


def table(found: dict[str, Any]) -> str:
    """What `ebbtide verify` prints for a person."""
    ranks = f"{found['world']} rank{'s' if found['world'] > 1 else ''}"
    lines = [
        headline(found),
        f"on {found['engine']}, {ranks}, {found['rows']} sequences of at most {found['length']} tokens",
    ]
    if found.get("why_not_float64"):
        lines.append(f"not in float64: {found['why_not_float64']}")
    if found["exact_error"] is not None:
        lines.append(f"made exact by its settings: gradient error {found['exact_error']:.1e}")
    lines += [f"    {'' if (e := row['error']) is None else f'{e:.1e}':8}  {row['name']}" for row in found["worst"]]
    lines.append(f"loss {found['loss']:.9g}, by autograd {found['loss_reference']:.9g}")
    if found["without_gradient"]:
        lines.append(
            f"{found['without_gradient']} of {found['parameters']} parameters have no gradient here: only that they "
            "get none was checked"
        )
    return "\n".join(lines)
