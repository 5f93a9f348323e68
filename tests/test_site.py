"""The built site: nothing in it asks another host, and in a browser its pages fit a phone and its search finds."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import NAMES, Browser, find
from doc_pages import PAGES, ROOT

SPHINX = ROOT / ".venv-docs/bin/sphinx-build"
ASKS = runpy.run_path(str(ROOT / "docs/asks.py"))
HARMLESS = """<a href="https://example.org">a link</a><img src="data:,"><link href="_static/x.css">
<style>p { background: url(x.png) }</style><script>const text = "https://example.org"</script>"""


@pytest.mark.parametrize(
    ("name", "text", "asked"),
    [
        ("x.html", HARMLESS, []),
        ("x.html", '<script src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"]),
        ("x.html", '<link rel="stylesheet" href="//fonts.example/css">', ["//fonts.example/css"]),
        ("x.html", "<style>@import 'https://fonts.example/css';</style>", ["https://fonts.example/css"]),
        ("x.html", '<p style="background: url(http://x.example/y.png)">', ["http://x.example/y.png"]),
        ("x.html", "<script>fetch('https://count.example/')</script>", ["https://count.example/"]),
        ("x.css", "@font-face { src: url(https://fonts.example/a.woff2) }", ["https://fonts.example/a.woff2"]),
        ("x.css", "p { background: url(../a.png) }", []),
        ("x.js", "import('https://cdn.example/x.js')", ["https://cdn.example/x.js"]),
        ("x.js", "// see https://example.org", []),
        ("x.svg", '<svg><image href="https://x.example/y.png"/></svg>', ["https://x.example/y.png"]),
    ],
)
def test_what_a_page_would_ask_is_found(tmp_path: Path, name: str, text: str, asked: list[str]) -> None:
    (tmp_path / name).write_text(text)
    assert ASKS["asked"](tmp_path / name) == asked
    assert ASKS["main"](tmp_path) == bool(asked)


def test_a_folder_without_pages_is_no_site(tmp_path: Path) -> None:
    assert ASKS["main"](tmp_path) == 1


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not SPHINX.exists():
        pytest.skip("Sphinx is not installed: make docs")
    folder = tmp_path_factory.mktemp("site")
    build = [SPHINX, "--quiet", "--fail-on-warning", "--keep-going", "-c", "docs", "-d", folder / "trees", ".", folder]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip(f"no browser on PATH: {', '.join(NAMES)}")
    made = Browser(program, tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.mark.slow
def test_every_page_is_built_and_asks_for_nothing(site: Path) -> None:
    assert ASKS["main"](site) == 0
    built = [(site / page.relative_to(ROOT)).with_suffix(".html") for page in PAGES]
    assert [page for page in built if not page.exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1200])
def test_pages_fit_and_ask_for_what_lies_beside_them(site: Path, browser: Browser, width: int) -> None:
    for page in ("docs/index", "docs/choose", "docs/recipe", "docs/troubleshooting", "docs/results/pipeline-cpu"):
        browser.open(site / f"{page}.html", width)
        assert all(address.startswith((site.as_uri(), "data:")) for address in browser.asked)
        assert browser.said == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, page


@pytest.mark.slow
def test_the_search_finds_without_a_server(site: Path, browser: Browser) -> None:
    browser.open(site / "search.html")
    browser.call("Page.navigate", url=f"{(site / 'search.html').as_uri()}?q=recomputation")
    found = """new Promise(done => { const look = () => {
        const link = document.querySelector("#search-results li a");
        link ? done(link.href) : setTimeout(look, 50) }; look() })"""
    assert browser.evaluate(found).startswith(site.as_uri())
