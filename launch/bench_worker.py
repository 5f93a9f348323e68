"""One measurement of `ebbtide bench`, in processes of its own: `python -m launch.bench_worker JOB`, once a rank.

The run is put together as `train` does it, and steps are those of the training loop. Rank 0 writes the answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from distrib.errors import OutOfMemory, UserError
from distrib.redaction import cleaned_output, one_line

if TYPE_CHECKING:
    from distrib.checkpoint import Progress
    from distrib.contracts import Batch
    from distrib.loop import Loop
    from distrib.meters import Memory
    from distrib.topology import Topology
    from launch.assemble import Parts
    from launch.recipe import Recipe

Answer = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What to measure (`kind`: a key of MEASURES) of one side at one length, on rows of `max_length` tokens. `steps`
    follow `warm_up` ones."""

    recipe: str
    side: str
    length: int
    max_length: int
    kind: str
    steps: int
    warm_up: int
    answer: str


def main() -> None:
    with cleaned_output():
        _measure()


def _measure() -> None:
    from distrib.meters import spare_the_machine
    from distrib.topology import connect, read_environment
    from launch.cli import quieten
    from launch.rank import follow_supervisor

    follow_supervisor()
    quieten()
    job = Job(**json.loads(sys.argv[1]))
    topology = read_environment()
    connect(topology)
    if topology.device_type == "cpu":
        spare_the_machine()
    try:
        answer = {"status": "ok"} | MEASURES[job.kind](job, topology)
    except Exception as error:
        answer = failure(error)
    if topology.main or answer["status"] != "ok":
        write(Path(job.answer), answer, topology)
    sys.stderr.flush()
    # Peers may wait in a collective that this rank has left.
    os._exit(0 if answer["status"] == "ok" else 1)


def write(path: Path, answer: Answer, topology: Topology) -> None:
    """Whole or not at all; a failure is told by the rank that sees it."""
    draft = path.with_suffix(f".{topology.rank}")
    draft.write_text(json.dumps(answer))
    draft.replace(path)


def failure(error: BaseException) -> Answer:
    import traceback

    from distrib.meters import is_out_of_memory

    text = one_line(error)
    if isinstance(error, OutOfMemory) or is_out_of_memory(error):
        return {"status": "oom", "why": text}
    if isinstance(error, UserError):
        return {"status": "refused", "why": text}
    traceback.print_exception(error)
    return {"status": "failed", "why": f"{type(error).__name__}: {text}"}


def prepare(job: Job, topology: Topology) -> tuple[Parts, Loop, Memory]:
    """The side's run of the recipe before its first step, and its memory from before the model on."""
    from distrib.energy import Meter
    from distrib.loop import Loop
    from distrib.meters import Memory
    from distrib.numbers import Plan
    from distrib.optim import Schedule
    from launch.assemble import Parts
    from launch.reference import annotator
    from launch.sides import BASELINES

    recipe = _with_equal_rows(_recipe(job), topology)
    parts = Parts.of(recipe, topology)
    memory = Memory(topology)
    meter = Meter(topology)
    if job.kind == "time":
        meter.measure_idle(recipe.energy.idle_s)
    step = parts.model(baseline=job.side if job.side in BASELINES else None)
    engine = step.engine
    # One step more than is run: the last one would be saved.
    steps = job.warm_up + job.steps + 1
    plan = Plan(
        run=Path(job.answer).parent,
        steps=steps,
        global_batch=parts.global_batch,
        rows=None,
        schedule=Schedule(recipe.learning_rate, steps, 0, recipe.lr_scheduler_type),
        seed=recipe.seed,
        max_grad_norm=recipe.max_grad_norm,
        logging_steps=steps,
        save_steps=steps,
        save_total_limit=None,
        eval_steps=None,
    )
    loop = Loop(
        plan,
        engine,
        step,
        window=parts.window,
        weight=parts.objective.weight,
        annotate=annotator(recipe, parts.config, engine, step),
        evaluate=lambda index: {},
        report=lambda line: None,
        meter=meter,
    )
    return parts, loop, memory


