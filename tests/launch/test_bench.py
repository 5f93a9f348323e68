"""Comparisons: who is measured when, what a stopped one keeps, and what is made of the numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from train_cases import answers, recipe, write_rows

from distrib.energy.account import account
from distrib.errors import Interrupted, UserError
from distrib.topology import Topology
from launch import bench, bench_worker
from launch.bench import Options, Task
from launch.bench_worker import Job, failure, stretched
from launch.recipe import Recipe
from launch.recipe_file import dump_recipe

ROOT = Path(__file__).resolve().parents[2]


def options(sides: str = "plain,seco,gc", **changes: Any) -> Options:
    known: dict[str, Any] = {"lengths": (64,), "repeats": 3, "steps": 2, "budget_bytes": None}
    return Options(sides=tuple(sides.split(",")), **{**known, **changes})


def timed(*step_s: float) -> dict[str, Any]:
    counts = [256] * len(step_s)
    return {
        "status": "ok", "step_s": list(step_s), "tokens": counts, "nonpad_tokens": [200] * len(step_s),
        "loss_tokens": [100] * len(step_s), "flops": 1e9 * len(step_s), "peak_flops": None, "peak_bytes": 1000,
        "energy": account([], sum(step_s), 256 * len(step_s), len(step_s), ["no meter"]).as_dict(),
    }  # fmt: skip


class Measured:
    """In the place of the processes: what each task was answered, and what to do when one comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
        self.tasks: list[Task] = []
        self.answers = answers
        self.before: Any = lambda task: None

        def measure(run: bench.Run, task: Task) -> dict[str, Any]:
            self.before(task)
            self.tasks.append(task)
            error = (
                {}
                if task.kind != "error"
                else {"grad_error": 0.5, "dtype": "float64", "worst": "lm_head.weight", "verdict": "exact"}
            )
            usual = timed(0.1, 0.3) if task.kind == "time" else {"status": "ok", "activation_peak_bytes": 7} | error
            answer = self.answers.get(task.side.replace("+", "_"), usual)
            answer = answer(task) if callable(answer) else answer
            run.book.add(task, answer)
            return dict(answer)

        monkeypatch.setattr(bench.Run, "measure", measure)


def compare(made: Recipe, chosen: Options, resume: bool = False) -> dict[str, Any]:
    return bench.bench(made, chosen, None, resume, "ebbtide bench")


@pytest.fixture
def made(tmp_path: Path, dataset: str) -> Recipe:
    return recipe(tmp_path / "run", dataset)


def test_sides_take_turns_and_each_begins_once(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch)
    compare(made, options())
    times = [task.side for task in measured.tasks if task.kind == "time"]
    assert times == ["plain", "seco", "gc", "seco", "gc", "plain", "gc", "plain", "seco"]


