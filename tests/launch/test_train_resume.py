"""A run that was killed or stopped goes on as if nothing had happened: real processes, really killed."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from train_cases import ENGINES, contents, exact, lines, recipe, run, trained

import strategies

STEPS, SAVED, KILLED = 9, 4, 6
MODELS: dict[str, dict[str, Any]] = {
    "full": {"config_overrides": {"attention_dropout": 0.2}},
    "lora": {"lora_r": 4, "lora_dropout": 0.2},
    "bf16": {"bf16": True, "lora_r": 4, "lora_dropout": 0.2},
    "4bit": {"optimizer": "adamw4bit", "config_overrides": {"hidden_size": 128, "intermediate_size": 200}},
}
CASES = [(engine, world, "full") for engine in ENGINES for world in (1, 2)]
CASES += [(engine, 2, "lora") for engine in ("ddp", "fsdp2", "zero2", "zero3")]
CASES += [(engine, 2, "bf16") for engine in ("fsdp2", "zero1")]
CASES += [("ddp", 1, "4bit"), ("ddp", 2, "4bit"), ("fsdp2", 2, "4bit")]
FAST = {("ddp", 1, "full"), ("ddp", 2, "full"), ("zero2", 2, "full"), ("zero3", 2, "full"), ("fsdp2", 2, "lora")}
FAST |= {("zero1", 2, "bf16"), ("fsdp2", 2, "4bit")}


def final(folder: Path) -> dict[str, bytes]:
    """The files of `final/`; an adapter names the folder of its model."""
    place = str(folder).encode()
    return {name: data.replace(place, b"RUN") for name, data in contents(folder / "final").items()}


def assert_same_run(found: Path, expected: Path) -> None:
    assert exact(found) == exact(expected)
    assert lines(found, "samples") == lines(expected, "samples")
    assert final(found) == final(expected)


@pytest.mark.parametrize(
    ("engine", "world", "model"),
    [pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow]) for case in CASES],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, dataset: str, engine: str, world: int, model: str) -> None:
    common = {"engine": ENGINES[engine], "max_steps": STEPS, "save_steps": SAVED, **MODELS[model]}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), world)
    assert run(cut, world, ("kill_at", KILLED))[0].code == -signal.SIGKILL
    assert lines(tmp_path / "cut", "samples")[-1]["step"] == KILLED
    assert not (tmp_path / "cut" / "final").exists()
    trained(cut, world)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    ids = [number for line in lines(tmp_path / "cut", "samples") for number in line["ids"]]
    assert len(ids) == len(set(ids)) == 4 * STEPS
    assert set(Counter(number % 14 for number in ids[:28]).values()) == {2}


STRATEGIES: dict[str, Any] = {
    "plain": {"name": "plain"},
    "recompute": {"name": "recompute"},
    "streambp": {"name": "streambp", "chunk": 16},
    "seco": {"name": "seco", "chunk": 16},
    "spaco": {"name": "spaco", "chunk": 16, "p": 0.5},
    "spaco_published": {"name": "spaco_published", "chunk": 16, "share": 0.5},
    "approx_bp": {"name": "approx_bp"},
    "few_bit": {"name": "few_bit"},
    "int4": {"name": "int4"},
    "fp4": {"name": "fp4"},
    "twobp": {"name": "twobp"},
}


def test_every_strategy_is_among_those_that_go_on() -> None:
    assert set(STRATEGIES) == set(strategies.names())


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_on_bit_for_bit_from_within_a_step(
    tmp_path: Path, dataset: str, name: str, world: int
) -> None:
    """With dropout, killed while gradients are accumulated, over the edge of an epoch."""
    if name == "twobp" and world == 1:
        pytest.skip("a pipeline has two stages at least")
    common = {"strategy": STRATEGIES[name], "max_steps": STEPS, "save_steps": SAVED, **MODELS["full"]}
    if name == "twobp":
        common["gradient_accumulation_steps"] = 4
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    trained(recipe(whole, dataset, **common), world)
    assert run(recipe(cut, dataset, **common), world, ("kill_within", KILLED))[0].code == -signal.SIGKILL
    assert lines(cut, "samples")[-1]["step"] == KILLED
    trained(recipe(cut, dataset, **common), world)
    assert_same_run(cut, whole)
    found, wanted = (checkpoint(folder) for folder in (cut, whole))
    assert found == wanted


def checkpoint(run: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The last one: what it says of itself, and its bytes, but for when and under which number it was written."""
    files = contents(run / "checkpoints" / f"step-{STEPS}" / "engine")
    says = manifest(run, STEPS)
    del files[".metadata"], says["files"]["engine/.metadata"], says["time"]
    return says, files


