"""The benchmarks' own instruments: what they count, and what they look for."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoint
import fourbit_linear
import fourbit_loss
import pipeline
import pytest
from rows import in_fresh_process
from sides import Case

from distrib.pipeline.schedules import make
from distrib.pipeline.simulate import simulate

MIB = 2**20


@pytest.mark.slow
@pytest.mark.parametrize(("side", "runs"), [("gc+ce", 1), ("streambp:chunk=512:offload=true", 3)])
def test_tracker_agrees_with_the_resident_memory_of_a_real_run(side: str, runs: int) -> None:
    case = Case(side, 4096, model="256x4", vocabulary=4096)
    # The kernel's count is never less than what is live, and now and then more: pages of files go when it likes.
    real = min(in_fresh_process(case)["peak_bytes"] for _ in range(runs))
    # Far above what pages of code and small blocks come to.
    assert real > 25 * MIB
    assert in_fresh_process(replace(case, fake=True))["peak_bytes"] == pytest.approx(real, rel=0.1)


@pytest.mark.slow
def test_schedules_hold_in_a_run_what_they_hold_on_paper() -> None:
    sides = f"{pipeline.SIDES},v{pipeline.BY_TORCH}"
    options = ["--ranks", "2", "--micro-batches", "4", "--repeats", "2", "--cost-ms", "2", "--border-kib", "4"]
    done = subprocess.run(
        [sys.executable, pipeline.__file__, *options, "--sides", sides], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(done.stdout)["tables"]
    assert [row["side"] for row in table["rows"]] == sides.split(",")
    for row in table["rows"]:
        name = {pipeline.BASE: "1f1b", pipeline.ZB1P: "h1"}.get(
            row["side"], row["side"].removesuffix(pipeline.BY_TORCH)
        )
        schedule = make(name, 2, 4)
        on_paper = simulate(schedule, pipeline.paper(schedule.stages, 1.0, 0.0))
        share = 2 / schedule.stages
        assert row["held"] == pytest.approx(share * max(on_paper.peak_bytes)), row["side"]
        assert row["torch_1f1b"]["median"] > 0


@pytest.mark.slow
def test_real_stages_are_measured_in_both_runtimes() -> None:
    sides = [pipeline.BASE, "1f1b", "h1"]
    options = ["--real", "--model", "128x4", "--length", "64", "--repeats", "2", "--sides", ",".join(sides)]
    done = subprocess.run([sys.executable, pipeline.__file__, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(done.stdout)["tables"]
    rows = {row["side"]: row for row in table["rows"]}
    assert list(rows) == sides
    assert {stage: set(kinds) for stage, kinds in table["took"].items()} == {"0": set("FB"), "1": set("FBIW")}
    assert rows[pipeline.BASE]["bound"] == rows["1f1b"]["bound"] == 1
    # A gradient of weights less before what stage 0 waits for, whatever it costs.
    assert rows["h1"]["bound"] > 1
    # Two micro-batches of stage 0.
    assert [row["held"] for row in rows.values()] == pytest.approx([rows["1f1b"]["held"]] * 3, rel=0.05)


@pytest.mark.slow
def test_losses_are_those_of_rounded_forwards_and_runs_are_kept(tmp_path: Path) -> None:
    sides, output = ["bf16", "fp4 paper", "int4 hq_bs"], tmp_path / "runs"
    options = ["--quick", "--sides", ",".join(sides), "--output", str(output)]
    done = subprocess.run([sys.executable, fourbit_loss.__file__, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["side"] for row in rows] == sides
    base, target, rounded = rows
    # Of 256 bytes, hardly trained.
    assert 4 < base["trained"]["loss"][0] < 6
    assert base["trained"]["ratio"] == base["exported"]["ratio"] == 1
    # The paper ends in its target precision, which is what is exported.
    assert target["trained"]["loss"] == target["exported"]["loss"]
    assert rounded["trained"]["loss"] != rounded["exported"]["loss"]
    kept = output.read_text()
    lines = [json.loads(line) for line in kept.splitlines()]
    assert len({tuple(line["trained"]) for line in lines}) == 3
    cases = [fourbit_loss.Case(**line["case"]) for line in lines]
    runs = fourbit_loss.finished(cases, output, 1)
    assert fourbit_loss.summary(sides, [runs[replace(cases[0], side=side)] for side in sides]) == rows
    assert output.read_text() == kept


def test_one_linear_is_measured_with_how_its_products_run() -> None:
    done = subprocess.run([sys.executable, fourbit_linear.__file__, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((_, rows),) = json.loads(done.stdout)["sizes"].items()
    few = [row for row in rows if "of" in row["side"]]
    assert [row["side"] for row in few] == [
        *("int4 of fp32", "int4 of bf16", "fp8 of bf16", "nvfp4 of bf16", "mxfp4 of bf16")
    ]
    for row in few:
        assert len(row["products"]) == 3
        assert (row["fp32_over_step_s"] is None) == ("emulated" in row["products"])


@pytest.mark.slow
def test_every_way_to_save_is_measured() -> None:
    done = subprocess.run([sys.executable, checkpoint.__file__, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["side"] for row in result["rows"]] == list(checkpoint.SIDES)
    for row in result["rows"]:
        assert row["held_s"]["median"] > 0
    # Weights and two states, in float32.
    assert result["checkpoint_bytes"] > 12 * 2**10
