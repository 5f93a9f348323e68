"""The loop by itself: what it asks of its parts, in which order, and what it writes."""

from __future__ import annotations

import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distrib import told
from distrib.checkpoint import Progress
from distrib.contracts import Batch, Context, Result, Window
from distrib.energy import Account, Part, summed
from distrib.energy.account import account
from distrib.errors import Interrupted, NotFinite, OutOfMemory, UserError
from distrib.guard import MOST, Guard
from distrib.loop import Loop
from distrib.numbers import Plan
from distrib.optim import Schedule
from distrib.resume import resume
from distrib.topology import Topology


class FakeEngine:
    """Weights that are a count of updates."""

    name, topology, module, model = "ddp", Topology(), nn.Identity(), nn.Identity()

    def __init__(self, said: list[Any]) -> None:
        self.said = said
        self.updates = 0

    def micro_batch(self, last: bool) -> Any:
        return nullcontext()

    def zero_grad(self) -> None:
        self.said.append("zero_grad")

    def step(self, learning_rate: float, max_grad_norm: float | None) -> float:
        self.said.append(("update", learning_rate, max_grad_norm))
        self.updates += 1
        return 2.0

    def save(self, create: Any) -> None:
        with create("updates") as file:
            file.write(str(self.updates).encode())

    def load(self, folder: Path) -> None:
        self.updates = int((folder / "updates").read_text())


class FakeMeter:
    """A hundred joules between two readings. `missing` is the share of the time that is not covered."""

    def __init__(self, missing: float = 0.0) -> None:
        self.readings = 0
        self.missing = missing

    def read(self) -> int:
        self.readings += 1
        return self.readings

    def between(self, before: int, after: int, tokens: int, steps: int) -> Account:
        seconds, joules = float(after - before), 100.0 * (after - before)
        whole = 1 - self.missing
        part = Part("gpu", "GPU-a", "node", (0,), True, "counter", seconds, joules, 10.0, whole, 0, None)
        return account([part], seconds, tokens, steps, [])


def plan(run: Path, **changes: Any) -> Plan:
    run.mkdir(exist_ok=True)
    known: dict[str, Any] = {
        "run": run,
        "steps": 4,
        "global_batch": 4,
        "rows": None,
        "schedule": Schedule(1.0, 4, kind="linear"),
        "seed": 11,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": None,
        "eval_steps": None,
    }
    return Plan(**{**known, **changes})


def rows(start: int, stop: int) -> Window:
    ids = list(range(start, stop))
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
    return Window([batch], ids, tokens=len(ids), nonpad_tokens=len(ids) - 1, loss_tokens=2)


class Case:
    """A loop over numbered rows; `said` is what happened, in order."""

    def __init__(
        self,
        made: Plan,
        loss: Any = lambda step: 1.0,
        weight: float = 5.0,
        meter: FakeMeter | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.said: list[Any] = []
        self.plan = made
        self.loss = loss
        self.meter = meter or FakeMeter()
        self.engine: Any = FakeEngine(self.said)

        def step(batches: list[Batch], context: Context) -> Result:
            ids = [int(number) for batch in batches for number in batch["input_ids"].flatten()]
            self.said.append(("step", context.step, context.seed, context.weight, ids))
            return Result(torch.tensor(self.loss(context.step)), len(ids))

        self.loop = Loop(
            made,
            self.engine,
            step,  # type: ignore[arg-type]
            window=rows,
            weight=lambda batch: weight,
            annotate=lambda batches, context: self.said.append("annotate"),
            evaluate=lambda index: {"eval_loss": index / 2},
            report=lambda line: self.said.append(("report", line["step"])),
            meter=self.meter,  # type: ignore[arg-type]
            guard=guard,
        )

    def run(self) -> Progress:
        return self.loop.run(resume(self.plan, self.engine, self.loop.step, self.loop.guard, None))

    def lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.plan.run / f"{name}.jsonl").read_text().splitlines()]

    def taken(self) -> list[list[int]]:
        return [event[4] for event in self.said if event[0] == "step"]


def test_a_step_annotates_runs_updates_and_reports_in_this_order(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, steps=1, max_grad_norm=0.5))
    case.run()
    assert case.said == [
        "annotate",
        ("step", 0, 11, 5.0, [0, 1, 2, 3]),
        ("update", 1.0, 0.5),
        ("report", 1),
    ]