SWITCHED: dict[str, dict[str, Any]] = {
    "learned": {"name": "int4", "preset": "paper", "target_share": 0.5},
    "forward": {"name": "fp4", "preset": "nvfp4", "target_share": 0.5, "target_forward": True},
}


def manifest(run: Path, step: int) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((run / "checkpoints" / f"step-{step}" / "manifest.json").read_text())
    return kept


@pytest.mark.parametrize(
    ("engine", "world", "kind"),
    [
        ("ddp", 1, "forward"),
        ("fsdp2", 2, "learned"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("ddp", 2, "learned"), ("zero2", 2, "forward"))),
    ],
)
def test_a_run_killed_before_and_after_its_target_precision_goes_on_bit_for_bit(
    tmp_path: Path, dataset: str, engine: str, world: int, kind: str
) -> None:
    common = {"engine": ENGINES[engine], "max_steps": 6, "save_steps": 1, "strategy": SWITCHED[kind]}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), world)
    for step, since in ((2, None), (4, 3)):
        assert run(cut, world, ("kill_at", step))[0].code == -signal.SIGKILL
        assert since == manifest(tmp_path / "cut", step)["step"][SWITCHED[kind]["name"]]["since"]
    trained(cut, world)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    kept = manifest(tmp_path / "cut", 6)["step"]
    assert kept == manifest(tmp_path / "whole", 6)["step"]
    assert bool(kept[SWITCHED[kind]["name"]].get("sizes")) == (kind == "learned")


def test_a_longer_run_stays_in_its_target_precision(tmp_path: Path, dataset: str) -> None:
    """A run of eight steps would have switched later."""
    common = {"lr_scheduler_type": "constant", "save_steps": 1, "strategy": {"name": "int4", "target_share": 0.5}}
    for steps in (4, 8):
        trained(recipe(tmp_path / "longer", dataset, max_steps=steps, **common))
    trained(recipe(tmp_path / "whole", dataset, max_steps=8, **common))
    trained(recipe(tmp_path / "short", dataset, max_steps=4, **common))
    assert manifest(tmp_path / "longer", 8)["step"]["int4"]["since"] == 2
    assert manifest(tmp_path / "whole", 8)["step"]["int4"]["since"] == 4
    losses = {name: [line["loss"] for line in lines(tmp_path / name)] for name in ("longer", "whole", "short")}
    assert losses["longer"][:4] == losses["short"]
    assert losses["longer"][2] != losses["whole"][2]


def test_dropout_was_on_in_these_runs(tmp_path: Path, dataset: str) -> None:
    """Otherwise the tests above would not see randomness that is not restored."""
    for name, changes in list(MODELS.items())[:2]:
        off = {"config_overrides": {}} if name == "full" else {"lora_r": 4}
        trained(recipe(tmp_path / name, dataset, max_steps=2, **changes))
        trained(recipe(tmp_path / f"{name} off", dataset, max_steps=2, **off))
        assert lines(tmp_path / name)[1]["loss"] != lines(tmp_path / f"{name} off")[1]["loss"]
        assert lines(tmp_path / name)[0]["grad_norm"] != lines(tmp_path / f"{name} off")[0]["grad_norm"]


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("fsdp2", 2), ("zero2", 2)])
def test_a_kill_while_saving_falls_back_to_the_checkpoint_before(
    tmp_path: Path, dataset: str, engine: str, world: int
) -> None:
    common = {"engine": ENGINES[engine], "max_steps": STEPS, "save_steps": SAVED}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), world)
    assert run(cut, world, ("kill_while_saving", 2 * SAVED))[0].code == -signal.SIGKILL
    saved = tmp_path / "cut" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == [f".step-{2 * SAVED}.draft", f"step-{SAVED}"]
    # One without a manifest is not whole, and one that somebody copied is no checkpoint of this run.
    (saved / "step-6" / "engine").mkdir(parents=True)
    (saved / "step-7-backup").mkdir()
    (saved / "step-7-backup" / "manifest.json").write_text("{}")
    trained(cut, world)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert (saved / "step-9" / "manifest.json").exists()
    assert (saved / "damaged" / "step-6").exists()
    assert not list(saved.glob(".*"))


