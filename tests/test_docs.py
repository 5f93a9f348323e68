"""Pages say what is so: links lead somewhere, examples work, messages are those of the code, no page is missing."""

from __future__ import annotations

import ast
import json
import re
import runpy
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import choose
import pytest
import torch
from contract import reference
from contract.checks import CHECKS
from doc_pages import PAGES, ROOT, SHELL, Block, blocks, strategy_of_the_docs, tokens

import strategies
from launch.recipe import Recipe
from launch.strict_yaml import parse

LINKED = [*PAGES, ROOT / "CHANGELOG.md"]
OURS = ("distrib", "strategies", "launch")


def slug(title: str) -> str:
    """As GitHub names a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    pairs = zip(tokens(page), tokens(page)[1:], strict=False)
    titles = [inside.children or () for begin, inside in pairs if begin.type == "heading_open"]
    return {slug("".join(part.content for part in parts)) for parts in titles}


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            if child.type in ("link_open", "image"):
                yield str(child.attrGet("href") or child.attrGet("src"))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https", link
            assert parts.netloc, link
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not parts.fragment or parts.fragment in anchors(target), link


def test_every_page_is_in_the_sidebar_and_every_entry_is_a_page() -> None:
    site = runpy.run_path(str(ROOT / "docs/conf.py"))
    entries = [entry for pages in site["NAV"].values() for entry in pages]
    pages = [_from_docs(page) for page in LINKED]
    assert [page for page in pages if page != "index" and not any(fnmatch(page, entry) for entry in entries)] == []
    assert [entry for entry in entries if not any(fnmatch(page, entry) for page in pages)] == []


def _from_docs(page: Path) -> str:
    docs = ROOT / "docs"
    name = page.relative_to(docs) if page.is_relative_to(docs) else Path("..") / page.relative_to(ROOT)
    return str(name.with_suffix(""))


def test_blocks_are_of_languages_that_are_checked() -> None:
    known = {*SHELL, "yaml", "python", "text", "toml"}
    assert [block.where for block in blocks() if block.language not in known] == []


def test_the_picture_of_the_choice_is_that_of_its_figures() -> None:
    results = ROOT / "docs/results"
    found = json.loads((results / "choose-cpu.json").read_text())
    assert choose.picture(found) == (results / "choose-cpu.svg").read_text()
    slower = [
        {**row, "tokens_per_s": row["tokens_per_s"] * (0.5 if index else 1)} for index, row in enumerate(found["rows"])
    ]
    assert choose.picture({**found, "rows": slower}) != choose.picture(found)


def of(language: str, but: str = "\n") -> object:
    found = [block for block in blocks() if block.language == language and not block.text.startswith(but)]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.where)


@of("yaml")
def test_recipes_and_their_fragments_are_accepted(block: Block) -> None:
    """Lines that give a key again are other ways to say it: each is tried with the rest."""
    parts = [parse(part, block.where) for part in re.split(r"^(?=\w)", block.text, flags=re.MULTILINE) if ":" in part]
    given = [next(iter(part.items())) for part in parts if part]
    assert given
    for key, value in given:
        Recipe(**{**dict(given), key: value})


@pytest.fixture
def model() -> torch.nn.Module:
    return reference.tiny_model("full")


@of("python", but='"""strategies/')
def test_python_runs(block: Block, model: torch.nn.Module) -> None:
    batch = reference.cases()["one"][0]
    names = {"__name__": "docs", "model": model, "ids": batch["input_ids"], "labels": batch["labels"]}
    names |= {"mask": torch.ones_like(batch["input_ids"]), "my_loss": lambda logits: logits.square().mean()}
    exec(compile(block.text, block.where, "exec"), names)
    if "prepare" in block.text or "attach" in block.text:
        assert all(p.grad is not None for p in model.parameters())


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with strategy_of_the_docs(tmp_path_factory.mktemp("strategies")) as name:
        yield name


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_the_strategy_of_the_docs_keeps_the_contract(check: object, example: str) -> None:
    assert example in strategies.names()
    check(strategies.get(example))  # type: ignore[operator]


@cache
def texts() -> str:
    """Every text in the code, a line each, with an end of line for what differs."""
    found = []
    for path in [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "\n" for p in node.values))
    return "\n".join(found)


def fixed_parts(message: str) -> list[str]:
    return [part for part in message.split("...") if len(part) > 6]


MESSAGES = [
    pytest.param(line, id=line)
    for block in blocks()
    for line in block.text.splitlines()
    if block.language == "text" and block.where.startswith("docs/troubleshooting.md")
]


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str) -> None:
    assert sum(map(len, fixed_parts(message))) > 12
    assert [part for part in fixed_parts(message) if part not in texts()] == []


def test_a_message_that_the_code_does_not_have_is_found() -> None:
    said = "nproc=..., but the launcher started ... ranks on this machine: leave nproc out, or start ..."
    assert all(part in texts() for part in fixed_parts(said))
    assert not all(part in texts() for part in fixed_parts(said.replace("started", "began")))
    assert not all(part in texts() for part in fixed_parts(said.replace("leave", "drop")))
