"""Fails where a built page would ask another host for anything: `python docs/asks.py FOLDER`, as `make docs` does.

What a reader clicks on (`a href`) may lead anywhere; what a page loads by itself lies beside it.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

FOREIGN = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"(?:url\(|@import)\s*[\"']?((?:[a-z]+:)?//[^\"')\s;]+)", re.IGNORECASE)
IN_SCRIPT = re.compile(r"(?:fetch|import|importScripts|open|src\s*=)\s*\(?\s*[\"'`]((?:https?:)?//[^\"'`]+)")
LOADED = ("src", "srcset", "href", "data", "poster", "action", "xlink:href")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            return
        self.asked += [value for key, value in attrs if key in LOADED and value and FOREIGN.match(value)]
        self.asked += [found for key, value in attrs if key == "style" for found in IN_STYLE.findall(value or "")]

    def handle_data(self, text: str) -> None:
        if self.cdata_elem == "style":
            self.asked += IN_STYLE.findall(text)
        if self.cdata_elem == "script":
            self.asked += IN_SCRIPT.findall(text)


def asked(path: Path) -> list[str]:
    text = path.read_text(errors="replace")
    if path.suffix == ".css":
        return IN_STYLE.findall(text)
    if path.suffix == ".js":
        return IN_SCRIPT.findall(text)
    page = Page()
    page.feed(text)
    return page.asked


def main(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.suffix in (".html", ".css", ".js", ".svg")]
    found = {path: asked(path) for path in files}
    for path, addresses in found.items():
        for address in addresses:
            print(f"{path}: asks {address}")
    return int(not files or any(found.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
