"""Compiled blocks give the gradients of uncompiled ones, on every engine that takes them."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_cases import TRACED, graphs_over_lengths, packed, step_gradients
from engine_cases import padded, ragged_rows, recipe, reference
from ranks import Ranks
from torch import Tensor
from train_cases import answers, exact, run, trained, write_rows
from train_cases import recipe as run_recipe

import strategies
from distrib.contracts import Batch
from distrib.engines import Settings, check
from distrib.errors import Refused, UserError
from distrib.optim import OptimizerSpec
from distrib.topology import Topology
from launch.models import load_config
from strategies import Strategy

# torch's own tracing asks for what torch warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
MODELS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_r": 4}}
DROPOUT = {"config_overrides": {"attention_dropout": 0.3}, "lora_r": 4, "lora_dropout": 0.3}
ROWS = ragged_rows(4)
FP32 = 2e-6


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-9)) for n in expected)


def shares(world: int) -> list[list[Batch]]:
    """All rows once: padded and packed micro-batches, of other lengths on every rank."""
    if world == 1:
        return [[padded(ROWS[:2]), packed(ROWS[2:])]]
    return [[padded(ROWS[:1]), packed(ROWS[2:3])], [padded(ROWS[1:2]), packed(ROWS[3:])]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "model"),
    [
        ("fsdp2", "full"),
        ("ddp", "lora"),
        ("fsdp2", "lora"),
        ("ddp", "full"),
    ],
)
def test_two_ranks_with_traced_blocks_give_the_gradients_of_autograd(two_ranks: Ranks, engine: str, model: str) -> None:
    made_from = recipe(engine=engine, compile=True, **MODELS[model])
    expected = reference(recipe(**MODELS[model]), ROWS, torch.float32)
    for found, graphs in two_ranks("compile_cases:step_gradients", made_from, shares(2), TRACED):
        assert graphs > 0
        assert worst(found, expected) < FP32


@needs_compiler
def test_built_blocks_give_the_gradients_of_autograd() -> None:
    expected = reference(recipe(), ROWS, torch.float32)
    found, graphs = step_gradients(Topology(), recipe(compile=True), [[packed(ROWS)]])
    assert graphs > 0
    assert worst(found, expected) < FP32


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_built_blocks_on_every_engine(two_ranks: Ranks, engine: str, model: str, world: int, bf16: bool) -> None:
    made_from = recipe(engine=engine, bf16=bf16, **MODELS[model])
    compiled = made_from.model_copy(update={"compile": True})
    expected = reference(recipe(**MODELS[model]), ROWS, torch.float32)
    bound = FP32
    if bf16:
        uncompiled = worst(step_gradients(Topology(), made_from, shares(1))[0], expected)
        assert uncompiled > 1e-3
        bound = 1.5 * uncompiled
    if world == 2:
        answers = two_ranks("compile_cases:step_gradients", compiled, shares(2))
    else:
        answers = [step_gradients(Topology(), compiled, shares(1))]
    for found, graphs in answers:
        assert graphs > 0
        assert worst(found, expected) < bound


@needs_compiler
@pytest.mark.slow
def test_dropout_draws_what_it_draws_uncompiled() -> None:
    plain, _ = step_gradients(Topology(), recipe(**DROPOUT), shares(1))
    found, graphs = step_gradients(Topology(), recipe(compile=True, **DROPOUT), shares(1))
    assert graphs > 0
    assert worst(found, plain) < FP32
    without = reference(recipe(lora_r=4), ROWS, torch.float32)
    assert worst(found, without) > 1e-2


@pytest.mark.parametrize("model", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_lengths_do_not_compile_without_end(model: str) -> None:
    made_from = recipe(compile=True, **MODELS[model] | {"config_overrides": {"num_hidden_layers": 3}})
    known = graphs_over_lengths(made_from, range(5, 17))
    assert known[0] == known[-1] <= 16


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, engine: str, world: int) -> None:
    """Its first lengths after the kill are others than the first of the whole run."""
    dataset = write_rows(tmp_path / "rows.jsonl", answers(14))
    common: dict[str, Any] = {"engine": engine, "compile": True, "max_steps": 6, "save_steps": 2, **DROPOUT}
    trained(run_recipe(tmp_path / "whole", dataset, **common), world)
    cut = run_recipe(tmp_path / "cut", dataset, **common)
    assert run(cut, world, ("kill_at", 3))[0].code == -signal.SIGKILL
    trained(cut, world)
    assert exact(tmp_path / "cut") == exact(tmp_path / "whole")
    plain = run_recipe(tmp_path / "plain", dataset, **common | {"compile": False})
    trained(plain, world)
    assert exact(tmp_path / "plain") != exact(tmp_path / "whole")


def test_zero_refuses_before_anything_is_built() -> None:
    with pytest.raises(Refused, match=r"^compile=true with engine.name='zero': choose ddp or fsdp2"):
        check("zero", Settings(compile=True), Topology())


def test_a_missing_compiler_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Refused, match=r"compile=true without a compiler \(CXX=None\): install g\+\+, set CXX"):
        check("ddp", Settings(compile=True), Topology())
    with pytest.raises(Refused, match=r"\(CC=None\): install gcc, set CC, or set compile=false"):
        check("ddp", Settings(compile=True), replace(Topology(), device_type="cuda"))
    check("ddp", Settings(compile=False), Topology())
    (tmp_path / "mine").touch(mode=0o755)
    monkeypatch.setenv("CXX", "mine")
    check("ddp", Settings(compile=True), Topology())


@pytest.mark.parametrize("engine", ["fsdp2", "zero"])
def test_an_optimizer_that_sees_whole_matrices_is_refused(engine: str) -> None:
    with pytest.raises(Refused, match=r"optimizer.name='adafactor' looks at whole matrices.*or engine ddp"):
        check(engine, Settings(OptimizerSpec("adafactor")), Topology())
    check("ddp", Settings(OptimizerSpec("adafactor")), Topology())


def test_an_unknown_engine_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"engine.name='fsdp3': choose ddp, fsdp2, zero \(did you mean fsdp2"):
        check("fsdp3", Settings(), Topology())


@dataclass(frozen=True)
class Uncompiled(Strategy):
    """Says that it does not work with compiled blocks."""

    compiles = False


def test_a_strategy_says_that_it_does_not_compile() -> None:
    config = load_config(recipe())
    strategies.check([Uncompiled()], config, Topology())
    with pytest.raises(Refused, match=r"^compile=true with strategy Uncompiled: set compile=false$"):
        strategies.check([Uncompiled()], config, Topology(), compile=True)
    strategies.check([strategies.get("plain")()], config, Topology(), compile=True)


def test_a_run_refuses_before_it_reads_or_writes(tmp_path: Path) -> None:
    made_from = run_recipe(tmp_path / "run", "no such file", compile=True, engine="zero")
    assert run(made_from)[0].error.startswith("Refused: compile=true with engine.name='zero'")
    assert not (tmp_path / "run").exists()