def test_every_row_comes_once_and_the_counts_add_up(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, rows=14))
    progress = case.run()
    assert case.taken() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]
    assert progress == Progress(step=4, tokens=14, nonpad_tokens=10, loss_tokens=8, rows=14)
    assert [line["ids"] for line in case.lines("samples")] == case.taken()
    assert [line["learning_rate"] for line in case.lines("metrics")] == [1.0, 0.75, 0.5, 0.25]
    assert [line["tokens"] for line in case.lines("metrics")] == [4, 8, 12, 14]


def test_no_clipping_is_said_as_none(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, steps=1))
    case.run()
    assert ("update", 1.0, None) in case.said


def test_logging_now_and_then_never_leaves_out_the_last(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, steps=5, logging_steps=2))
    case.run()
    assert [line["step"] for line in case.lines("metrics")] == [2, 4, 5]
    assert [line["step"] for line in case.lines("samples")] == [1, 2, 3, 4, 5]


def test_joules_of_a_line_are_since_the_line_before_and_accounts_since_the_checkpoint(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, steps=6, save_steps=3, logging_steps=2))
    case.run()
    # Readings: the start, the lines of steps 2, 4 and 6, the checkpoints of steps 3 and 6.
    assert [line["joules"] for line in case.lines("metrics")] == [100.0, 200.0, 100.0]
    assert [line["joules_per_token"] for line in case.lines("metrics")] == [100 / 8, 200 / 8, 100 / 8]
    assert {line["energy_source"] for line in case.lines("metrics")} == {"counter"}
    records = case.lines("energy")
    assert [(record["step"], record["steps"], record["tokens"]) for record in records] == [(3, 3, 12), (6, 3, 12)]
    assert [record["joules"] for record in records] == [200.0, 300.0]


def test_a_line_whose_energy_is_known_in_part_has_none(tmp_path: Path) -> None:
    case = Case(plan(tmp_path), meter=FakeMeter(missing=0.25))
    case.run()
    for line in case.lines("metrics"):
        assert line["joules"] is line["joules_per_token"] is line["energy_source"] is None
    assert [record["coverage"] for record in case.lines("energy")] == [0.75, 0.75]


def test_a_run_that_goes_on_has_the_account_of_every_step_once(tmp_path: Path) -> None:
    first = Case(plan(tmp_path, steps=8), loss=lambda step: math.nan if step == 5 else 1.0)
    with pytest.raises(NotFinite):
        first.run()
    Case(plan(tmp_path, steps=8)).run()
    records = first.lines("energy")
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    total = summed(records)
    assert (total.steps, total.tokens) == (8, 32)
    assert total.joules == sum(record["joules"] for record in records)
    # Four checkpoints, three readings up to each; the fifth step's, made twice, are counted once.
    assert total.joules == 100 * 4 * 3


def test_evaluations_are_journalled_beside(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, eval_steps=2))
    case.run()
    assert case.lines("evaluations") == [{"step": 2, "eval_loss": 1.0}, {"step": 4, "eval_loss": 2.0}]


def test_going_on_takes_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    first = Case(plan(tmp_path), loss=lambda step: math.nan if step == 3 else 1.0)
    with pytest.raises(NotFinite, match="step 4: the loss is nan; the newest checkpoint is untouched"):
        first.run()
    assert [line["step"] for line in first.lines("metrics")] == [1, 2, 3]
    assert first.engine.updates == 3
    second = Case(plan(tmp_path))
    second.run()
    assert second.taken() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert second.engine.updates == 4
    assert [line["step"] for line in second.lines("samples")] == [1, 2, 3, 4]


def test_events_are_journalled_and_those_of_steps_trained_again_are_dropped(tmp_path: Path) -> None:
    def events() -> list[tuple[Any, ...]]:
        return [(line["step"], line["event"], line["detail"]) for line in case.lines("events")]

    case = Case(plan(tmp_path), loss=lambda step: math.nan if step == 3 else 1.0)
    with pytest.raises(NotFinite):
        case.run()
    start = (0, "start", "ddp, world 1")
    assert events() == [start, (3, "stop", "step 4: the loss is nan; the newest checkpoint is untouched")]
    case = Case(plan(tmp_path))
    case.run()
    assert events() == [start, (2, "resume", "ddp, world 1"), (4, "finish", None)]
    assert 0 < case.lines("metrics")[-1]["time"] <= case.lines("events")[-1]["time"]


