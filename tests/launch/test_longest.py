"""The search for the longest length, on growths that are known."""

from __future__ import annotations

from typing import Any

import pytest

from launch.device import size_bytes
from launch.longest import search


def affine(steps: int) -> dict[str, Any]:
    return {"status": "ok", "peak_bytes": 1000 + 70 * steps}


@pytest.mark.parametrize("budget", [1000, 1069, 1070, 1071, 8000, 123456])
def test_search_finds_the_longest_that_fits(budget: int) -> None:
    expected = max((steps for steps in range(1, 4000) if 1000 + 70 * steps <= budget), default=0)
    assert search(affine, budget)["steps"] == expected


@pytest.mark.parametrize("longest", [0, 1, 2, 37, 64])
def test_search_needs_no_peak_of_what_did_not_fit(longest: int) -> None:
    found = search(lambda steps: affine(steps) if steps <= longest else {"status": "oom"}, None, furthest=64)
    assert found["steps"] == longest


def test_search_says_why_a_side_is_refused() -> None:
    refused = {"status": "refused", "why": "no"}
    assert search(lambda _: refused, 1) == refused


def test_budgets_have_units() -> None:
    sizes = [size_bytes("--max-length", text) for text in ("7", "2KiB", "1.5MiB", "3GiB", "3GB")]
    assert sizes == [7, 2048, 1572864, 3 * 2**30, 3 * 10**9]
