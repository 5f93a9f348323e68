"""`ebbtide verify`, and the same check before a run's first step: what is wrong is caught and named, and what is right
passes and leaves no trace."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_cases import ENGINES, answers, contents, exact, groups, preferences, recipe, trained, write_rows
from verify_cases import WRONG, offer

from distrib.errors import Refused, UserError, WrongGradients
from distrib.topology import Topology
from launch.assemble import Parts
from launch.cli import main
from launch.data.rows import Sequence
from launch.data.short import _short
from launch.recipe_file import dump_recipe
from launch.train import train
from launch.verify import gradient_error
from strategies import Fidelity, get
from strategies.core.compare import Differences, Promise, quantile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("rows")
    made = {"sft": answers(14), "dpo": preferences(6), "grpo": groups(6)}
    return {name: write_rows(folder / f"{name}.jsonl", records) for name, records in made.items()}


def asked(folder: Path, rows: dict[str, str], **changes: Any) -> Any:
    kind = changes.get("objective", {"name": "sft"})["name"]
    return recipe(folder / "run", rows[kind], per_device_train_batch_size=2, **changes)


RIGHT: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1e-12),
    "streambp, packed": ({"strategy": {"name": "streambp"}, "packing": True}, 1e-12),
    "seco, lora": ({"strategy": {"name": "seco"}, "lora_r": 4, "lora_dropout": 0.1}, 1e-12),
    "seco, dpo": ({"strategy": {"name": "seco"}, "objective": {"name": "dpo"}}, 1e-12),
    "streambp, grpo": ({"strategy": {"name": "streambp"}, "objective": {"name": "grpo"}}, 1e-12),
    "no rounding of attention": ({"config_overrides": {"attention_dropout": 0.3}}, 1e-12),
    "spaco that takes all": ({"strategy": {"name": "spaco", "p": 1.0}}, 1e-12),
}


@pytest.mark.parametrize("case", RIGHT)
def test_right_ones_pass_in_float64(tmp_path: Path, rows: dict[str, str], case: str) -> None:
    changes, bound = RIGHT[case]
    found = gradient_error(asked(tmp_path, rows, **changes), Topology(), 32)
    assert (found["verdict"], found["dtype"], found["draws"]) == ("exact", "float64", 1)
    assert found["grad_error"] < bound
    assert found["loss"] == pytest.approx(found["loss_reference"], rel=1e-9, abs=1e-9)
    assert found["worst"][0]["error"] < bound
    assert found["without_gradient"] == 0
    chunked = [key for key in found["settings"] if key.endswith(".chunk")]
    assert bool(chunked) == ("strategy" in changes)


@pytest.mark.parametrize("name", ["spaco", "spaco_published"])
def test_estimates_are_held_to_what_they_promise(tmp_path: Path, rows: dict[str, str], name: str) -> None:
    found = gradient_error(asked(tmp_path, rows, strategy={"name": name}), Topology(), 32)
    assert found["verdict"] == {"spaco": "unbiased", "spaco_published": "within bound"}[name]
    assert found["exact_error"] < 1e-12
    assert found["draws"] > 1
    assert found["deviation"] > 0.05


PRESETS: dict[str, dict[str, Any]] = {
    "hq_bs": {"name": "int4"},
    "learned": {"name": "int4", "preset": "paper"},
    "paper": {"name": "fp4"},
    "nvfp4": {"name": "fp4", "preset": "nvfp4"},
    "mxfp4": {"name": "fp4", "preset": "mxfp4"},
}
LOWBIT = [(preset, {}) for preset in PRESETS] + [("hq_bs", {"packing": True}), ("learned", {"lora_r": 4})]
SLOW_LOWBIT = [
    (preset, changes)
    for preset in PRESETS
    for changes in ({"packing": True}, {"lora_r": 4})
    if (preset, changes) not in LOWBIT
]


@pytest.mark.parametrize(
    ("preset", "changes"), [*LOWBIT, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_LOWBIT)]
)
def test_linears_in_few_bits_are_held_to_their_own_forward(
    tmp_path: Path, rows: dict[str, str], preset: str, changes: dict[str, Any]
) -> None:
    found = gradient_error(asked(tmp_path, rows, strategy=PRESETS[preset], **changes), Topology(), 16)
    assert (found["verdict"], found["dtype"], found["draws"]) == ("unbiased", "float64", 32)
    assert found["loss"] == pytest.approx(found["loss_reference"], rel=1e-6)
    assert found["deviation"] > 0.003


@pytest.mark.parametrize(("engine", "preset"), [("fsdp2", "hq_bs"), ("zero2", "nvfp4")])
def test_few_bits_in_half_precision_pass_before_a_run(
    tmp_path: Path, rows: dict[str, str], engine: str, preset: str
) -> None:
    changes = {"bf16": True, "verify": True, "max_steps": 1}
    trained(asked(tmp_path, rows, engine=ENGINES[engine], strategy=PRESETS[preset], **changes), 2)


# What shows in so few draws: the others' gradients vary more.
@pytest.mark.parametrize(("preset", "factor"), [("hq_bs", 1.05), ("paper", 1.05), ("nvfp4", 2.0)])
def test_a_scale_that_is_off_in_few_bits_is_caught(
    tmp_path: Path, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch, preset: str, factor: float
) -> None:
    from strategies.lowbit import linear

    right = linear.gradient_of_weight
    monkeypatch.setattr(linear, "gradient_of_weight", lambda *given: factor * right(*given))
    found = gradient_error(asked(tmp_path, rows, strategy=PRESETS[preset]), Topology(), 16)
    assert found["verdict"] == "wrong"
    assert found["worst"][0]["name"].endswith("proj.weight")


@pytest.mark.parametrize(
    ("engine", "changes", "dtype"),
    [
        ("fsdp2", {"strategy": {"name": "seco"}}, "float64"),
        ("zero3", {"strategy": {"name": "streambp"}}, "float32"),
        ("zero2", {"bf16": True, "lora_r": 4, "strategy": {"name": "streambp"}}, "bfloat16"),
    ],
)
def test_two_ranks(tmp_path: Path, rows: dict[str, str], engine: str, changes: dict[str, Any], dtype: str) -> None:
    found = trained(asked(tmp_path, rows, engine=ENGINES[engine], **changes), 2, do="verify")
    assert (found["verdict"], found["dtype"], found["world"]) == ("exact", dtype, 2)
    assert found["rows"] == 8
    assert 0 < found["grad_error"] < found["tolerance"] / 3


@pytest.mark.usefixtures("wrong_ones")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_caught_and_its_parameter_named(
    tmp_path: Path, rows: dict[str, str], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    kind, parameter = WRONG[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(asked(tmp_path, rows, strategy={"name": name})))
    assert main(["verify", str(path), "--json", "--length", "32"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["verdict"] == "wrong"
    assert found["worst"][0]["name"].startswith(parameter)
    line = said.err.splitlines()[-1]
    assert line.startswith(f"ebbtide: strategy {kind.__name__} gives a wrong gradient: {parameter}")
    assert "tolerance 1e-06 in float64" in line


@pytest.mark.usefixtures("wrong_ones")
@pytest.mark.parametrize("name", ["scaled_weight", "scaled_in_training", "lost_chunk", "biased"])
def test_a_wrong_one_does_not_start_training(tmp_path: Path, rows: dict[str, str], name: str) -> None:
    kind, parameter = WRONG[name]
    changes = {"strategy": {"name": name}, "max_steps": 1}
    with pytest.raises(WrongGradients, match=f"strategy {kind.__name__} gives a wrong gradient: {parameter}") as caught:
        train(asked(tmp_path, rows, verify=True, **changes), Topology())
    assert "verify=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("wrong_ones")
def test_a_stated_bound_is_held_and_an_unstated_one_refused(tmp_path: Path, rows: dict[str, str]) -> None:
    found = gradient_error(asked(tmp_path, rows, strategy={"name": "within"}), Topology(), 32)
    assert (found["verdict"], found["bound"]) == ("within bound", 0.25)
    assert found["worst"][0]["error"] == pytest.approx(0.2, rel=1e-6)
    with pytest.raises(Refused, match="Unstated is approximate and does not say by how much"):
        train(asked(tmp_path, rows, strategy={"name": "unstated"}, verify=True), Topology())


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_command_ends_with_one_line_and_exit_code_1(tmp_path: Path, rows: dict[str, str], nproc: int) -> None:
    """Of a distribution that brings a wrong strategy."""
    (tmp_path / "wrong.py").write_text("from verify_cases import WrongSign\n")
    info = tmp_path / "wrong-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wrong\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ebbtide.strategies]\nwrong = wrong:WrongSign\n")
    made = asked(tmp_path, rows, nproc=nproc, verify=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(made))
    python_path = ":".join(map(str, (tmp_path, ROOT, ROOT / "tests")))
    words = [sys.executable, "-m", "launch", "train", str(path), "strategy=wrong"]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("data:")]
    assert len(said) == 1, done.stderr
    assert said[0].startswith(
        "ebbtide: strategy WrongSign gives a wrong gradient: model.norm.weight is off by 2 of its norm"
    )


TRACELESS: dict[str, tuple[int, dict[str, Any]]] = {
    "dropout, lora": (
        1,
        {
            "strategy": {"name": "streambp"},
            "lora_r": 4,
            "lora_dropout": 0.2,
            "config_overrides": {"attention_dropout": 0.2},
        },
    ),
    "a stream": (1, {"strategy": {"name": "spaco"}, "streaming": True}),
    "fsdp2": (2, {"engine": ENGINES["fsdp2"]}),
    "zero2": (2, {"engine": ENGINES["zero2"], "bf16": True}),
    "zero3": (2, {"engine": ENGINES["zero3"], "strategy": {"name": "seco"}}),
    "compiled": (1, {"compile": True}),
    "learned scales": (1, {"strategy": {"name": "int4", "preset": "paper"}}),
    "learned scales, zero2": (2, {"strategy": {"name": "int4", "preset": "paper"}, "engine": ENGINES["zero2"]}),
}


@pytest.mark.parametrize(
    "case",
    [
        "dropout, lora",
        "zero2",
        "learned scales",
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("a stream", "fsdp2", "zero3", "compiled", "learned scales, zero2")
        ),
    ],
)
def test_a_run_is_bitwise_the_same_with_and_without(tmp_path: Path, rows: dict[str, str], case: str) -> None:
    """The one that is checked stops in the middle, so that it is checked after its resume as well."""
    world, changes = TRACELESS[case]
    changes = {"lr_scheduler_type": "constant", "global_batch_size": 2 * world, "save_steps": 2, **changes}
    checked = asked(tmp_path / "checked", rows, verify=True, **{**changes, "max_steps": 2})
    trained(checked, world)
    longer = asked(tmp_path / "checked", rows, verify=True, **{**changes, "max_steps": 4})
    found = trained(longer, world, do="train_and_keep")
    wanted = trained(asked(tmp_path / "plain", rows, **{**changes, "max_steps": 4}), world, do="train_and_keep")
    assert exact(tmp_path / "checked" / "run") == exact(tmp_path / "plain" / "run")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    samples = [contents(tmp_path / name / "run")["samples.jsonl"] for name in ("checked", "plain")]
    assert samples[0] == samples[1]


def test_what_is_said_at_the_start(tmp_path: Path, rows: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ebbtide"):
        train(asked(tmp_path, rows, verify=True, max_steps=1), Topology())
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("verify:")]
    assert line.startswith("verify: plain: exact, gradient error ")


def test_the_model_is_random_in_ways_that_are_no_dropout(
    tmp_path: Path, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is one gradient to compare with in evaluation only."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward

    def noisy(self: Any, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x * (1 + 0.1 * torch.randn_like(x)) if self.training else x)

    monkeypatch.setattr(LlamaMLP, "forward", noisy)
    found = gradient_error(asked(tmp_path, rows, strategy={"name": "seco"}), Topology(), 32)
    assert found["verdict"] == "exact"


def test_where_float64_fails_the_recipes_precision_is_taken(
    tmp_path: Path, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Parts.model

    def model(self: Parts, dtype: torch.dtype | None = None, *others: Any) -> Any:
        if dtype is torch.float64:
            raise NotImplementedError("no kernel\nfor Double")
        return made(self, dtype, *others)

    monkeypatch.setattr(Parts, "model", model)
    found = gradient_error(asked(tmp_path, rows, strategy={"name": "seco"}), Topology(), 32)
    assert (found["verdict"], found["dtype"]) == ("exact", "float32")
    assert found["why_not_float64"] == "float64 failed (no kernel for Double)"


def test_a_length_that_is_none() -> None:
    assert main(["verify", "recipes/tiny.yaml", "--length", "1"]) == 2


def test_rows_without_anything_to_learn(tmp_path: Path, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, asked_rows: Any, learn: bool = True) -> Any:
        return batch(self, asked_rows, learn=False)

    from launch.data.batches import Layout

    batch = Layout.batch
    monkeypatch.setattr(Layout, "batch", nothing)
    with pytest.raises(UserError, match="the first rows have no loss tokens"):
        gradient_error(asked(tmp_path, rows), Topology(), 32)


def test_a_look_at_the_first_rows_does_not_move_a_stream(tmp_path: Path, rows: dict[str, str]) -> None:
    data = Parts.of(asked(tmp_path, rows, streaming=True), Topology()).data
    first = data.fetch(0, 4)
    position = data.reader._position
    looked_at = data.first(4)
    assert data.reader._position == position
    for (_, row), other in zip(first, looked_at, strict=True):
        assert row[0].tokens.tolist() == other[0].tokens.tolist()


def sequence(length: int, learned_from: int) -> Sequence:
    return Sequence(np.arange(length, dtype=np.int32), np.arange(length) >= learned_from)


def test_short_rows_keep_something_to_learn() -> None:
    (cut,) = _short((sequence(100, 70),), 8, packed=False)
    assert cut.tokens.tolist() == list(range(66, 74))
    assert cut.learned.tolist() == [False] * 4 + [True] * 4
    (cut,) = _short((sequence(100, 99),), 8, packed=False)
    assert cut.tokens.tolist() == list(range(92, 100))
    assert cut.learned.sum() == 1
    (cut,) = _short((sequence(5, 1),), 8, packed=False)
    assert cut.tokens.tolist() == list(range(5))
    documents = _short((sequence(100, 1), sequence(4, 1), sequence(50, 1)), 12, packed=True)
    assert [len(document.tokens) for document in documents] == [4, 4, 4]
    assert not any(document.learned[0] for document in documents)


def differing(true: float, mean: float, deviation: float, draws: int) -> Differences:
    values = [torch.tensor([x, 0.0], dtype=torch.float64) for x in (true, mean, deviation)]
    return Differences(["a", "zero"], *values, draws)


@pytest.mark.parametrize(
    ("found", "promise", "right"),
    [
        (differing(1, 0.9e-4, 0, 1), Promise(Fidelity.EXACT, 0, 0), True),
        (differing(1, 1.1e-4, 0, 1), Promise(Fidelity.EXACT, 0, 0), False),
        (differing(0, 0, 0, 1), Promise(Fidelity.EXACT, 0, 0), True),
        (differing(0, 1e-30, 0, 1), Promise(Fidelity.EXACT, 0, 0), False),
        (differing(1, float("nan"), 0, 1), Promise(Fidelity.EXACT, 0, 0), False),
        (differing(1, 0.2, 0.5, 32), Promise(Fidelity.UNBIASED, 0, 0), True),
        (differing(1, 0.5, 0.5, 32), Promise(Fidelity.UNBIASED, 0, 0), False),
        # Every draw the same: no noise to hide behind, but for a rare event that says how rare it is.
        (differing(1, 1.0, 0.0, 32), Promise(Fidelity.UNBIASED, 0, 0), False),
        (differing(1, 1.0, 0.0, 32), Promise(Fidelity.UNBIASED, 0, 7.0), True),
        (replace(differing(1, 0.1, 0, 1), rounding=torch.tensor([0.04, 0.0])), Promise(Fidelity.EXACT, 0, 0), True),
        (replace(differing(1, 0.1, 0, 1), rounding=torch.tensor([0.01, 0.0])), Promise(Fidelity.EXACT, 0, 0), False),
        (differing(1, 0.24, 0, 1), Promise(Fidelity.APPROXIMATE, 0.25, 0), True),
        (differing(1, 0.26, 0, 1), Promise(Fidelity.APPROXIMATE, 0.25, 0), False),
    ],
)
def test_the_rule(found: Differences, promise: Promise, right: bool) -> None:
    assert found.right(promise, 1e-4) == right


@pytest.mark.parametrize(("normal", "freedom", "wanted"), [(1.96, 10, 2.228), (2.576, 30, 2.750), (3.2905, 30, 3.646)])
def test_the_quantiles_of_student(normal: float, freedom: int, wanted: float) -> None:
    """From the tables."""
    assert quantile(normal, freedom) == pytest.approx(wanted, rel=5e-3)


def test_strategies_promise_the_least_of_theirs() -> None:
    exact_one, estimate, biased = get("seco")(), get("spaco")(p=0.2), get("spaco_published")()
    assert Promise.of([exact_one]) == Promise(Fidelity.EXACT, 0, 0)
    assert Promise.of([exact_one, estimate]) == Promise(Fidelity.UNBIASED, 0, 2.0)
    assert Promise.of([estimate, biased]) == Promise(Fidelity.APPROXIMATE, 1.0, 2.0)
    assert Promise.of([get("spaco")(p=1.0)]).fidelity is Fidelity.EXACT