def events(case: Case) -> list[tuple[Any, ...]]:
    return [(line["step"], line["event"], line["detail"]) for line in case.lines("events")][1:-1]


def test_a_step_that_is_skipped_takes_its_rows_and_leaves_the_weights(tmp_path: Path) -> None:
    case = Case(plan(tmp_path), loss=lambda step: math.inf if step == 1 else 1.0, guard=Guard("skip"))
    assert case.run().rows == 16
    assert case.engine.updates == 3
    assert [line["step"] for line in case.lines("metrics")] == [1, 3, 4]
    assert [line["ids"] for line in case.lines("samples")] == case.taken()
    assert events(case) == [(1, "skip", "step 2: the loss is inf")]
    # Its gradients are gone, and the learning rates of the others are as ever.
    assert [event[1] for event in case.said if event[0] == "update"] == [1.0, 0.5, 0.25]
    assert case.said[case.said.index(("step", 1, 11, 5.0, [4, 5, 6, 7])) + 1] == "zero_grad"


def test_a_run_that_goes_back_leaves_out_the_step_that_it_went_back_for(tmp_path: Path) -> None:
    case = Case(plan(tmp_path, steps=6), loss=lambda step: math.nan if step == 3 else 1.0, guard=Guard("rollback"))
    assert case.run().rows == 24
    assert case.taken() == [[4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in (0, 1, 2, 3, 2, 4, 5)]
    assert case.engine.updates == 5
    assert events(case) == [
        (2, "rollback", "step 4: the loss is nan; back from step 3"),
        (3, "skip", "step 4, as before"),
    ]
    for name in ("metrics", "samples"):
        steps = [line["step"] for line in case.lines(name)]
        assert steps == sorted(set(steps))
    # What was spent on the step that was made twice is in the account.
    assert summed(case.lines("energy")).joules == 100 * case.meter.readings - 100


def test_going_back_needs_a_checkpoint(tmp_path: Path) -> None:
    case = Case(plan(tmp_path), loss=lambda step: math.nan if step == 1 else 1.0, guard=Guard("rollback"))
    with pytest.raises(NotFinite, match=r"^step 2: the loss is nan; there is no checkpoint to go back to$"):
        case.run()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_what_never_ends_is_given_up(tmp_path: Path, policy: Any) -> None:
    case = Case(plan(tmp_path, steps=40), loss=lambda step: math.nan if step >= 3 else 1.0, guard=Guard(policy))
    with pytest.raises(NotFinite, match=f"^step {3 + MOST}: the loss is nan; the newest checkpoint is untouched$"):
        case.run()
    assert case.engine.updates == 3
    assert sorted(case.loop.guard.left_out) == list(range(3, 3 + MOST))


def test_a_spike_is_a_fault_once_there_is_a_usual_loss(tmp_path: Path) -> None:
    def loss(step: int) -> float:
        return {1: 9.0, 12: 2.01, 13: 1.99}.get(step, 1.0)

    case = Case(plan(tmp_path, steps=15), loss=loss, guard=Guard("skip", spike=2.0))
    case.run()
    assert events(case) == [(12, "skip", "step 13: the loss is 2.01, more than 2 times the usual 1")]
    # What is usual is known to a run that goes on.
    again = Case(plan(tmp_path, steps=18), loss=lambda step: 5.0 if step == 16 else 1.0, guard=Guard("stop", spike=2.0))
    with pytest.raises(NotFinite, match=r"^step 17: the loss is 5, more than 2 times the usual 1; the newest"):
        again.run()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    case = Case(plan(tmp_path))
    case.engine.model = nn.Linear(2, 2)

    def loss(step: int) -> float:
        if step == 3:
            case.engine.model.weight.data[0, 1] = math.inf
        return 1.0

    case.loss = loss
    with pytest.raises(NotFinite, match=r"^step 4: weights are not finite; the newest checkpoint is untouched$"):
        case.run()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-2"]


def test_a_batch_without_loss_tokens_stops_before_the_step(tmp_path: Path) -> None:
    case = Case(plan(tmp_path), weight=0.0)
    with pytest.raises(UserError, match="step 1: its 4 rows have no loss tokens"):
        case.run()
    assert case.said == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_gives_the_handlers_back(tmp_path: Path, number: int) -> None:
    def interrupted(step: int) -> float:
        if step == 1:
            os.kill(os.getpid(), number)
        return 1.0

    before = [signal.getsignal(kind) for kind in told.KINDS]
    case = Case(plan(tmp_path, save_steps=100), loss=interrupted)
    with pytest.raises(Interrupted, match="stopped after step 2; the same command goes on"):
        case.run()
    assert [signal.getsignal(kind) for kind in told.KINDS] == before
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]
    (stop,) = [line for line in case.lines("events") if line["event"] == "stop"]
    assert (stop["step"], stop["detail"]) == (2, "stopped after step 2; the same command goes on from there")


