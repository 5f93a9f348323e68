"""The benchmarks' own instruments: what they count, and what they look for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from max_length import search, size_bytes
from rows import in_fresh_process
from sides import Case, section, sides_of
from torch._subclasses.fake_tensor import FakeTensorMode
from tracker import Tracker, tracking

MIB = 2**20


class Squared(torch.autograd.Function):
    """Writes into a buffer in place, keeps its input, and holds a temporary of one MiB in its backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        out.copy_(x).mul_(x)
        return out

    @staticmethod
    def backward(ctx: Any, by_out: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        twice = x * 2
        return twice.mul_(by_out)


def test_tracker_counts_storages_until_their_last_reference_is_gone() -> None:
    tracker = Tracker()
    with tracking(FakeTensorMode(), tracker):
        x = torch.zeros(MIB // 4, requires_grad=True)
        assert tracker.live_bytes == MIB
        half = x.detach()[: MIB // 8].view(2, -1)
        assert tracker.live_bytes == MIB
        del half
        y = Squared.apply(Squared.apply(x))
        # The first output is held by the graph alone.
        assert tracker.live_bytes == 3 * MIB
        tracker.restart()
        y.backward(torch.ones_like(y))
        # The gradient of y, that of the first output while it is made; x's own is what is left.
        assert tracker.peak_bytes() == 2 * MIB
        del y
        assert tracker.live_bytes == 2 * MIB
        del x
        assert tracker.live_bytes == 0


@pytest.mark.parametrize(
    ("side", "runs"), [("gc+ce", 1), pytest.param("streambp:chunk=512:offload=true", 3, marks=pytest.mark.slow)]
)
def test_tracker_agrees_with_the_resident_memory_of_a_real_run(side: str, runs: int) -> None:
    case = Case(side, 4096, model="256x4", vocabulary=4096)
    # The kernel's count is never less than what is live, and now and then more: pages of files go when it likes.
    real = min(in_fresh_process(case)["peak_bytes"] for _ in range(runs))
    # Far above what pages of code and small blocks come to.
    assert real > 25 * MIB
    assert in_fresh_process(replace(case, fake=True))["peak_bytes"] == pytest.approx(real, rel=0.1)


def affine(steps: int) -> dict[str, Any]:
    return {"status": "ok", "peak_bytes": 1000 + 70 * steps}


@pytest.mark.parametrize("budget", [1000, 1069, 1070, 1071, 8000, 123456])
def test_search_finds_the_longest_that_fits(budget: int) -> None:
    expected = max((steps for steps in range(1, 4000) if 1000 + 70 * steps <= budget), default=0)
    assert search(affine, budget)["max_length"] == expected * 1024


@pytest.mark.parametrize("longest", [0, 1, 2, 37, 64])
def test_search_needs_no_peak_of_what_did_not_fit(longest: int) -> None:
    found = search(lambda steps: affine(steps) if steps <= longest else {"status": "oom"}, None)
    assert found["max_length"] == longest * 1024


def test_search_says_why_a_side_is_refused() -> None:
    refused = {"status": "refused", "why": "no"}
    assert search(lambda _: refused, 1) == refused


def test_sides_are_strategies_with_fields() -> None:
    assert sides_of("gc+ce,spaco:keep=[0,3]:p=0.5,seco") == ["gc+ce", "spaco:keep=[0,3]:p=0.5", "seco"]
    assert section("spaco:keep=[0,3]:p=0.5") == {"name": "spaco", "keep": [0, 3], "p": 0.5}
    assert section("streambp:offload=true") == {"name": "streambp", "offload": True}


def test_budgets_have_units() -> None:
    assert [size_bytes(text) for text in ("7", "2KiB", "1.5MiB", "3GiB", "3G")] == [
        7,
        2048,
        1572864,
        3 * 2**30,
        3 * 2**30,
    ]
