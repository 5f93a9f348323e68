"""A document as one HTML file: markup that cannot forget to escape, and a policy that forbids every request."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from launch.pages.document import Block, Cell, Document, Facts, Items, Listing, Notice, Plots, Table
from launch.pages.text import is_finite

VOID = ("meta", "link")


class Html(str):
    """Markup. Any other text is escaped when it goes into an element."""

    __slots__ = ()


def el(name: str, /, *inside: str, **attributes: str | float | None) -> Html:
    """An element; `class_` and `aria_label` are written as HTML has them, attributes that are None left out."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in VOID else f"<{name}{given}>{_joined(inside)}</{name}>")


def _joined(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part, quote=False) for part in parts))


def page(document: Document) -> str:
    """The whole file, in ASCII, so that no encoding on its way can harm it."""
    style, script = (Path(__file__).with_name(name).read_text() for name in ("style.css", "sort.js"))
    policy = {
        "default-src": "'none'",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content="; ".join(map(" ".join, policy.items()))),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("link", rel="icon", href="data:,"),
        el("title", document.title),
        el("style", Html(style)),
    )
    sections = [
        el("section", *([el("h2", title)] if title else []), *map(_block, blocks))
        for title, blocks in document.sections
    ]
    main = el("main", el("h1", document.title), *sections)
    text = el("html", head, el("body", main, el("script", Html(script))), lang="en")
    return f"<!DOCTYPE html>\n{text}\n".encode("ascii", "xmlcharrefreplace").decode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _block(block: Block) -> Html:
    match block:
        case Notice(text):
            return el("p", text, class_="notice")
        case Facts(named):
            pairs = [el("div", el("dt", name), el("dd", value)) for name, value in named.items()]
            return el("dl", *pairs)
        case Items(texts):
            return el("ul", *(el("li", text) for text in texts))
        case Table(label, head, rows):
            return table(label, head, rows)
        case Listing(label, text):
            return details(label, el("pre", text, tabindex=0, role="region", aria_label=label))
        case Plots(drawn):
            return el("div", *drawn, class_="plots")
    return el("p", block) if block else Html("")


def details(title: str, *inside: str) -> Html:
    return el("details", el("summary", title), *inside)


def table(label: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Html:
    """Sorted by the buttons in its head; scrolls by itself where it is wider than the screen."""
    titles = [el("th", el("button", title, type="button"), scope="col", aria_sort="none") for title in head]
    body = [el("tr", *(_cell(cell, index == 0) for index, cell in enumerate(row))) for row in rows]
    made = el("table", el("thead", el("tr", *titles)), el("tbody", *body))
    return el("div", made, class_="scroll", role="region", aria_label=label, tabindex=0)


def _cell(cell: Cell, names_row: bool) -> Html:
    order = cell.order if isinstance(cell.order, str) or is_finite(cell.order) else None
    if names_row:
        return el("th", cell.text, scope="row", data_key=order)
    return el("td", cell.text, data_key=order)
