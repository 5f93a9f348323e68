"""`ebbtide plan` of a pipeline: what it says that stages hold against stages that run, its advice, what it refuses."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import strategies
from distrib.pipeline.schedules import NAMES, make
from distrib.pipeline.simulate import Costs, memory, simulate
from distrib.topology import Topology
from distrib.tracker import Tracker
from launch import cli
from launch.device import Device
from launch.models import load_config
from launch.plan_pipeline import PipelinePlanner, moments, recommend
from launch.plan_show import write_fit
from launch.recipe import Recipe
from launch.recipe_file import load_recipe
from launch.stages import Held, Places, Seconds, perform, sent
from strategies.twobp import TwoBP

GIB = 2**30
SHAPE = {"num_hidden_layers": 5, "hidden_size": 64, "intermediate_size": 96}


def planner(world: int = 2, here: bool = True, memory_bytes: int = 8 * GIB, **changes: Any) -> PipelinePlanner:
    recipe = Recipe(**{"config_overrides": SHAPE, "max_length": 128, "gradient_accumulation_steps": 4} | changes)
    return PipelinePlanner(recipe, Device("cpu", memory_bytes, world, None, here), [TwoBP()])


@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": True, "config_overrides": SHAPE | {"tie_word_embeddings": False}}, {"lora_r": 4, "packing": True}],
    ids=["fp32", "bf16 untied", "lora packed"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_what_a_real_run_of_its_operations_does(rank: int, changes: dict[str, Any]) -> None:
    found = planner(**changes)
    parts = found.partition(2, 1)
    schedule = make("1f1b+2bp", 2, 4)
    held = found.held(parts, 1)
    static = {"weights": 0, "gradients": 0, "optimizer": 0, "update": 0}
    mail = 2 * found.border_bytes(1)
    predicted = sum(found.peak(rank, schedule, held, static, 1).values()) - mail

    part = found.workshop.ready(parts, rank, found.border, 1, "cpu")
    part.begin(found.workshop.run(found.border, 1, 128, 4))
    tracker = Tracker(fake=False)
    with tracker:
        for tensor in (*part.model.parameters(), *part.model.buffers()):
            tracker.count(tensor)
        # What lasts, such as gradients, is there by then.
        for kind in "FIW":
            perform(part, kind, 0, sent(part, kind, 0))
        gc.collect()
        tracker.restart()
        for op in schedule.ranks[rank]:
            perform(part, op.kind, op.micro_batch, sent(part, op.kind, op.micro_batch))
    assert predicted > 2**19
    assert predicted == pytest.approx(tracker.peak_bytes(), rel=0.03)


def test_moments_are_those_of_the_simulation() -> None:
    schedule, held = make("v", 3, 7), Held(5, 3, dict.fromkeys("FBIW", 0), 0)
    costs = replace(Costs.equal(6), held=5, stashed=3)
    for rank, spans in enumerate(simulate(schedule, costs).ranks):
        most = max(value for _, value in memory(spans, costs))
        mine = [(activations, waiting) for _, activations, waiting in moments(schedule.ranks[rank], [held] * 6)]
        assert max(map(sum, mine)) == most
        assert min(min(one) for one in mine) == 0


def test_layers_are_balanced_by_what_they_take() -> None:
    found = planner()
    one, dear = Seconds(2, 2, 2), Seconds(8, 4, 2)
    found._places[1] = Places((one, one, one, one, dear), Seconds(1, 1, 1), 1)
    parts = found.partition(2, 1)
    assert parts.bounds == (0, 4, 5)
    costs = found.costs(parts, 1)
    assert costs is not None
    # A stage takes its own overhead once.
    assert (costs.forward, costs.input, costs.weight) == ((5, 8), (5, 4), (5, 2))
    found.device = replace(found.device, link=1e3)
    slower = found.costs(parts, 1)
    assert slower is not None
    assert slower.transfer == 128 * 64 * 4 / 1e3


def test_what_both_ends_share_counts_once_on_one_rank() -> None:
    found, free = planner(world=2), [Held(0, 0, {}, 0)] * 4
    whole = sum(p.nbytes for p in found.model.parameters())
    shared = found.model.get_input_embeddings().weight.nbytes  # type: ignore[operator, union-attr]
    apart = found.static(found.partition(2, 1), free, make("h1", 2, 1).homes)
    assert sum(one["weights"] for one in apart) == whole + shared
    together = found.static(found.partition(4, 1), free, make("v", 2, 1).homes)
    assert sum(one["weights"] for one in together) == whole


def row(name: str, tokens_per_s: float, peak_bytes: int, status: str = "fits") -> dict[str, Any]:
    found = {"schedule": name, "seconds": 1 / tokens_per_s, "tokens_per_s": tokens_per_s, "peak_bytes": peak_bytes}
    return found | {"status": status}


def test_advice_is_the_fastest_that_fits_and_of_equals_the_smallest() -> None:
    rows = [row("v", 200, 9, "too large"), row("1f1b+2bp", 100, 8), row("h1", 99.5, 4), row("1f1b", 80, 4)]
    best, why = recommend(rows)
    assert best is not None
    assert (best["schedule"], why) == ("h1", "the fastest of 3 that fit, and of 2 as fast the one that holds least")
    assert recommend(rows[:1])[0] is None


def test_less_memory_than_a_schedule_needs_is_said() -> None:
    found = planner(here=False)
    room = found.row("h1", 4, 1)["peak_bytes"] + 2**29
    for spare, status in ((0, "fits"), (-1, "too large")):
        found.device = replace(found.device, memory_bytes=room + spare)
        assert found.row("h1", 4, 1)["status"] == status


def recipe_file(folder: Path, more: str = "") -> str:
    path = folder / "mine.yaml"
    path.write_text(
        "model_name_or_path: tiny\nmax_length: 32\ngradient_accumulation_steps: 6\n"
        "config_overrides: {num_hidden_layers: 5, hidden_size: 32, intermediate_size: 48}\n" + more
    )
    return str(path)


@pytest.mark.slow
def test_the_fitted_recipe_trains_what_was_advised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = tmp_path / "fitted.yaml"
    more = "strategy: [{name: twobp, stages: 2}, {name: recompute, policy: full}]\nnproc: 2\n"
    words = ["per_device_train_batch_size=2", "gradient_accumulation_steps=3", "--json", "--fit", str(fit)]
    assert cli.main(["plan", recipe_file(tmp_path, more), *words]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [(one["schedule"], one["micro_batches"], one["rows"]) for one in said["rows"]] == [
        (name, 6 // rows, rows) for rows in (2, 1) for name in NAMES
    ]
    for one in said["rows"]:
        assert one["status"] == "fits"
        assert sum(one["layers"]) == 5
        assert 0 <= one["bubble"] < 1
        assert one["peak_bytes"] == max(sum(rank.values()) for rank in one["ranks"])
    assert {one["micro_batches"] for one in said["more_micro_batches"]} == {4, 8}
    advice, found = said["recommendation"], load_recipe(str(fit))
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (
        advice["rows"],
        advice["micro_batches"],
    )
    first, second = strategies.build([section.model_dump() for section in found.strategy])
    assert isinstance(first, TwoBP)
    assert first.layers == advice["layers"]
    assert type(second) is strategies.get("recompute")
    strategies.check([first, second], load_config(found), Topology(world=2, stages=2))


def test_a_schedule_without_a_name_is_written_beside_the_recipe(tmp_path: Path) -> None:
    recipe, schedule = load_recipe(recipe_file(tmp_path)), make("greedy", 2, 6)
    section = {"name": "twobp", "stages": 2, "schedule": "greedy", "layers": [2, 3]}
    changes = {"strategy": [section], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    write_fit(tmp_path / "f.yaml", recipe, {"recommendation": {"recipe": changes, "text": schedule.text()}})
    (found,) = strategies.build([one.model_dump() for one in load_recipe(str(tmp_path / "f.yaml")).strategy])
    assert isinstance(found, TwoBP)
    assert found.source(2).made(6).ranks == schedule.ranks


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", recipe_file(tmp_path), "--strategies", "twobp", "device.count=2", "device.link=10GB"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "a pipeline of 2 x cpu" in said
    assert "at 10 GB/s" in said
    assert "timed here, ms of forward, p1, p2: first layer with the embedding" in said
    assert "recommended: " in said.splitlines()[-1]


def test_a_device_elsewhere_has_memory_and_no_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", recipe_file(tmp_path), "--strategies", "twobp", "device.count=2", "device.memory=2GiB", "--json"]
    assert cli.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    rows = {one["schedule"]: one for one in said["rows"]}
    assert rows["h1"]["peak_bytes"] > 0
    assert rows["h1"]["seconds"] is None
    assert rows["h1"]["speedup_1f1b"] is None
    assert rows["greedy"]["status"] == "unknown"
    assert said["pipeline"]["costs"][0]["layers"] is None
    assert said["recommendation"]["schedule"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--strategies", "twobp"], "twobp on 1 device is no pipeline: give device.count=4"),
        (["--strategies", "twobp:stages=3", "device.count=4"], "strategy.stages=3 with 4 ranks"),
        (["--strategies", "twobp", "device.count=8"], "a pipeline of 8 stages for 5 layers"),
        (["--strategies", "twobp", "device.count=2", "--engines", "ddp,fsdp2"], "planned under one engine"),
        (["--strategies", "twobp", "device.count=2", "engine=zero"], "choose ddp or fsdp2"),
        (["--strategies", "twobp", "device.count=2", "objective=dpo"], "a plan counts sft only"),
        (["--strategies", "twobp", "device.count=2", "gradient_accumulation_steps=1000000"], "simulates at most"),
        (["--strategies", "twobp", "device.count=2", "device.link=fast"], "device.link='fast': a number above 0"),
    ],
)
def test_mistakes_are_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", recipe_file(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_pipeline_among_others_says_where_its_plan_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", recipe_file(tmp_path), "--strategies", "plain,twobp", "device.count=2", "device.memory=2GiB"]
    assert cli.main([*words, "--json"]) == 0
    plain, pipeline = json.loads(capsys.readouterr().out)["rows"]
    assert plain["status"] == "fits"
    assert (pipeline["status"], pipeline["why"]) == ("unknown", "a pipeline is planned by itself: --strategies twobp")
