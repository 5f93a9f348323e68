"""The loop: global batches in, weights and a journal out.

    for every step: rows -> what all ranks have (W, tokens, stop?) -> forward and backward -> clip, update -> journal
                    -> sometimes: a checkpoint, an evaluation

Position and randomness follow from the step alone, so a run that was killed goes on bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from distrib import checkpoint
from distrib.checkpoint import Manifest, Progress
from distrib.contracts import Batch, Context, Engine, Remembers, Step, Window
from distrib.energy import Account, Meter
from distrib.errors import Interrupted, NotFinite, NotWritten, OutOfMemory, UserError
from distrib.files import writing
from distrib.guard import Guard
from distrib.heartbeat import HERE
from distrib.journal import Journal
from distrib.meters import is_out_of_memory, peak_bytes
from distrib.numbers import Figures, Mark, Plan, Totals
from distrib.profiling import Profiler, snapshot
from distrib.resume import resume
from distrib.saving import CopyBuffer, Saving
from distrib.shards import held, weights_are_finite
from distrib.told import EARS

log = logging.getLogger("ebbtide")


class _Back(Exception):
    """A step that the run has to go back for; the message says why."""


class Loop:
    """`window(start, stop)` gives this rank's share of rows [start, stop); `annotate` adds what the objective wants
    to know beforehand (a reference's log-probabilities); `evaluate` returns figures to journal. Energy is journalled
    twice: on a line what was used since the line before, and in `energy.jsonl` the account since the checkpoint before,
    so that a run that goes on from any checkpoint has the accounts of all steps up to it."""

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
        meter: Meter,
        guard: Guard | None = None,
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
        self.meter = meter
        self.guard = guard or Guard()
        self._journals: dict[str, Journal] = {}
        self._saved: int | None = None
        self._saving: Saving | None = None
        self._buffer = CopyBuffer() if plan.save_async else None
        self._eval_loss: tuple[int, float | None] = (0, None)
        self._since_failure = False

    def run(self, progress: Progress) -> Progress:
        """From `progress` to the plan's last step; raises Interrupted after a checkpoint when told to stop."""
        self._begin(progress)
        self._line_mark = self._checkpoint_mark = Mark(self.meter.read(), progress)
        profiler = Profiler(self.plan.run / "profile", self.plan.profile_steps, self.topology)
        handlers = EARS.listen()
        self._event(
            progress, "resume" if progress.step else "start", f"{self.engine.name}, world {self.topology.world}"
        )
        try:
            while progress.step < self.plan.steps:
                profiler.begin(progress.step + 1)
                try:
                    progress = self.one(progress)
                except _Back as why:
                    progress = self._back(progress, str(why))
                    continue
                self._recovered(progress)
                if (trace := profiler.end(progress.step)) and self.topology.main:
                    log.info("steps are traced in %s", trace)
            self._settle()
            self._event(progress, "finish")
        except Exception as error:
            # The other ranks may not know of an error in one of them alone.
            if isinstance(error, NotFinite) or self.topology.world == 1:
                with suppress(NotWritten):
                    self._settle()
            if isinstance(error, Interrupted | NotFinite | NotWritten | UserError):
                self._event(progress, "stop", str(error))
            raise
        finally:
            profiler.end(progress.step, early=True)
            EARS.rest(handlers)
            HERE.at("finishing", prompt=False)
            for journal in self._journals.values():
                journal.close()
        return progress

    def _begin(self, progress: Progress) -> None:
        """What a course that the run has left wrote after this step is put aside, or dropped from the journals."""
        names = ("metrics", "samples", "evaluations", "energy", "events") if self.topology.main else ()
        if self.topology.main:
            with writing(self.plan.run):
                checkpoint.drop_after(self.plan.run, progress.step)
        self._saved = progress.step if checkpoint.exists(self.plan.run, progress.step) else None
        for journal in self._journals.values():
            journal.close()
        self._journals = {name: Journal(self.plan.run / f"{name}.jsonl", progress.step) for name in names}

    def _back(self, progress: Progress, why: str) -> Progress:
        """To the newest checkpoint that is whole; the step that it went back for will leave the weights alone."""
        self._settle()
        restored = resume(self.plan, self.engine, self.step, self.guard, None)
        if not restored.step:
            raise NotFinite(f"{why}; there is no checkpoint to go back to")
        self._begin(restored)
        if self._checkpoint_mark.progress.step != restored.step:
            self._checkpoint_mark = Mark(self.meter.read(), restored)
        # The energy of steps that are made again was used all the same.
        self._line_mark = self._checkpoint_mark
        detail = f"{why}; back from step {progress.step}"
        self._event(restored, "rollback", detail)
        if self.topology.main:
            log.warning("%s, to the checkpoint of step %s", detail, restored.step)
        return restored

    def _event(self, progress: Progress, event: str, detail: str | None = None) -> None:
        if self._journals:
            self._journals["events"].write(
                {"step": progress.step, "time": time.time(), "event": event, "detail": detail}
            )

    def _recovered(self, progress: Progress) -> None:
        """Journalled once, after the first step since a failure."""
        if self.plan.failure and not self._since_failure:
            why, when = self.plan.failure
            self._since_failure = True
            self._event(progress, "restart", f"{why}; {time.time() - when:.1f} s to the end of the next step")

    def preflight(self, longest: Batch) -> None:
        """One forward and backward of the longest rows, so that memory fails here or not at all; of a pipeline, which
        holds several micro-batches at once, a whole step of them.

        With an infinite W every gradient is zero: nothing is learned and nothing needs undoing.
        """
        context = Context(self.plan.seed, -1, math.inf)
        rows, length = longest["input_ids"].shape
        count = -(-self.plan.global_batch // (rows * self.topology.data_world)) if self.topology.stages > 1 else 1
        batches = self._to_device([longest] * count)
        self.annotate(batches, context)
        with self._explaining(f"in the preflight: {rows} sequences of {length} tokens, the longest, do not fit"):
            self.step(batches, context)
        self.engine.zero_grad()

    @contextmanager
    def _explaining(self, where: str) -> Iterator[None]:
        """Out of memory is said in one line, with the file that shows what filled it."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            found = snapshot(self.plan.run.with_name(f"{self.plan.run.name}-oom"), self.topology)
            seen = f"; what filled it is in {found}" if found else ""
            raise OutOfMemory(
                f"out of memory {where} ({str(error).splitlines()[0]}); {held(self.engine)}; lower max_length or "
                f"per_device_train_batch_size (on_oom=halve does), or choose another strategy or engine{seen}"
            ) from None

    def one(self, progress: Progress) -> Progress:
        """One step, journalled when it is `run` that asks for it."""
        begin = time.perf_counter()
        plan, index = self.plan, progress.step
        HERE.at(f"step {index + 1}")
        start = index * plan.global_batch
        stop = start + plan.global_batch if plan.rows is None else min(start + plan.global_batch, plan.rows)
        window = self.window(start, stop)
        totals = self._totals(window)
        if totals.written:
            self._settle()
        if totals.stop:
            self._save(progress)
            self._settle()
            raise Interrupted(f"stopped after step {progress.step}; the same command goes on from there")
        if totals.weight == 0:
            raise UserError(
                f"step {index + 1}: its {len(totals.ids)} rows have no loss tokens; look at them with `ebbtide data`"
            )
        figures = self._guarded(progress, window, totals.weight)
        progress = Progress(
            index + 1,
            progress.tokens + totals.tokens,
            progress.nonpad_tokens + totals.nonpad_tokens,
            progress.loss_tokens + totals.loss_tokens,
            stop,
        )
        self._journal(progress, totals, figures, time.perf_counter() - begin)
        self._now_and_then(progress)
        return progress

    def _guarded(self, progress: Progress, window: Window, weight: float) -> Figures | None:
        """None of a step that leaves the weights alone. What is wrong with one all ranks know alike."""
        index = progress.step
        if index in self.guard.left_out:
            self._event(progress, "skip", f"step {index + 1}, as before")
            return None
        try:
            with self._explaining(f"in step {index + 1}"):
                figures = self._update(index, window, weight)
        except NotFinite as error:
            why = f"step {index + 1}: {error}"
        else:
            self.guard.passed(figures.loss)
            return figures
        self.guard.leave_out(index)
        if self.guard.gives_up(index):
            raise NotFinite(f"{why}; the newest checkpoint is untouched")
        if self.guard.policy == "rollback":
            raise _Back(why)
        self._event(progress, "skip", why)
        if self.topology.main:
            log.warning("%s; it leaves the weights alone", why)
        return None

    def _update(self, index: int, window: Window, weight: float) -> Figures:
        """An error leaves the weights as they were."""
        context = Context(self.plan.seed, index, weight, self.plan.steps)
        batches = self._to_device(window.micro_batches)
        self.annotate(batches, context)
        self.engine.module.train()
        loss = self._sum(self.step(batches, context).loss)
        if fault := self.guard.fault(loss):
            self.engine.zero_grad()
            raise NotFinite(fault)
        rate = self.plan.schedule(index)
        return Figures(loss, self.engine.step(rate, self.plan.max_grad_norm or None), rate)

    def _journal(self, progress: Progress, totals: Totals, figures: Figures | None, seconds: float) -> None:
        due = progress.step % self.plan.logging_steps == 0 or progress.step == self.plan.steps
        if self._journals:
            self._journals["samples"].write({"step": progress.step, "ids": totals.ids})
        if not due or figures is None:
            return
        peak = self.most(peak_bytes(self.topology))
        energy, self._line_mark = self._energy_since(self._line_mark, progress)
        if self._journals:
            # A line has no room to say what of it is missing.
            whole = energy.coverage == 1
            line = {
                "step": progress.step,
                "loss": figures.loss,
                "grad_norm": figures.grad_norm,
                "learning_rate": figures.learning_rate,
                "tokens": progress.tokens,
                "nonpad_tokens": progress.nonpad_tokens,
                "loss_tokens": progress.loss_tokens,
                "tokens_per_s": totals.tokens / seconds,
                "nonpad_tokens_per_s": totals.nonpad_tokens / seconds,
                "loss_tokens_per_s": totals.loss_tokens / seconds,
                "peak_bytes": peak,
                "joules": energy.joules if whole else None,
                "joules_per_token": energy.joules_per_token if whole else None,
                "energy_source": energy.source if whole else None,
                "time": time.time(),
            }
            self._journals["metrics"].write(line)
            self.report(line)

    def _energy_since(self, mark: Mark, progress: Progress) -> tuple[Account, Mark]:
        """The whole job's account of the steps since the mark, and the mark after them. Every rank calls it."""
        reading, done = self.meter.read(), mark.progress
        account = self.meter.between(
            mark.reading, reading, tokens=progress.tokens - done.tokens, steps=progress.step - done.step
        )
        return account, Mark(reading, progress)

    def _now_and_then(self, progress: Progress) -> None:
        plan = self.plan
        if plan.eval_steps and progress.step % plan.eval_steps == 0:
            HERE.at(f"the evaluation after step {progress.step}")
            figures = self.evaluate(progress.step)
            self._eval_loss = (progress.step, figures.get("eval_loss"))
            if self._journals:
                line = {"step": progress.step, **figures}
                self._journals["evaluations"].write(line)
                self.report(line)
        if progress.step % plan.save_steps == 0 or progress.step == plan.steps:
            self._save(progress)

    def _save(self, progress: Progress) -> None:
        """Begins to; one that is still being written is waited for."""
        self._settle()
        # Before the first step there is nothing to save, and torch would save the optimizer as if it had made one.
        if progress.step in (0, self._saved):
            return
        if not self._all(weights_are_finite(self.engine)):
            raise NotFinite(f"step {progress.step}: weights are not finite; the newest checkpoint is untouched")
        # Before the checkpoint: one that is whole has the account of its steps beside it.
        energy, self._checkpoint_mark = self._energy_since(self._checkpoint_mark, progress)
        if self._journals:
            self._journals["energy"].write({"step": progress.step, **energy.as_dict()})
        step, loss = self._eval_loss
        manifest = Manifest(
            progress,
            self.topology.world,
            self.engine.name,
            self.plan.global_batch,
            # What it is now, however long the files take.
            deepcopy(self.step.state()) if isinstance(self.step, Remembers) else {},
            guard=self.guard.state(),
            eval_loss=loss if step == progress.step and loss is not None and math.isfinite(loss) else None,
            time=time.time(),
            strategy=list(self.plan.strategy),
            versions=dict(self.plan.versions),
        )
        with HERE.patiently(f"the checkpoint of step {progress.step}"):
            self._saving = Saving(self.plan.run, self.engine, manifest, self._buffer)
        self._saved = progress.step
        if not self.plan.save_async:
            self._settle()

    def _settle(self) -> None:
        """Waits for the checkpoint in the making. Every rank calls it, and all end it alike."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        with HERE.patiently(f"the checkpoint of step {saving.manifest.progress.step}"):
            why = saving.finish(self.plan.save_total_limit, self.plan.save_best)
        if why is None:
            return
        step = saving.manifest.progress.step
        if self._saved == step:
            self._saved = None
        self._event(saving.manifest.progress, "not saved", why)
        if self.plan.on_save_error == "stop":
            raise NotWritten(f"step {step} is not saved: {why}; the checkpoint before is untouched")
        if self.topology.main:
            log.warning("step %s is not saved, training goes on: %s", step, why)

    def _totals(self, window: Window) -> Totals:
        """One exchange before the first backward: W, the counts, the sample ids, and whether anyone should stop."""
        room = -(-self.plan.global_batch // self.topology.data_world)
        mine = torch.full((6 + room,), -1.0, dtype=torch.float64)
        weight = sum(self.weight(batch) for batch in window.micro_batches)
        written = self._saving is not None and self._saving.written
        counts = [weight, window.tokens, window.nonpad_tokens, window.loss_tokens, float(EARS.asked), float(written)]
        mine[: 6 + len(window.ids)] = torch.tensor(counts + window.ids, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.topology.world)]
        if self.topology.world > 1:
            dist.all_gather(everyone, mine)
        else:
            everyone = [mine]
        stop, written = any(row[4] > 0 for row in everyone), all(row[5] > 0 for row in everyone)
        # One of those that have the same rows.
        beside = self.topology.tensor * self.topology.context
        rows = torch.stack(everyone[: self.topology.world // self.topology.stages : beside])
        weight, tokens, nonpad, learned = rows[:, :4].sum(0).tolist()
        ids = [int(number) for number in rows[:, 6:].flatten().tolist() if number >= 0]
        return Totals(weight, int(tokens), int(nonpad), int(learned), stop, written, ids)

    def _sum(self, value: torch.Tensor) -> float:
        """Over the data-parallel ranks."""
        value = value.detach().double().cpu()
        if self.topology.world > 1:
            dist.all_reduce(value)
        return value.item() / self.topology.copies

    def _all(self, yes: bool) -> bool:
        return self.most(int(not yes)) == 0

    def most(self, value: int | None) -> int | None:
        """Of all ranks; None where no rank knows."""
        held = torch.tensor(-1.0 if value is None else value, dtype=torch.float64)
        if self.topology.world > 1:
            dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return int(held) if held >= 0 else None

    def _to_device(self, batches: list[Batch]) -> list[Batch]:
        device = self.topology.device
        return [{name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()} for batch in batches]
