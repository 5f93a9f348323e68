"""Recomputation for a budget, from the command line: refused before anything is built, and accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import train_cases

from distrib.errors import Refused
from distrib.topology import Topology
from launch import cli
from launch.assemble import Parts
from launch.pages.run import run_markdown


def recipe(tmp_path: Path, **changes: Any) -> Any:
    rows = train_cases.write_rows(tmp_path / "rows.jsonl", train_cases.answers(16))
    return train_cases.recipe(tmp_path / "run", rows, packing=True, **changes)


def auto(budget: Any) -> list[dict[str, Any]]:
    return [{"name": "recompute", "policy": "auto", "budget": budget}]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"bf16": True, "lora_r": 4}])
def test_a_budget_that_nothing_meets_is_refused_before_a_model_is_built(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(Refused, match=r"^budget=0\.005: .* 64 tokens still hold 0\.0 MiB .* set it to 0\.\d+ or more"):
        Parts.of(recipe(tmp_path, strategy=auto(0.005), **precision), Topology())


def test_a_budget_that_can_be_met_is_not(tmp_path: Path) -> None:
    Parts.of(recipe(tmp_path, strategy=auto(0.2)), Topology())
    Parts.of(recipe(tmp_path, strategy=auto("1GiB")), Topology())


@pytest.mark.parametrize(
    ("budget", "status", "said"),
    [("0.5", "unknown", "another strategy at every length"), ("1KB", "refused", "set it to")],
)
def test_a_plan_says_that_it_cannot_be_met_or_that_it_is_chosen_anew(
    capsys: pytest.CaptureFixture[str], budget: str, status: str, said: str
) -> None:
    side = f"recompute:policy=auto:budget={budget}"
    assert cli.main(["plan", "recipes/tiny.yaml", "--json", "--strategies", side]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["status"] == status
    assert said in row["why"]


def test_a_run_has_the_account(tmp_path: Path) -> None:
    asked = recipe(tmp_path, strategy=auto(0.3), max_steps=3)
    train_cases.trained(asked)
    account = json.loads((tmp_path / "run" / "report.json").read_text())["accounts"]["recompute"]
    assert account["kept_bytes"]["predicted"] <= 0.3 * account["plain_bytes"]
    assert account["kept_bytes"]["measured"] == pytest.approx(account["kept_bytes"]["predicted"], rel=0.1)
    assert account["recomputed"]
    assert "What recompute did" in run_markdown(tmp_path / "run")