@pytest.mark.parametrize("step", [0, 4, 5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_to_one_rank_saves_and_the_run_goes_on(
    tmp_path: Path, dataset: str, step: int, number: int
) -> None:
    """At step 4 there is a checkpoint already, which is not written again."""
    common = {"max_steps": STEPS, "save_steps": SAVED, **MODELS["full"]}
    cut = recipe(tmp_path / "cut", dataset, **common)
    trained(recipe(tmp_path / "whole", dataset, **common), 2)
    ends = run(cut, 2, ("stop_at", step, 1, number))
    assert [end.error for end in ends] == [
        f"Interrupted: stopped after step {step}; the same command goes on from there"
    ] * 2
    saved = [path.name for path in (tmp_path / "cut").glob("checkpoints/*")]
    assert saved == {0: [], 4: ["step-4"]}.get(step, saved)
    assert step == 0 or f"step-{step}" in saved
    trained(cut, 2)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


AT_ANOTHER: dict[str, dict[str, Any]] = {
    "full": {"weight_decay": 0.1, "learning_rate": 1e-3},
    "lora": {"weight_decay": 0.1, "learning_rate": 1e-3, "lora_r": 4},
    "bf16": {"bf16": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    "4bit": {"learning_rate": 1e-3, **MODELS["4bit"]},
}
CROSSED = [(engine, model) for engine in ("ddp", "fsdp2", "zero1", "zero3") for model in AT_ANOTHER]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, dataset: str) -> dict[str, Path]:
    """One process without engine or interruption: what every other must be, to rounding."""
    folders = {name: tmp_path_factory.mktemp(name) for name in AT_ANOTHER}
    for name, folder in folders.items():
        trained(recipe(folder, dataset, max_steps=STEPS, **AT_ANOTHER[name]))
    return folders


@pytest.mark.parametrize(
    ("before", "after", "engine", "model"),
    [
        pytest.param(before, after, engine, model, marks=pytest.mark.slow if after == 2 and model != "full" else ())
        for before, after in ((2, 1), (1, 2))
        for engine, model in CROSSED
        if (engine, model) not in (("zero1", "4bit"), ("zero3", "4bit"))
    ],
)
def test_a_run_goes_on_at_another_number_of_ranks_to_rounding(
    tmp_path: Path,
    dataset: str,
    uninterrupted: dict[str, Path],
    engine: str,
    before: int,
    after: int,
    model: str,
) -> None:
    common = {"engine": ENGINES[engine], "max_steps": STEPS, "save_steps": SAVED, **AT_ANOTHER[model]}
    cut = recipe(tmp_path, dataset, **common)
    run(cut, before, ("kill_at", KILLED))
    kept = exact(tmp_path)[:SAVED]
    trained(cut, after)
    assert exact(tmp_path)[:SAVED] == kept
    expected = lines(uninterrupted[model])
    for found, wanted in zip(lines(tmp_path), expected, strict=True):
        assert found["loss_tokens"] == wanted["loss_tokens"]
        # In bf16 a gradient that is summed in another order moves a weight to its neighbour.
        assert found["loss"] == pytest.approx(wanted["loss"], rel=5e-3 if model == "bf16" else 1e-5)
        if model != "bf16":
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
    assert lines(tmp_path, "samples") == lines(uninterrupted[model], "samples")
    # Weights or an optimizer's state that were lost on the way would show.
    assert abs(expected[-1]["loss"] - expected[SAVED]["loss"]) > (0.05 if model == "bf16" else 1e-3)


def test_a_larger_max_steps_goes_on_with_a_finished_run(tmp_path: Path, dataset: str) -> None:
    common = {"lr_scheduler_type": "constant", **MODELS["full"]}
    trained(recipe(tmp_path / "whole", dataset, max_steps=8, **common))
    trained(recipe(tmp_path / "longer", dataset, max_steps=5, **common))
    trained(recipe(tmp_path / "longer", dataset, max_steps=8, **common))
    assert_same_run(tmp_path / "longer", tmp_path / "whole")


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones_behind(tmp_path: Path, dataset: str) -> None:
    common = {"max_steps": 8, "save_steps": 2, "save_total_limit": 3, **MODELS["full"]}
    made = recipe(tmp_path / "run", dataset, **common)
    saved = tmp_path / "run" / "checkpoints"
    trained(made)
    whole = exact(tmp_path / "run")
    assert sorted(path.name for path in saved.iterdir()) == ["step-4", "step-6", "step-8"]
    back = made.model_copy(update={"resume_from_checkpoint": str(saved / "step-4")})
    run(back, 1, ("kill_at", 7))
    assert sorted(path.name for path in saved.iterdir()) == ["step-4", "step-6"]
    trained(made)
    assert exact(tmp_path / "run") == whole


def test_more_epochs_after_a_partial_last_step_are_refused(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path / "run", dataset, max_steps=None, num_train_epochs=1.0)
    trained(made)
    before = contents(tmp_path / "run")
    (end,) = run(made.model_copy(update={"num_train_epochs": 2.0}))
    assert end.error.startswith("UserError: step 4 of ")
    assert "14 rows" in end.error
    assert contents(tmp_path / "run") == before
    even = recipe(tmp_path / "even", dataset, max_steps=None, num_train_epochs=2.0)
    trained(even)
    trained(even.model_copy(update={"num_train_epochs": 3.0}))
    assert len(lines(tmp_path / "even")) == 11
