"""How often ranks are started again, and how many of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train_cases import recipe

from distrib.errors import UserError
from launch import cli
from launch.restarts import FAILURE, Restarts, failure


def restarts(run: Path, **changes: Any) -> Restarts:
    common = {"nproc": 8, "max_restarts": 2, "global_batch_size": 24}
    return Restarts(recipe(run, "stdlib", **{**common, **changes}))


def test_a_new_checkpoint_starts_the_count_anew(tmp_path: Path) -> None:
    made = restarts(tmp_path)
    assert [made.another(), made.another(), made.another()] == [True, True, False]
    made = restarts(tmp_path)
    assert made.another()
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-6.draft").mkdir()
    assert (made.another(), made.count, made.reached) == (True, 1, 4)
    assert [made.another(), made.another()] == [True, False]


@pytest.mark.parametrize(
    ("changes", "culprits", "left"),
    [
        ({}, {3}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"min_nproc": 6}, {3}, [0, 1, 2, 4, 5, 6]),  # 24 rows are not shared by 7
        ({"min_nproc": 7}, {3}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"min_nproc": 1}, set(range(8)), [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"min_nproc": 1, "engine": {"name": "fsdp2", "tensor_parallel": 2}}, {0, 1, 2}, [3, 4, 5, 6]),
    ],
)
def test_the_ranks_that_are_left_share_the_global_batch(
    tmp_path: Path, changes: dict[str, Any], culprits: set[int], left: list[int]
) -> None:
    assert restarts(tmp_path, **changes).left(range(8), culprits) == left


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}, [{"p": 4, "g": 6}, {"p": 2, "g": 12}]),
        ({"per_device_train_batch_size": 3}, [{"p": 1, "g": 3}, None]),
        ({"per_device_train_batch_size": 6, "global_batch_size": 96}, [{"p": 3}, {"p": 1}]),
        ({"per_device_train_batch_size": 2, "on_oom": "stop"}, [None]),
    ],
)
def test_fewer_sequences_at_once_are_as_many_a_step(tmp_path: Path, changes: Any, keys: list[Any]) -> None:
    names = {"p": "per_device_train_batch_size", "g": "gradient_accumulation_steps"}
    made = restarts(tmp_path, **{"max_restarts": 0, "on_oom": "halve", "global_batch_size": None, **changes})
    for wanted in keys:
        expected = None if wanted is None else [f"{names[key]}={value}" for key, value in wanted.items()]
        assert made.smaller() == expected


@pytest.mark.parametrize(("visible", "wanted"), [(None, "0,2"), ("5,6,7", "5,7"), ("GPU-a", None)])
def test_the_device_of_a_rank_that_is_left_out_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, wanted: str | None
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = restarts(tmp_path).environment("rank 1 failed", 7.5, nproc=3, slots=[0, 2])
    assert found.get("CUDA_VISIBLE_DEVICES") == wanted
    assert failure(found) == ("rank 1 failed", 7.5)
    assert "CUDA_VISIBLE_DEVICES" not in restarts(tmp_path).environment("why", None, nproc=3, slots=[0, 1, 2])
    assert FAILURE in found
    assert failure({}) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_nproc": 9}, "min_nproc=9 with nproc=8: must be at most nproc"),
        ({"min_nproc": 4, "max_restarts": 0}, "min_nproc=4 with max_restarts=0: set max_restarts"),
        ({"min_nproc": 4, "global_batch_size": None}, "min_nproc=4 without global_batch_size"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        restarts(tmp_path, **changes)


def test_a_launcher_starts_its_own_ranks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "0")
    words = ["train", str(Path(__file__).parents[2] / "recipes" / "tiny.yaml"), "max_restarts=3"]
    assert cli.main([*words, f"output_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        "ebbtide: max_restarts=3, but a launcher started this rank and has to start it again: "
        "leave it out, and give torchrun --max-restarts\n"
    )
