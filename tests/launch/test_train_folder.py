"""A folder belongs to one run, and what went wrong is said without touching what was written."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import ENGINES, contents, exact, lines, recipe, run, trained

import strategies
from distrib.errors import UserError
from distrib.topology import Topology
from launch.recipe_file import dump_recipe
from launch.train import train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: str) -> Any:
    made = recipe(tmp_path_factory.mktemp("finished") / "run", dataset, save_steps=2)
    train(made, Topology())
    return made


def test_a_run_leaves_what_it_promises(finished: Any) -> None:
    folder = Path(finished.output_dir)
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "recipe.lock.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "checkpoints",
        "final",
        "events.jsonl",
        "report.json",
        "report.md",
        "report.html",
    }
    for line in lines(folder):
        assert line.keys() >= {"step", "loss", "grad_norm", "learning_rate", "tokens", "loss_tokens"}
        assert line.keys() >= {"tokens_per_s", "peak_bytes", "joules", "joules_per_token", "energy_source", "time"}
        assert line["joules"] is None or line["joules"] > 0
        assert line["peak_bytes"] > 2**20


def test_the_same_command_on_a_finished_run_does_nothing_and_says_so(
    finished: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(Path(finished.output_dir))
    report = train(finished, Topology())
    assert report["step"] == 4
    assert f"{finished.output_dir} is finished, with step 4: nothing to do" in capsys.readouterr().err
    assert contents(Path(finished.output_dir)) == before


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"learning_rate": 1e-3}, "learning_rate was 0.0002, is 0.001; name another output_dir"),
    ({"seed": 7}, "seed was 42, is 7"),
    ({"max_length": 32}, "max_length was 64, is 32"),
    ({"engine": {"name": "fsdp2"}}, "engine was .*'ddp'.*, is .*'fsdp2'"),
    ({"resume_from_checkpoint": False}, "resume_from_checkpoint=false: name another folder"),
    ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint='nowhere' is not a checkpoint"),
    ({"global_batch_size": 8, "max_steps": 8}, "global batch is 8 rows, .*step-4 was trained with 4"),
    ({"global_batch_size": 8}, "global batch is 8 rows, .*step-4 was trained with 4"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSALS)
def test_what_does_not_fit_a_run_is_refused_and_nothing_changes(
    finished: Any, dataset: str, changes: dict[str, Any], said: str
) -> None:
    folder = Path(finished.output_dir)
    before = contents(folder)
    with pytest.raises(UserError, match=said) as caught:
        train(recipe(folder, dataset, save_steps=2, **changes), Topology())
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_a_folder_of_something_else_and_a_file_are_refused(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    before = contents(tmp_path)
    for name, said in (("thesis", "in use, and not by a run"), ("file", "cannot write below .*file")):
        with pytest.raises(UserError, match=said):
            train(recipe(tmp_path / name, dataset), Topology())
    assert contents(tmp_path) == before


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_a_refused_resume_of_zero_at_another_world_leaves_the_checkpoint(
    tmp_path: Path, dataset: str, engine: str
) -> None:
    trained(recipe(tmp_path, dataset, engine=ENGINES[engine], global_batch_size=2), 2)
    before = contents(tmp_path)
    (end,) = run(recipe(tmp_path, dataset, engine=ENGINES[engine], global_batch_size=3, max_steps=8))
    assert "global batch is 3 rows" in end.error
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_model_or_engine_is_refused(tmp_path: Path, dataset: str, finished: Any) -> None:
    chosen = str(Path(finished.output_dir) / "checkpoints" / "step-4")
    for name, changes, said in (
        ("lora", {"lora_r": 4}, "does not hold what this recipe trains"),
        ("wide", {"config_overrides": {"hidden_size": 16}}, "does not hold what this recipe trains"),
        ("zero", {"engine": ENGINES["zero2"]}, "was written by 'ddp'"),
    ):
        (end,) = run(recipe(tmp_path / name, dataset, max_steps=8, resume_from_checkpoint=chosen, **changes))
        assert end.error.startswith("UserError: "), end.error
        assert said in end.error
        assert not (tmp_path / name).exists()


def test_a_checkpoint_of_another_folder_is_gone_on_from(tmp_path: Path, dataset: str, finished: Any) -> None:
    folder = Path(finished.output_dir)
    chosen = str(folder / "checkpoints" / "step-2")
    train(recipe(tmp_path, dataset, resume_from_checkpoint=chosen), Topology())
    assert exact(tmp_path) == exact(folder)[2:]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_a_number_on_one_rank_stops_all(
    tmp_path: Path, dataset: str, engine: str, rank: int
) -> None:
    made = recipe(tmp_path, dataset, engine=ENGINES[engine], save_steps=2)
    ends = run(made, 2, ("spoil_loss", 3, rank))
    assert [end.error for end in ends] == ["NotFinite: step 4: the loss is nan; the newest checkpoint is untouched"] * 2
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


@pytest.mark.parametrize(("bf16", "value"), [(False, float("nan")), (True, float("inf"))])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    tmp_path: Path, dataset: str, engine: str, bf16: bool, value: float
) -> None:
    made = recipe(tmp_path, dataset, engine=ENGINES[engine], save_steps=1, bf16=bf16)
    ends = run(made, 2, ("spoil_gradient", 2, 1, value), do="weights_after_failure")
    for end in ends:
        assert end.error == ""
        said, all_finite = end.result
        assert said.startswith("NotFinite: step 3: the gradient's norm is "), said
        assert all_finite
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-1", "step-2"]


@pytest.fixture(scope="module")
def without_step_3(tmp_path_factory: pytest.TempPathFactory, dataset: str) -> list[dict[str, Any]]:
    """One process, all of whose gradients are not finite in the third step."""
    made = recipe(tmp_path_factory.mktemp("alone"), dataset, on_nonfinite="skip", max_steps=5)
    assert [end.error for end in run(made, 1, ("spoil_gradient", 2, 0, float("nan")))] == [""]
    return lines(Path(made.output_dir))


@pytest.mark.parametrize(
    ("engine", "policy"),
    [("ddp", "rollback"), ("fsdp2", "skip"), ("zero1", "skip"), ("zero2", "rollback"), ("zero3", "skip")],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_left_out_on_all(
    tmp_path: Path, dataset: str, engine: str, policy: str, without_step_3: list[dict[str, Any]]
) -> None:
    made = recipe(tmp_path, dataset, engine=ENGINES[engine], on_nonfinite=policy, max_steps=5, save_steps=1)
    ends = run(made, 2, ("spoil_gradient", 2, 1, float("nan")))
    assert [end.error for end in ends] == ["", ""]
    found = lines(tmp_path)
    assert [line["step"] for line in found] == [line["step"] for line in without_step_3] == [1, 2, 4, 5]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in without_step_3], rel=1e-5)
    assert [line["learning_rate"] for line in found] == [line["learning_rate"] for line in without_step_3]
    noted = [line["event"] for line in lines(tmp_path, "events")]
    assert noted == ["start", *(["rollback"] if policy == "rollback" else []), "skip", "finish"]
    assert [line["step"] for line in lines(tmp_path, "samples")] == [1, 2, 3, 4, 5]


def test_too_little_memory_is_said_before_anything_is_written(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ["CUDA out of memory. Tried to allocate 2 GiB.\nmore"]
    call = strategies.Prepared.__call__

    def full(*given: Any) -> Any:
        if once:
            raise torch.OutOfMemoryError(once.pop())
        return call(*given)

    monkeypatch.setattr("strategies.Prepared.__call__", full)
    made = recipe(tmp_path / "run", dataset, per_device_train_batch_size=4, report_to="none")
    with pytest.raises(UserError, match=r"out of memory in the preflight: 4 sequences of \d+ tokens") as caught:
        train(made, Topology())
    assert "Tried to allocate 2 GiB" in str(caught.value)
    assert "lower max_length or per_device_train_batch_size" in str(caught.value)
    assert re.search(r"would fit, 4 sequences at once: plain \d+, streambp:offload=true \d+$", str(caught.value))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def command(made: Any, folder: Path, *launcher: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(made))
    return [sys.executable, "-m", *(launcher or ("launch",)), "train", str(folder / "recipe.yaml")]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_sigterm_to_the_command_ends_with_75_and_the_same_command_goes_on(tmp_path: Path, dataset: str) -> None:
    changes: dict[str, Any] = {"max_steps": 60, "config_overrides": {"attention_dropout": 0.1}}
    words = command(recipe(tmp_path / "run", dataset, **changes), tmp_path)
    with subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step  5/"):
                break
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read().splitlines()[-1]
        assert process.wait(60) == 75
    done = lines(tmp_path / "run")[-1]["step"]
    assert 5 <= done < 60
    assert said == f"ebbtide: stopped after step {done}; the same command goes on from there"
    assert subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True).returncode == 0
    train(recipe(tmp_path / "whole", dataset, **changes), Topology())
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")


def test_sigkill_of_the_command_on_two_ranks_and_the_same_command(tmp_path: Path, dataset: str) -> None:
    """Under torchrun: the launcher and its ranks are killed together, as when a machine goes away."""
    changes: dict[str, Any] = {"max_steps": 40, "save_steps": 3, "engine": "fsdp2"}
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "launch")
    words = command(recipe(tmp_path / "run", dataset, **changes), tmp_path, *launcher)
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "step-6").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "run" / "final").exists()
    assert subprocess.run(words, env=environment(), cwd=ROOT, capture_output=True).returncode == 0
    trained(recipe(tmp_path / "whole", dataset, **changes), 2)
    assert exact(tmp_path / "run") == exact(tmp_path / "whole")


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_failing_rank_ends_the_job_with_its_error_once(tmp_path: Path, dataset: str) -> None:
    """The data of step 2 cannot be read on rank 1."""
    made = recipe(tmp_path / "run", dataset, nproc=2)
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import launch.data.data as data\n"
        "    fetch = data.Shuffled.fetch\n"
        "    def failing(self, start, stop):\n"
        "        if start >= 4: raise OSError('the disk is gone')\n"
        "        return fetch(self, start, stop)\n"
        "    data.Shuffled.fetch = failing\n"
    )
    env = {**environment(), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command(made, tmp_path), env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("OSError: the disk is gone") == 1
    assert done.stderr.count("Traceback") == 1
    assert [line["step"] for line in lines(tmp_path / "run")] == [1]