def test_rows_are_what_was_measured(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    half = iter([timed(0.1, 0.1), timed(0.05, 0.15), timed(0.2, 0.2)])
    Measured(monkeypatch, seco=lambda task: next(half) if task.kind == "time" else {"status": "ok"})
    result = compare(made, options())
    plain, seco, gc = result["rows"]
    assert (plain["step_s"], plain["step_s_iqr"], plain["steps_timed"]) == (0.2, [0.1, 0.3], 6)
    assert plain["tokens_per_s"] == median([2560.0] * 3 + [256 / 0.3] * 3)
    assert plain["nonpad_tokens_per_s"] < plain["tokens_per_s"]
    assert plain["flops_per_s"] == pytest.approx(1e9 / 0.2)
    assert (plain["peak_bytes"], plain["activation_peak_bytes"]) == (1000, 7)
    assert seco["activation_peak_bytes"] is None
    # Medians of the repeats: 0.1, 0.1, 0.2 against 0.2 each.
    assert seco["against"]["plain"] == {"median": 0.5, "low": 0.5, "high": 1.0}
    assert [row["fidelity"] for row in (plain, seco, gc)] == ["exact"] * 3
    assert [row["baseline"] for row in (plain, seco, gc)] == [False, False, True]
    for row in result["rows"]:
        assert row.keys() == {*bench_fields()}
        assert [row[key] for key in ("mfu", "joules_per_token", "energy_source", "max_length")] == [None] * 4


def bench_fields() -> tuple[str, ...]:
    from launch.bench_result import FIELDS

    return FIELDS


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        ({"status": "oom", "why": "no more"}, "oom"),
        ({"status": "failed", "why": "ValueError: x"}, "failed"),
        ({"status": "refused", "why": "not this model"}, "refused"),
    ],
)
def test_what_does_not_work_is_a_row_and_the_others_go_on(
    answer: dict[str, Any], status: str, made: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Measured(monkeypatch, seco=answer)
    rows = compare(made, options())["rows"]
    assert [row["status"] for row in rows] == ["ok", status, "ok"]
    assert rows[1]["why"] == answer["why"]
    assert [task.side for task in measured.tasks].count("seco") == 1


def test_what_a_strategy_refuses_is_not_tried(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = Measured(monkeypatch)
    rows = compare(made.model_copy(update={"compile": True}), options("plain,streambp"))["rows"]
    assert [row["status"] for row in rows] == ["ok", "refused"]
    assert "compile=true" in rows[1]["why"]
    assert {task.side for task in measured.tasks} == {"plain"}


def test_an_unknown_strategy_is_a_mistake(made: Recipe) -> None:
    with pytest.raises(UserError, match=r"strategy.name='sreambp': choose .*did you mean streambp"):
        compare(made, options("plain,sreambp"))
    assert not Path(f"{made.output_dir}-bench").exists()


def test_a_stopped_one_keeps_its_rows_and_goes_on_without_repeating(
    made: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Measured(monkeypatch)

    def stop(task: Task) -> None:
        if len(first.tasks) == 4:
            os.kill(os.getpid(), signal.SIGINT)

    first.before = stop
    with pytest.raises(Interrupted, match="--resume goes on"):
        compare(made, options())
    kept = json.loads(Path(f"{made.output_dir}-bench", "bench.json").read_text())
    assert kept["status"] == "partial"
    assert [row["steps_timed"] for row in kept["rows"]] == [2, 4, 2]
    with Path(f"{made.output_dir}-bench", "bench.jsonl").open("a") as file:
        file.write('{"task": "time plain')
    second = Measured(monkeypatch)
    result = compare(made, options(), resume=True)
    assert result["status"] == "complete"
    assert [row["steps_timed"] for row in result["rows"]] == [6, 6, 6]
    everything = list(bench.Run(made, options(), Path(), None, {}).tasks())  # type: ignore[arg-type]
    assert first.tasks + second.tasks == everything


def test_a_comparison_is_never_written_over(made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    Measured(monkeypatch)
    for _ in range(3):
        compare(made, options("plain"))
    first = f"{made.output_dir}-bench"
    assert all(Path(folder, "bench.json").exists() for folder in (first, f"{first}-2", f"{first}-3"))
    assert bench.folder_of(made, None, resume=True) == Path(f"{first}-3")
    with pytest.raises(UserError, match="is in use"):
        bench.folder_of(made, Path(first), resume=False)
    with pytest.raises(UserError, match="no comparison of this recipe with these options"):
        compare(made, options("plain", steps=3), resume=True)


def test_the_longest_length_is_looked_for_by_trials_that_are_kept(
    made: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grows(task: Task) -> dict[str, Any]:
        if task.kind != "length":
            return timed(0.1) if task.kind == "time" else {"status": "ok"}
        peak = 1000 + 3 * task.length
        return {"status": "ok", "total_peak_bytes": peak} if task.length < 9000 else {"status": "oom", "why": "full"}

    measured = Measured(monkeypatch, plain=grows)
    small, large = (compare(made, options("plain", budget_bytes=budget))["rows"][0] for budget in (10_000, 10**6))
    assert (small["max_length"], small["max_length_budget_bytes"]) == (3000 // 256 * 256, 10_000)
    assert large["max_length"] == 8999 // 256 * 256
    before = len(measured.tasks)
    compare(made, options("plain", budget_bytes=10**6), resume=True)
    assert len(measured.tasks) == before


@pytest.fixture
def job(tmp_path: Path, dataset: str) -> Job:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe(tmp_path / "run", dataset)))
    return Job(str(path), "plain", 64, 64, "time", 2, 1, str(tmp_path / "answer.json"))


@pytest.mark.parametrize("side", ["plain", "streambp:chunk=16", "gc", "gc+ce", "hf"])
def test_steps_are_those_of_training(job: Job, side: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from launch.recipe_file import load_recipe
    from launch.train import train

    found = bench_worker.time_steps(replace(job, side=side), Topology())
    train(load_recipe(job.recipe, ["max_steps=3"]), Topology())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for key in ("tokens", "nonpad_tokens", "loss_tokens"):
        assert found[key] == [lines[i + 1][key] - lines[i][key] for i in range(2)]
    assert all(seconds > 0 for seconds in found["step_s"])
    assert found["flops"] > 0
    assert found["peak_bytes"] > 2**20


def test_stretched_batches_have_the_length_asked_for() -> None:
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "position_ids": torch.tensor([[0, 1, 0], [0, 0, 1]]),
        "advantages": torch.tensor([0.5, -0.5]),
    }
    longer = stretched(batch, 7)
    assert longer["input_ids"].tolist() == [[1, 2, 3, 1, 2, 3, 1], [4, 5, 6, 4, 5, 6, 4]]
    assert longer["position_ids"].tolist() == [list(range(7))] * 2
    assert longer["advantages"] is batch["advantages"]
    assert stretched(batch, 2)["input_ids"].tolist() == [[1, 2], [4, 5]]


def test_failures_are_told_apart() -> None:
    assert failure(torch.OutOfMemoryError("CUDA out of memory"))["status"] == "oom"
    assert failure(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))["status"] == "oom"
    assert failure(UserError("no"))["status"] == "refused"
    assert failure(ValueError("x")) == {"status": "failed", "why": "ValueError: x"}


def command(tmp_path: Path, *words: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "recipe.yaml"
    rows = write_rows(tmp_path / "rows.jsonl", answers(14))
    path.write_text(dump_recipe(recipe(tmp_path / "run", rows, **changes)))
    known = os.environ | {"PYTHONPATH": str(ROOT), "EBBTIDE_CACHE": str(tmp_path)}
    called = [sys.executable, "-P", "-m", "launch", "bench", str(path), *words]
    return subprocess.run(called, capture_output=True, text=True, env=known, timeout=500)


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    done = command(tmp_path, "--strategies", "plain", "--repeats", "1", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    folder = tmp_path / "run-bench"
    assert json.loads((folder / "bench.json").read_text()) == result
    (row,) = result["rows"]
    assert (row["strategy"], row["status"], row["world"], row["steps_timed"]) == ("plain", "ok", 1, 1)
    assert row["peak_bytes"] > row["activation_peak_bytes"] > 0
    assert {path.name for path in folder.iterdir()} == {
        "bench.html",
        "bench.json",
        "bench.jsonl",
        "bench.md",
        "recipe.yaml",
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"name": "fsdp2"}, {"name": "zero", "stage": 3}])
def test_the_command_measures_several_ranks(tmp_path: Path, engine: dict[str, Any]) -> None:
    words = ("--strategies", "plain,seco,gc", "--repeats", "1", "--steps", "1", "--json", "--max-length", "100MiB")
    done = command(tmp_path, *words, nproc=2, engine=engine)
    assert done.returncode == 0, done.stderr
    for row in json.loads(done.stdout)["rows"]:
        assert (row["status"], row["world"]) == ("ok", 2)
        assert row["max_length"] >= 256
