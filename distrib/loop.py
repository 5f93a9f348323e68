"""The loop: global batches in, weights and a journal out.

    for every step: rows -> what all ranks have (W, tokens, stop?) -> forward and backward -> clip, update -> journal
                    -> sometimes: a checkpoint, an evaluation

Position and randomness follow from the step alone, so a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from distrib import checkpoint
from distrib.checkpoint import Manifest, Progress
from distrib.contracts import Batch, Context, Engine, Step, Window
from distrib.errors import Interrupted, NotFinite, UserError
from distrib.journal import Journal
from distrib.meters import peak_bytes
from distrib.optim import Schedule


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. `rows` ends the data in the middle of the last step; None when it has no end."""

    run: Path
    steps: int
    global_batch: int
    rows: int | None
    schedule: Schedule
    seed: int
    max_grad_norm: float
    logging_steps: int
    save_steps: int
    save_total_limit: int | None
    eval_steps: int | None


@dataclass(frozen=True)
class Totals:
    """What all ranks together have in one global batch."""

    weight: float
    tokens: int
    nonpad_tokens: int
    loss_tokens: int
    stop: bool
    ids: list[int]


class Loop:
    """`window(start, stop)` gives this rank's share of rows [start, stop); `annotate` adds what the objective wants
    to know beforehand (a reference's log-probabilities); `evaluate` returns figures to journal."""

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        step: Step,
        window: Callable[[int, int], Window],
        weight: Callable[[Batch], float],
        annotate: Callable[[list[Batch], Context], None],
        evaluate: Callable[[int], dict[str, Any]],
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.plan = plan
        self.engine = engine
        self.topology = engine.topology
        self.step = step
        self.window = window
        self.weight = weight
        self.annotate = annotate
        self.evaluate = evaluate
        self.report = report
        self._stop = False
        self._saved: int | None = None

    def run(self, progress: Progress) -> Progress:
        """From `progress` to the plan's last step; raises Interrupted after a checkpoint when told to stop."""
        names = ("metrics", "samples", "evaluations") if self.topology.main else ()
        if self.topology.main:
            checkpoint.drop_after(self.plan.run, progress.step)
        self._saved = progress.step if checkpoint.exists(self.plan.run, progress.step) else None
        self._journals = {name: Journal(self.plan.run / f"{name}.jsonl", progress.step) for name in names}
        handlers = {kind: signal.signal(kind, self._ask_to_stop) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            while progress.step < self.plan.steps:
                progress = self._one(progress)
        finally:
            for kind, handler in handlers.items():
                signal.signal(kind, handler)
            for journal in self._journals.values():
                journal.close()
        return progress

    def _ask_to_stop(self, kind: int, frame: FrameType | None) -> None:
        # Launchers may pass SIGTERM on more than once; only a person's second Ctrl-C means at once.
        if self._stop and kind == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = True

    def preflight(self, longest: Batch) -> None:
        """One forward and backward of the longest rows, so that memory fails here or not at all.

        With an infinite W every gradient is zero: nothing is learned and nothing needs undoing.
        """
        context = Context(self.plan.seed, -1, math.inf)
        batches = self._to_device([longest])
        self.annotate(batches, context)
        try:
            self.step(batches, context)
        except torch.OutOfMemoryError as error:
            rows, length = longest["input_ids"].shape
            raise UserError(
                f"out of memory in the preflight: {rows} sequences of {length} tokens, the longest, do not fit "
                f"({str(error).splitlines()[0]}); lower max_length or per_device_train_batch_size, or choose another "
                "strategy or engine"
            ) from None
        self.engine.zero_grad()

    def _one(self, progress: Progress) -> Progress:
        begin = time.perf_counter()
        plan, index = self.plan, progress.step
        start = index * plan.global_batch
        stop = start + plan.global_batch if plan.rows is None else min(start + plan.global_batch, plan.rows)
        window = self.window(start, stop)
        totals = self._totals(window)
        if totals.stop:
            self._save(progress)
            raise Interrupted(f"stopped after step {progress.step}; the same command goes on from there")
        if totals.weight == 0:
            raise UserError(
                f"step {index + 1}: its {len(totals.ids)} rows have no loss tokens; look at them with `ebbtide data`"
            )
        context = Context(plan.seed, index, totals.weight)
        batches = self._to_device(window.micro_batches)
        self.annotate(batches, context)
        self.engine.module.train()
        loss = self._sum(self.step(batches, context).loss)
        if not math.isfinite(loss):
            raise NotFinite(f"step {index + 1}: the loss is {loss}; the newest checkpoint is untouched")
        rate = plan.schedule(index)
        try:
            norm = self.engine.step(rate, plan.max_grad_norm or None)
        except NotFinite as error:
            raise NotFinite(f"step {index + 1}: {error}; the newest checkpoint is untouched") from None
        progress = Progress(
            index + 1,
            progress.tokens + totals.tokens,
            progress.nonpad_tokens + totals.nonpad_tokens,
            progress.loss_tokens + totals.loss_tokens,
            stop,
        )
        self._journal(progress, totals, loss, norm, rate, time.perf_counter() - begin)
        self._now_and_then(progress)
        return progress

    def _journal(
        self, progress: Progress, totals: Totals, loss: float, norm: float, rate: float, seconds: float
    ) -> None:
        due = progress.step % self.plan.logging_steps == 0 or progress.step == self.plan.steps
        peak = int(self._max(peak_bytes(self.topology))) if due else 0
        if not self._journals:
            return
        self._journals["samples"].write({"step": progress.step, "ids": totals.ids})
        if due:
            line = {
                "step": progress.step,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": rate,
                "tokens": progress.tokens,
                "nonpad_tokens": progress.nonpad_tokens,
                "loss_tokens": progress.loss_tokens,
                "tokens_per_s": totals.tokens / seconds,
                "nonpad_tokens_per_s": totals.nonpad_tokens / seconds,
                "loss_tokens_per_s": totals.loss_tokens / seconds,
                "peak_bytes": peak,
                "joules": None,
                "time": time.time(),
            }
            self._journals["metrics"].write(line)
            self.report(line)

    def _now_and_then(self, progress: Progress) -> None:
        plan = self.plan
        if plan.eval_steps and progress.step % plan.eval_steps == 0:
            figures = self.evaluate(progress.step)
            if self._journals:
                line = {"step": progress.step, **figures}
                self._journals["evaluations"].write(line)
                self.report(line)
        if progress.step % plan.save_steps == 0 or progress.step == plan.steps:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        # Before the first step there is nothing to save, and torch would save the optimizer as if it had made one.
        if progress.step in (0, self._saved):
            return
        manifest = Manifest(progress, self.topology.world, self.engine.name, self.plan.global_batch)
        checkpoint.save(self.plan.run, self.engine, manifest, self.plan.save_total_limit)
        self._saved = progress.step

    def _totals(self, window: Window) -> Totals:
        """One exchange before the first backward: W, the counts, the sample ids, and whether anyone should stop."""
        room = -(-self.plan.global_batch // self.topology.world)
        mine = torch.full((5 + room,), -1.0, dtype=torch.float64)
        weight = sum(self.weight(batch) for batch in window.micro_batches)
        counts = [weight, window.tokens, window.nonpad_tokens, window.loss_tokens, float(self._stop)]
        mine[: 5 + len(window.ids)] = torch.tensor(counts + window.ids, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.topology.world)]
        if self.topology.world > 1:
            dist.all_gather(everyone, mine)
        else:
            everyone = [mine]
        rows = torch.stack(everyone)
        weight, tokens, nonpad, learned, stop = rows[:, :5].sum(0).tolist()
        ids = [int(number) for number in rows[:, 5:].flatten().tolist() if number >= 0]
        return Totals(weight, int(tokens), int(nonpad), int(learned), stop > 0, ids)

    def _sum(self, value: torch.Tensor) -> float:
        value = value.detach().double().cpu()
        if self.topology.world > 1:
            dist.all_reduce(value)
        return value.item()

    def _max(self, value: float) -> float:
        held = torch.tensor(float(value), dtype=torch.float64)
        if self.topology.world > 1:
            dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return held.item()

    def _to_device(self, batches: list[Batch]) -> list[Batch]:
        device = self.topology.device
        return [{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} for batch in batches]


def resume(plan: Plan, engine: Engine, chosen: Path | None) -> Progress:
    """Load `chosen`, or the newest checkpoint of the run; a fresh start when there is none."""
    found = checkpoint.checkpoints(plan.run)
    source = chosen or (found[-1] if found else None)
    if source is None:
        return Progress()
    manifest = checkpoint.read_manifest(source)
    _check_fit(plan, engine, source, manifest)
    engine.load(source / "engine")
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
