"""The append-only files of a run, after every kind of end."""

from __future__ import annotations

from pathlib import Path

import pytest

from distrib.journal import Journal, read


def written(path: Path, steps: range, start: int = 0) -> None:
    journal = Journal(path, start)
    for step in steps:
        journal.write({"step": step, "loss": 1 / step})
    journal.close()


def test_lines_are_whole_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 0)
    journal.write({"step": 1, "loss": 0.1 + 0.2})
    assert read(path) == [{"step": 1, "loss": 0.1 + 0.2}]
    journal.close()


def test_lines_after_the_step_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 6))
    written(path, range(4, 8), start=3)
    assert [line["step"] for line in read(path)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["step"] for line in read(path)] == [1, 2]
    written(path, range(3, 4), start=2)
    assert [line["step"] for line in read(path)] == [1, 2, 3]


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read(tmp_path / "none.jsonl") == []
