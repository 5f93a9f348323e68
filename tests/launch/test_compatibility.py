"""The table of what goes together: the page is what the code says, and what it refuses nobody begins to build."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import launch.assemble
import strategies
from distrib.errors import Refused
from launch import compatibility
from launch.assemble import Parts
from launch.compatibility import ENGINES, OK, RANKS, verdict
from launch.listing import listed, strategies_listed
from launch.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAIRS = list(itertools.combinations(strategies.names(), 2))


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in strategies_listed()}


def test_the_page_is_what_the_code_says() -> None:
    page = (ROOT / "docs/compatibility.md").read_text()
    assert page == compatibility.rewrite(page), "run: python -m launch.compatibility docs/compatibility.md"


def test_the_list_has_every_pair_and_every_engine(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        assert [name, *row["with"]] == [name, *(other for other in strategies.names() if other != name)]
        assert list(row["engines"]) == list(ENGINES)
    assert all(rows[one]["with"][other] == rows[other]["with"][one] for one, other in PAIRS)
    said = listed(list(rows.values()))
    assert "    With: plain, approx_bp, few_bit, fp4, int4, recompute, streambp. On: ddp, fsdp2." in said
    assert "MISSING" not in said


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("too late to refuse")

    for name in ("load_tokenizer", "open_data", "build", "make"):
        monkeypatch.setattr(launch.assemble, name, fail)


@pytest.mark.usefixtures("nothing_built")
def test_pairs_are_refused_in_any_order_before_anything_is_built(rows: dict[str, dict[str, Any]]) -> None:
    for pair in PAIRS:
        said = rows[pair[0]]["with"][pair[1]]
        assert (said == OK) == (verdict(pair[::-1]) == OK)
        if said == OK:
            continue
        with pytest.raises(Refused) as refused:
            Parts.of(Recipe(strategy=[{"name": name} for name in pair]), RANKS)
        assert said == f"refused: {refused.value}"
        assert "\n" not in said
        assert all(name in said.replace(",", " ").split() for name in pair)


@pytest.mark.usefixtures("nothing_built")
def test_engines_are_refused_before_anything_is_built(rows: dict[str, dict[str, Any]]) -> None:
    refusals = {
        (name, label): said for name, row in rows.items() for label, said in row["engines"].items() if said != OK
    }
    assert ("streambp", "tensor_parallel") in refusals
    for (name, label), said in refusals.items():
        with pytest.raises(Refused) as refused:
            Parts.of(Recipe(strategy=[{"name": name}], engine=ENGINES[label]), RANKS)
        assert said == f"refused: {refused.value}"
        assert "\n" not in said


def test_other_mistakes_are_reasons_too() -> None:
    assert verdict(["plane"]).startswith("refused: strategy.name='plane': choose plain")
