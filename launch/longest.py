"""The longest sequence that fits a budget, by as few trials as a guess of the memory's growth allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FURTHEST = 2**20

Row = dict[str, Any]
Probe = Callable[[int], Row]
"""Tries so many steps of length: a row with `status`, and `peak_bytes` where it is ok."""


def search(probe: Probe, budget_bytes: float | None, furthest: int = FURTHEST) -> Row:
    """`steps` (0: not even one fits) and the peak there; a row that was refused is returned as it is."""
    budget = float("inf") if budget_bytes is None else budget_bytes
    fits: dict[int, Row] = {0: {"peak_bytes": 0}}
    fails: dict[int, Row] = {furthest + 1: {}}
    guess = 1
    while min(fails) - max(fits) > 1:
        row = probe(guess)
        if row["status"] not in ("ok", "oom"):
            return row
        inside = row["status"] == "ok" and row["peak_bytes"] <= budget
        (fits if inside else fails)[guess] = row
        guess = next_guess(fits, fails, budget, furthest)
    longest = max(fits)
    return {"status": "ok", "steps": longest, "peak_bytes": fits[longest]["peak_bytes"]}


def next_guess(fits: dict[int, Row], fails: dict[int, Row], budget: float, furthest: int) -> int:
    """Where the line through the two known ends meets the budget; twice as far, or the middle, without a line."""
    low, high = max(fits), min(fails)
    used, over = fits[low]["peak_bytes"], fails[high].get("peak_bytes")
    if over is not None and over > used:
        guess = low + int((high - low) * (budget - used) / (over - used))
    else:
        guess = 2 * low if high == furthest + 1 else (low + high) // 2
    return min(max(guess, low + 1), high - 1)
