"""DeepSpeed without its builds, and its checkpoints at another number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from train_cases import answers, lines, recipe, run, trained, write_rows

TESTS = Path(__file__).resolve().parents[1]
STAGES = (1, 2, 3)
BUILDS = ("CC", "CXX", "CUDA_HOME", "TORCH_EXTENSIONS_DIR")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "answers.jsonl", answers(14))


def weights(folder: Path) -> Tensor:
    """All of them, one after the other."""
    saved = load_file(folder / "final" / "model.safetensors")
    return torch.cat([saved[name].flatten().double() for name in sorted(saved)])


def bare(tmp_path: Path) -> dict[str, str]:
    """An environment without any compiler and without what one has built before."""
    kept = {name: value for name, value in os.environ.items() if name not in BUILDS}
    (tmp_path / "bin").mkdir()
    own = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "EBBTIDE_CACHE": str(tmp_path / "cache")}
    return {**kept, **own, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}


def start(environment: dict[str, str], *words: str) -> list[subprocess.Popen[str]]:
    """Two ranks of `zero_cases`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, str(TESTS / "zero_cases.py"), *words],
            env={**environment, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def test_it_starts_and_trains_without_a_compiler_or_a_gpu(tmp_path: Path, dataset: str) -> None:
    environment = bare(tmp_path)
    tools = ("gcc", "cc", "c++", "g++", "clang", "ninja", "nvcc")
    assert not any(shutil.which(tool, path=environment["PATH"]) for tool in tools)
    engines = [{"name": "zero", "stage": stage, "offload": on} for stage in STAGES for on in (False, True)]
    ranks = start(environment, dataset, str(tmp_path / "runs"), json.dumps(engines))
    said = [rank.communicate(timeout=150)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    losses = [[line["loss"] for line in lines(tmp_path / "runs" / str(index))] for index in range(len(engines))]
    assert losses[0][0] > losses[0][1]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-5)
    assert not list(tmp_path.rglob("torch_extensions/**/*.so"))


def test_the_switch_that_keeps_it_from_building_exists() -> None:
    import deepspeed

    assert isinstance(deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], bool)


@pytest.mark.parametrize(
    ("optimizer", "stage", "before", "after"),
    [("adam", stage, before, 3 - before) for stage in STAGES for before in (1, 2)] + [("radam", 2, 2, 1)],
)
def test_both_moments_and_the_step_count_reach_another_number_of_ranks(
    tmp_path: Path, dataset: str, optimizer: str, stage: int, before: int, after: int
) -> None:
    common: dict[str, Any] = {
        "engine": {"name": "zero", "stage": stage},
        "optimizer": optimizer,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    trained(recipe(tmp_path / "whole", dataset, max_steps=5, **common), after)
    trained(recipe(tmp_path / "cut", dataset, max_steps=2, **common), before)
    middle = weights(tmp_path / "cut")
    trained(recipe(tmp_path / "cut", dataset, max_steps=5, **common), after)
    way = weights(tmp_path / "whole") - middle
    assert (weights(tmp_path / "cut") - weights(tmp_path / "whole")).norm() < 2e-6 * way.norm()
    assert lines(tmp_path / "cut")[-1]["loss"] == pytest.approx(lines(tmp_path / "whole")[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "stage"),
    [({"name": "sgd", "momentum": 0.9}, stage) for stage in STAGES] + [({"name": "nadam"}, 2)],
)
def test_other_optimizers_go_on_at_the_same_number_of_ranks_only(
    tmp_path: Path, dataset: str, optimizer: dict[str, Any], stage: int
) -> None:
    common: dict[str, Any] = {
        "engine": {"name": "zero", "stage": stage},
        "optimizer": optimizer,
        "lr_scheduler_type": "constant",
    }
    folder = tmp_path / "run"
    trained(recipe(folder, dataset, max_steps=2, **common), 2)
    name = optimizer["name"]
    assert run(recipe(folder, dataset, max_steps=4, **common))[0].error == (
        f"Refused: {folder}/checkpoints/step-2 was written by 2 ranks, here are 1, and engine.name='zero' "
        f"reshards adamw, adam, radam only, not optimizer.name='{name}': start 2 ranks"
    )
    assert [line["step"] for line in lines(folder)] == [1, 2]
    trained(recipe(tmp_path / "whole", dataset, max_steps=4, **common), 2)
    trained(recipe(folder, dataset, max_steps=4, **common), 2)
    assert lines(folder)[-1]["loss"] == lines(tmp_path / "whole")[-1]["loss"]
    assert torch.equal(weights(folder), weights(tmp_path / "whole"))
