"""The lowest versions that are tested are those that are allowed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
NOT_AT_ITS_FLOOR = {"torch"}
EXTRAS = ("dev", "trl", "torchft", "audit", "docs")


def pins(file: str) -> dict[str, Version]:
    found = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    return {name.lower(): Version(version) for name, version in found}


def allowed() -> dict[str, Requirement]:
    texts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return {requirement.name.lower(): requirement for requirement in map(Requirement, texts)}


def test_the_low_constraints_are_the_floors() -> None:
    lowest = pins("constraints-low.txt")
    assert lowest.keys() == allowed().keys()
    for name, requirement in allowed().items():
        (floor,) = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        assert lowest[name] == floor or name in NOT_AT_ITS_FLOOR, name
        assert lowest[name] in requirement.specifier, name


def test_the_constraints_lie_within_the_ranges() -> None:
    pinned = pins("constraints.txt")
    for name, requirement in allowed().items():
        assert pinned[name] in requirement.specifier, name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in map(
        Requirement, [*extras["dev"], *extras["trl"], *extras["torchft"], *extras["audit"], *extras["docs"]]
    ):
        assert pinned[requirement.name.lower()] in requirement.specifier, requirement.name