def _with_equal_rows(recipe: Recipe, topology: Topology) -> Recipe:
    """A side whose ranks see the same rows takes as many in a step as the others do."""
    from launch.recipe_file import global_batch

    rows = global_batch(recipe, topology.world // recipe.engine.copies)
    return recipe.model_copy(update={"global_batch_size": rows, "gradient_accumulation_steps": 1})


def _recipe(job: Job) -> Recipe:
    from launch.recipe_file import load_recipe
    from launch.sides import sections

    recipe = load_recipe(job.recipe, [f"max_length={job.max_length}", "verify=false"])
    return recipe.with_strategies(sections(job.side, recipe) or [{"name": "plain"}])


def time_steps(job: Job, topology: Topology) -> Answer:
    """Whole training steps: data, forward, backward, clipping, update."""
    from distrib.checkpoint import Progress
    from distrib.meters import peak_bytes
    from launch.flops import peak_flops, training_flops
    from launch.machine import device
    from strategies import Prepared

    parts, loop, _ = prepare(job, topology)
    progress = Progress()
    for _ in range(job.warm_up):
        progress = loop.one(progress)
    before, reading = progress, loop.meter.read()
    step_s: list[float] = []
    counts: list[tuple[int, int, int]] = []
    for _ in range(job.steps):
        _wait(topology)
        start = perf_counter()
        after = loop.one(progress)
        _wait(topology)
        step_s.append(perf_counter() - start)
        counts.append(_counted(progress, after))
        progress = after
    tokens = progress.tokens - before.tokens
    energy = loop.meter.between(reading, loop.meter.read(), tokens, job.steps)
    rows = parts.data.fetch(before.rows, progress.rows)
    lengths = [len(sequence.tokens) for _, row in rows for sequence in row]
    machine = device(topology)
    peak = peak_flops(machine["device"]) if parts.recipe.bf16 else None
    return {
        "step_s": step_s,
        "tokens": [count[0] for count in counts],
        "nonpad_tokens": [count[1] for count in counts],
        "loss_tokens": [count[2] for count in counts],
        "flops": training_flops(loop.engine.model, parts.config, lengths),
        "peak_flops": None if peak is None else peak * topology.world,
        "peak_bytes": loop.most(peak_bytes(topology)),
        "energy": energy.as_dict(),
        "accounts": loop.step.accounts() or None if isinstance(loop.step, Prepared) else None,
        "machine": machine,
    }


def _counted(before: Progress, after: Progress) -> tuple[int, int, int]:
    return (
        after.tokens - before.tokens,
        after.nonpad_tokens - before.nonpad_tokens,
        after.loss_tokens - before.loss_tokens,
    )


def _wait(topology: Topology) -> None:
    import torch

    if topology.device_type == "cuda":
        torch.cuda.synchronize()


def peak_of_activations(job: Job, topology: Topology) -> Answer:
    """Of forward and backward of the micro-batch that needs the most, above weights and gradients."""
    from distrib.meters import Memory

    parts, loop, _ = prepare(job, topology)
    longest = parts.data.longest(parts.recipe.per_device_train_batch_size)
    loop.preflight(longest)
    memory = Memory(topology)
    loop.preflight(longest)
    above = loop.most(memory.peak_bytes())
    gradients = sum(_size_bytes(gradient) for _, gradient, _ in loop.engine.gradients())
    return {"activation_peak_bytes": None if above is None or above <= gradients else above - gradients}


def _size_bytes(tensor: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def peak_of_length(job: Job, topology: Topology) -> Answer:
    """Of a whole training step at exactly this length: weights, gradients, optimizer and activations."""
    from distrib.checkpoint import Progress

    parts, loop, memory = prepare(job, topology)
    # Optimizer states come with the first step.
    loop.one(Progress())
    loop.preflight(stretched(parts.data.longest(parts.recipe.per_device_train_batch_size), job.length))
    return {"total_peak_bytes": loop.most(memory.peak_bytes())}


def error_of_gradients(job: Job, topology: Topology) -> Answer:
    from launch.verify import LENGTH, gradient_error

    found = gradient_error(_recipe(job), topology, min(LENGTH, job.length))
    worst = found["worst"][0]["name"] if found["worst"] else None
    return {"worst": worst} | {key: found[key] for key in ("grad_error", "deviation", "dtype", "verdict")}


def stretched(batch: Batch, length: int) -> Batch:
    """The batch with its lines repeated, or cut, to `length` tokens; what has no tokens is as it was."""
    import torch

    now = batch["input_ids"].shape[1]
    found = {}
    for name, tensor in batch.items():
        if tensor.ndim == 2 and tensor.shape[1] == now:
            tensor = tensor.repeat(1, -(-length // now))[:, :length]
        found[name] = tensor
    if "position_ids" in batch:
        found["position_ids"] = torch.arange(length).expand(len(batch["input_ids"]), length).contiguous()
    return found


MEASURES: dict[str, Callable[[Job, Topology], Answer]] = {
    "time": time_steps,
    "memory": peak_of_activations,
    "error": error_of_gradients,
    "length": peak_of_length,
}

if __name__ == "__main__":
    main()
