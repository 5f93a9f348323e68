"""Pages in a real browser: they draw, sort and fit a phone, say nothing on the console and ask for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import NAMES, Browser, find
from page_cases import many, run_folder

from launch.pages.bench import bench_html
from launch.pages.run import run_html

WIDTH = "document.documentElement.scrollWidth"
FIRST_CELLS = "[...document.querySelectorAll('[aria-label=\"All figures\"] tbody tr')].map(row => row.cells[COLUMN].%s)"
HEADS = "[...document.querySelectorAll('[aria-label=\"All figures\"] thead th')].map(head => head.%s)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    if program is None:
        pytest.skip(f"no browser on PATH: {', '.join(NAMES)}")
    made = Browser(program, tmp_path_factory.mktemp("browser"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = run_folder(folder / "a_run_with_a_name_that_is_longer_than_any_phone_is_wide", 50, finished=True)
    made = {"bench": folder / "bench.html", "run": folder / "report.html"}
    made["bench"].write_text(bench_html(many()))
    made["run"].write_text(run_html(run))
    return made


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize(("name", "plots"), [("bench", 5), ("run", 6)])
def test_a_page_draws_says_nothing_asks_for_nothing_and_fits(
    browser: Browser, pages: dict[str, Path], name: str, plots: int, width: int
) -> None:
    browser.open(pages[name], width)
    assert browser.asked == [pages[name].as_uri()]
    assert not browser.connected()
    assert browser.said == []
    drawn = "[...document.querySelectorAll('svg[role=img]')].map(one => one.getBoundingClientRect().width)"
    widths = browser.evaluate(drawn)
    assert len(widths) == plots
    assert all(300 < one <= width for one in widths)
    shapes = "[...document.querySelectorAll('svg[role=img]')].map(one => one.querySelectorAll('.mark,.line').length)"
    assert min(browser.evaluate(shapes)) >= 1
    letters = "[...document.querySelectorAll('svg[role=img] text')].map(one => one.getBoundingClientRect().height)"
    assert min(browser.evaluate(letters)) > 10
    assert browser.evaluate(WIDTH) <= width


def test_what_the_tests_look_for_can_be_seen(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    phone = "<meta name='viewport' content='width=device-width'><p style='width:900px'>x</p>"
    bad.write_text(f"{phone}<img src='http://ebbtide.invalid/a.png'><script>console.error('oh')</script>")
    browser.open(bad, 360)
    assert browser.asked[1:] == ["http://ebbtide.invalid/a.png"]
    assert browser.connected(patience_s=10)
    assert "['oh']" in browser.said
    assert browser.evaluate(WIDTH) >= 900
    # The same markup in one of our pages is stopped by its policy.
    smuggled = tmp_path / "smuggled.html"
    smuggled.write_text(pages["bench"].read_text().replace("</main>", bad.read_text() + "</main>"))
    browser.open(smuggled, 360)
    assert not browser.connected()
    assert len([said for said in browser.said if "Content Security Policy" in said]) == 3
    assert "['oh']" not in browser.said


def test_titles_sort_by_mouse_and_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["bench"])
    titles = browser.evaluate(HEADS % "textContent")
    column = titles.index("tokens/s")
    cells = FIRST_CELLS.replace("COLUMN", str(column))

    def press(number: int) -> None:
        browser.click(f"[aria-label='All figures'] th:nth-child({number + 1}) button")

    before = browser.evaluate(cells % "dataset.key ?? null")
    known = sorted(float(key) for key in before if key is not None)
    assert [key for key in before if key is not None] != [str(key) for key in known]
    press(column)
    after = browser.evaluate(cells % "dataset.key ?? null")
    assert [float(key) for key in after[: len(known)]] == known
    assert set(after[len(known) :]) == {None}
    press(column)
    after = browser.evaluate(cells % "dataset.key ?? null")
    assert [float(key) for key in after[: len(known)]] == known[::-1]
    assert set(after[len(known) :]) == {None}
    states = browser.evaluate(HEADS % "getAttribute('aria-sort')")
    assert states.pop(column) == "descending"
    assert set(states) == {"none"}
    press(0)
    names = browser.evaluate(FIRST_CELLS.replace("COLUMN", "0") % "textContent")
    assert [name.split(" ")[0] for name in names[:2]] == ["fp4", "fp4"]
    assert browser.evaluate(HEADS % "getAttribute('aria-sort')")[0] == "ascending"
    browser.evaluate("document.querySelectorAll('[aria-label=\"All figures\"] th button')[1].focus()")
    browser.press("Enter", 13)
    assert browser.evaluate(HEADS % "getAttribute('aria-sort')")[:2] == ["none", "ascending"]


@pytest.mark.parametrize("name", ["bench", "run"])
def test_a_screen_reader_is_told_of_plots_buttons_and_tables(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.open(pages[name])
    told = browser.accessible()
    images = [(title, said) for role, title, said in told if role in ("image", "img")]
    assert len(images) == {"bench": 5, "run": 6}[name]
    assert all(title and len(said) > 20 for title, said in images)
    buttons = [title for role, title, _ in told if role == "button"]
    assert len(buttons) > 10
    assert all(buttons)
    assert all(title for role, title, _ in told if role == "region")
    headings = browser.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(one => +one.tagName[1])")
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    # What scrolls by itself can be reached with the keyboard.
    scrolling = "[...document.querySelectorAll('.scroll,pre')].every(one => one.tabIndex === 0)"
    assert browser.evaluate(scrolling)


def test_dark_is_dark(browser: Browser, pages: dict[str, Path]) -> None:
    def lightness(dark: bool) -> list[int]:
        browser.open(pages["bench"], dark=dark)
        colours: list[Any] = browser.evaluate(
            "['backgroundColor', 'color'].map(kind => getComputedStyle(document.body)[kind].match(/\\d+/g).map(Number))"
        )
        return [sum(colour) for colour in colours]

    (light_page, light_text), (dark_page, dark_text) = lightness(False), lightness(True)
    assert light_page > 700 > 100 > light_text
    assert dark_text > 600 > 100 > dark_page
