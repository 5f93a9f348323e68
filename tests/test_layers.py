"""The packages lean on each other in one direction only, and all of them are installed."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "distrib": {"distrib"},
    "strategies": {"strategies", "distrib"},
    "launch": {"launch", "strategies", "distrib"},
}
LIGHT = (
    "distrib/errors.py",
    "launch/__main__.py",
    "launch/cli.py",
    "launch/rank.py",
    "launch/spawn.py",
    "launch/words.py",
)
HEAVY = {"torch", "transformers", "datasets", "peft", "deepspeed", "accelerate", "numpy", "pydantic", "yaml"}


def imported(tree: ast.AST, package: str) -> set[str]:
    """Top-level names of every import below `tree`, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else (node.module or "").split(".")[0])
    return names


def forbidden(source: str, package: str) -> set[str]:
    return (imported(ast.parse(source), package) & set(MAY_IMPORT)) - MAY_IMPORT[package]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    assert {str(path): found for path in files if (found := forbidden(path.read_text(), package))} == {}


def test_an_import_upwards_would_be_seen() -> None:
    assert forbidden("def f():\n    from launch.recipe import Recipe", "strategies") == {"launch"}
    assert forbidden("if 1:\n    import strategies.core.head as h, os", "distrib") == {"strategies"}
    assert forbidden("from . import x\nimport distrib.errors", "distrib") == set()


@pytest.mark.parametrize("name", LIGHT)
def test_what_help_imports_stays_light(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text())
    at_import = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
    assert not imported(at_import, name.split("/")[0]) & HEAVY


def test_every_folder_with_code_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for name in MAY_IMPORT for path in (ROOT / name).rglob("*.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)
