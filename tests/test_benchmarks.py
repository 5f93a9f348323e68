"""The benchmarks' own instruments: what they count, and what they look for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rows import in_fresh_process
from sides import Case

MIB = 2**20


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
