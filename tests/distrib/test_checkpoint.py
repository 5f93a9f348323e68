"""Checkpoints as files: whole or not there, the right ones kept, and a kill at any moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distrib import checkpoint
from distrib.checkpoint import MANIFEST, Manifest, Progress
from distrib.errors import UserError
from distrib.topology import Topology


class FakeEngine:
    """Saves one file, or dies while it does."""

    topology = Topology()

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text("half")
        if self.dies:
            raise KeyboardInterrupt
        (folder / "weights").write_text("whole")


def save(run: Path, step: int, keep: int | None = None, dies: bool = False) -> Path:
    engine: Any = FakeEngine(dies)
    return checkpoint.save(run, engine, Manifest(Progress(step, 10 * step, 9, 8, step), 1, "ddp", 4), keep)


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(run)]


def test_a_checkpoint_tells_what_was_saved(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert folder == tmp_path / "checkpoints" / "step-3"
    assert (folder / "engine" / "weights").read_text() == "whole"
    assert checkpoint.read_manifest(folder) == Manifest(Progress(3, 30, 9, 8, 3), 1, "ddp", 4)
    assert [path.name for path in folder.parent.iterdir()] == ["step-3"]


def test_the_newest_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-9", "step-10", "step-100"]
    save(tmp_path, 101, keep=2)
    assert names(tmp_path) == ["step-100", "step-101"]


def test_a_death_while_saving_leaves_the_one_before(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, keep=1, dies=True)
    assert names(tmp_path) == ["step-1"]
    assert (tmp_path / "checkpoints" / ".step-2.draft" / "engine" / "weights").read_text() == "half"
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-2"]
    assert (tmp_path / "checkpoints" / "step-2" / "engine" / "weights").read_text() == "whole"


def test_what_is_left_behind_goes_and_what_others_put_there_stays(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 7, dies=True)
    copy = tmp_path / "checkpoints" / "step-6-mine"
    (tmp_path / "checkpoints" / "step-6").rename(copy)
    save(tmp_path, 6)
    checkpoint.drop_after(tmp_path, 4)
    assert names(tmp_path) == ["step-2", "step-4"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-2", "step-4", copy.name}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"progress": {}}', json.dumps({"progress": {"pace": 1}, "world": 1})])
def test_a_manifest_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is not a checkpoint that can be read") as caught:
        checkpoint.read_manifest(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    checkpoint.write_text(tmp_path / "a", "one")
    checkpoint.write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
