"""What two runs of the same training have in common, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_cases import lines

FIGURES = ("loss", "grad_norm", "tokens", "nonpad_tokens", "loss_tokens")


def curve(folder: Path) -> list[list[float]]:
    return [[line[key] for key in FIGURES] for line in lines(folder)]


def assert_same_curve(found: Path, expected: Path, bound: float) -> None:
    for mine, theirs in zip(curve(found), curve(expected), strict=True):
        assert mine == pytest.approx(theirs, rel=bound)
    assert lines(found, "samples") == lines(expected, "samples")