def test_a_signal_may_be_repeated_and_a_second_one_ends_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(step: int) -> float:
        for _ in "ab":
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    with pytest.raises(Interrupted, match="stopped after step 1"):
        Case(plan(tmp_path / "repeated"), loss=twice).run()
    assert (tmp_path / "repeated" / "checkpoints" / "step-1").exists()
    monkeypatch.setattr(told, "AGAIN_S", 0.0)
    with pytest.raises(Interrupted, match="stopped at once"):
        Case(plan(tmp_path / "second"), loss=twice).run()
    assert not (tmp_path / "second" / "checkpoints").exists()


def test_the_preflight_runs_the_longest_rows_without_a_trace(tmp_path: Path) -> None:
    case = Case(plan(tmp_path))
    case.loop.preflight(rows(90, 93).micro_batches[0])
    assert case.said == ["annotate", ("step", -1, 11, math.inf, [90, 91, 92]), "zero_grad"]
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_another_batch_or_engine_is_refused_before_it_loads(tmp_path: Path) -> None:
    Case(plan(tmp_path)).run()
    other = Case(plan(tmp_path, global_batch=8, steps=8))
    with pytest.raises(UserError, match=r"global batch is 8 rows, .* was trained with 4: .* set global_batch_size"):
        other.run()
    other = Case(plan(tmp_path, steps=8))
    other.engine.name = "zero"
    with pytest.raises(UserError, match=r"engine.name='zero': .* was written by 'ddp'"):
        other.run()
    assert other.engine.updates == 0


def test_the_steps_asked_for_are_traced(tmp_path: Path) -> None:
    Case(plan(tmp_path, profile_steps=(2, 3))).run()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps-2-3-rank-0.json"
    assert json.loads(path.read_text())["traceEvents"]


def test_a_run_that_goes_on_within_the_traced_steps_traces_the_rest(tmp_path: Path) -> None:
    Case(plan(tmp_path, steps=2)).run()
    Case(plan(tmp_path, profile_steps=(1, 3))).run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-3-3-rank-0.json"]


def test_a_trace_that_a_stop_cuts_off_is_written_with_what_it_has(tmp_path: Path) -> None:
    def stop(step: int) -> float:
        return math.nan if step == 2 else 1.0

    with pytest.raises(NotFinite):
        Case(plan(tmp_path, profile_steps=(1, 4)), loss=stop).run()
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-1-2-rank-0.json"]


def test_memory_that_runs_out_in_a_step_is_one_line_and_updates_nothing(tmp_path: Path) -> None:
    def full(step: int) -> float:
        if step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return 1.0

    case = Case(plan(tmp_path), loss=full)
    with pytest.raises(
        OutOfMemory,
        match=r"^out of memory in step 2 \(CUDA .* 2 GiB.\); beside .* weights 0 B, .* lower max_length .* engine$",
    ):
        case.run()
    assert case.engine.updates == 1


def test_other_errors_of_a_step_are_left_as_they_are(tmp_path: Path) -> None:
    def broken(step: int) -> float:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match=r"^shapes$"):
        Case(plan(tmp_path), loss=broken).run()
