"""The images' locks are the tested versions with their hashes; an audit fails for a vulnerability, and never passes
in silence."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from test_ranges import ROOT, allowed, pins

LOCKS = sorted((ROOT / "docker").glob("requirements-*.lock"))
AUDIT: dict[str, Any] = runpy.run_path(str(ROOT / "docker" / "audit.py"))


def named(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_has_the_tested_versions_and_a_hash_of_each(lock: Path) -> None:
    text = lock.read_text()
    entries = re.split(r"^(?=[A-Za-z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]
    locked = {}
    for entry in entries:
        name, version = re.match(r"([\w.-]+)==([^ +]+)(?:\+cpu)? ", entry).groups()  # type: ignore[union-attr]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", entry), name
        locked[named(name)] = version
    tested = {named(name): str(version) for name, version in pins("constraints.txt").items()}
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    assert {named(name) for name in allowed()} <= locked.keys(), "run: make lock"
    assert "://" not in text
    assert ("nvidia-nccl-cu13" in locked) == ("cuda" in lock.stem)


def test_there_are_two_locks() -> None:
    assert [lock.stem for lock in LOCKS] == ["requirements-cpu", "requirements-cuda"]


FLAW = {"id": "CVE-1", "fix_versions": ["2.0"]}
SKIPPED = {"name": "b", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "lines", "passes"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], ["audited: 1 packages of L, 0 known vulnerabilities"], True),
        (
            [{"name": "a", "version": "1", "vulns": [FLAW]}, SKIPPED],
            [
                "L: a 1: CVE-1, fixed in 2.0",
                "not audited: 1 of 2 packages of L: not found",
                "audited: 1 packages of L, 1 known vulnerabilities",
            ],
            False,
        ),
        ([SKIPPED], ["not audited: 1 of 1 packages of L: not found"], True),
    ],
)
def test_an_audit_says_what_it_saw(packages: list[Any], lines: list[str], passes: bool) -> None:
    assert AUDIT["judged"]("L", json.dumps({"dependencies": packages}), "") == (lines, passes)


@pytest.mark.parametrize(
    ("errors", "passes"),
    [
        ("requests.exceptions.ConnectionError: no route", True),
        ("requests.exceptions.SSLError: x", True),
        ("hash missing for a", False),
        ("", False),
    ],
)
def test_an_audit_that_did_not_run_passes_only_without_network(errors: str, passes: bool) -> None:
    lines, passed = AUDIT["judged"]("L", "", errors)
    assert passed is passes
    assert len(lines) == 1
    assert lines[0].startswith("not audited: L: ")
