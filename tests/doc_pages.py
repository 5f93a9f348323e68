"""What README.md, CONTRIBUTING.md and docs/ say in code: blocks, and command lines in them and in text."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

import strategies

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("", "bash", "console")
PROGRAMS = (
    *("ebbtide", "python", "torchrun", "srun", "accelerate", "make", "pip", "pytest", "exec"),
    *("docker", "kubectl", "sbatch", "bash"),
)
ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=\S*$")


@dataclass(frozen=True)
class Block:
    where: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """`words` are without assignments to the environment, `whole` those of a block; `says` is what follows in it."""

    where: str
    words: tuple[str, ...]
    whole: bool
    says: str = ""

    def __str__(self) -> str:
        return shlex.join(self.words)


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def _where(page: Path, token: Token) -> str:
    return f"{page.relative_to(ROOT)}:{token.map[0] + 1 if token.map else '?'}"


def blocks() -> Iterator[Block]:
    for page in PAGES:
        for token in tokens(page):
            if token.type in ("fence", "code_block"):
                yield Block(_where(page, token), token.info.strip(), token.content)


def in_text() -> Iterator[tuple[str, str]]:
    """(where, code) of every `code` in running text."""
    for page in PAGES:
        for token in tokens(page):
            for child in token.children or ():
                if child.type == "code_inline":
                    yield _where(page, token), child.content


def shell_lines(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what follows it): of all lines, or in a session of those behind a $.

    A line that begins with `ebbtide:` is what is printed, so a block of such lines has no command.
    """
    text = block.text.replace("\\\n", " ")
    if re.search(r"^\$ ", text, re.MULTILINE):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            yield tuple(part.split("\n", 1))  # type: ignore[misc]
        return
    yield from ((line, "") for line in text.splitlines() if line and not line.startswith(("#", "ebbtide:")))


def words_of(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    return tuple(words[1:] if words[:1] == ["exec"] else words)


def commands() -> list[Command]:
    found = [
        Command(block.where, words_of(line), True, says)
        for block in blocks()
        if block.language in SHELL
        for line, says in shell_lines(block)
    ]
    for where, code in in_text():
        if re.match(rf"(?:[A-Z]\w*=\S+ )*(?:\.venv/bin/)?(?:{'|'.join(PROGRAMS)})(?: |$)", code):
            found.append(Command(where, words_of(code), False))
    return [command for command in found if command.words]


@contextmanager
def strategy_of_the_docs(folder: Path) -> Iterator[str]:
    """The file of docs/adding-a-strategy.md, found beside the strategies as its reader's would be."""
    (text,) = (b.text for b in blocks() if b.where.startswith("docs/adding-a-strategy.md") and b.language == "python")
    name = re.match(r'"""strategies/(\w+)\.py"""', text)[1]  # type: ignore[index]
    (folder / f"{name}.py").write_text(text)
    strategies.__path__.append(str(folder))
    try:
        yield name
    finally:
        strategies.__path__.remove(str(folder))
        sys.modules.pop(f"strategies.{name}", None)
