"""`ebbtide checkpoint`, and what a recipe says of saving."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from checkpoint_cases import files_up_to, save
from train_cases import lines, recipe

from distrib import checkpoint
from distrib.checkpoint import COMMITTED, MANIFEST
from distrib.errors import NotWritten, UserError
from distrib.topology import Topology
from launch.cli import main
from launch.export import export
from launch.train import train


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, loss in ((2, 0.25), (4, 0.5), (6, None)):
        save(tmp_path, step, eval_loss=loss, time=1.7e9)
    return tmp_path


def test_verify_says_what_is_whole_and_whether_the_newest_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{folder / f'step-{step}'}: whole" for step in (2, 4, 6)]
    (folder / "step-4" / "engine" / "weights").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert f"{folder / 'step-4'}: damaged: engine/weights is missing" in capsys.readouterr().out
    (folder / "step-6" / COMMITTED).write_text("x")
    assert main(["checkpoint", "verify", str(run), "--json"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in result["checkpoints"]] == ["whole", "damaged", "damaged"]
    assert result["newest"] == "damaged"


def test_list_has_size_time_and_the_best(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "list", str(run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"step {step}  ") for step, line in zip((2, 4, 6), said, strict=True)] == [True] * 3
    assert "2023-11-14 22:13:20 UTC  held-out loss 0.2500  best" in said[0]
    assert said[2].endswith("held-out loss unknown")
    (run / "checkpoints" / "step-6" / MANIFEST).unlink()
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    sizes = [sum(f.stat().st_size for f in (run / "checkpoints" / "step-2").rglob("*") if f.is_file())]
    assert [rows[0]["bytes"]] == sizes
    assert [(row["step"], row["state"], row["eval_loss"], row["best"]) for row in rows] == [
        (2, "whole", 0.25, True),
        (4, "whole", 0.5, False),
        (6, "damaged", None, False),
    ]


def test_repair_moves_what_is_damaged_and_deletes_no_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    (folder / "step-4" / "engine" / "weights").write_text("other")
    (folder / ".step-8.draft").mkdir()
    assert main(["checkpoint", "repair", str(run)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"put aside: {folder / 'damaged' / 'step-4'}",
        f"removed, never finished: {folder / '.step-8.draft'}",
    ]
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-6", "damaged"}
    assert (folder / "damaged" / "step-4" / "engine" / "weights").read_text() == "other"
    assert main(["checkpoint", "repair", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": str(run), "moved": [], "drafts_removed": []}


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["veify", str(tmp_path)], "checkpoint='veify': choose verify, list, repair (did you mean verify?)"),
        (["list", str(tmp_path)], "has no checkpoint"),
        (["list", str(tmp_path / "none")], "no such run folder"),
    ):
        assert main(["checkpoint", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_looking_at_checkpoints_needs_no_torch(run: Path) -> None:
    import subprocess

    code = "import sys; from launch.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    for action in ("verify", "list", "repair"):
        done = subprocess.run([sys.executable, "-c", code, "checkpoint", action, str(run)], cwd=root)
        assert done.returncode == 0


def test_the_best_needs_evaluations_at_its_steps(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(UserError, match="save_best=true without eval_steps: set eval_steps"):
        recipe(tmp_path, dataset, save_best=True)
    with pytest.raises(UserError, match=r"save_steps=3 and eval_steps=2: .* set save_steps to one"):
        recipe(tmp_path, dataset, save_best=True, eval_steps=2, eval_dataset=dataset, save_steps=3)


def test_a_run_keeps_its_best_and_an_export_walks_past_what_is_damaged(
    tmp_path: Path, dataset: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ebbtide"), "propagate", True)
    changes = {"eval_steps": 1, "eval_dataset": dataset, "save_steps": 1, "save_best": True, "save_total_limit": 2}
    # So large that every step makes it worse.
    made = recipe(tmp_path / "run", dataset, learning_rate=10.0, lr_scheduler_type="constant", **changes)
    train(made, Topology())
    losses = {line["step"]: line["eval_loss"] for line in lines(tmp_path / "run", "evaluations")}
    best = min(losses, key=losses.__getitem__)
    assert best not in (3, 4)
    kept = checkpoint.checkpoints(tmp_path / "run")
    assert [checkpoint.step_of(path) for path in kept] == [best, 3, 4]
    manifest = checkpoint.read_manifest(kept[0])
    assert manifest.eval_loss == losses[best]
    assert manifest.strategy == ["plain"]
    assert manifest.versions.keys() == {"code", "ebbtide", "torch"}
    (kept[-1] / COMMITTED).unlink()
    assert export(tmp_path / "run", tmp_path / "out", merge=False)["step"] == 3
    assert "step-4 is passed over: COMMITTED: No such file" in caplog.text
    for path in kept:
        (path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="has no checkpoint that is whole"):
        export(tmp_path / "run", tmp_path / "none", merge=False)


def test_a_final_folder_that_does_not_fit_is_one_line(tmp_path: Path, dataset: str) -> None:
    made = recipe(tmp_path / "run", dataset, max_steps=1, on_save_error="continue")
    # The data's cache is written once.
    train(recipe(tmp_path / "other", dataset, max_steps=1), Topology())
    with files_up_to(20_000), pytest.raises(NotWritten, match=r"^cannot write to .*/run: File too large \(.* free\)$"):
        train(made, Topology())
    assert [line["event"] for line in lines(tmp_path / "run", "events")] == ["start", "not saved", "finish"]
