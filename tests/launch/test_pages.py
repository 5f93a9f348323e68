"""What pages say, without a browser: nothing unknown as a number, nothing of a user's as markup, no secret."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_cases import GIB, MEAN, many, nothing, result, row, run_folder, write_lines

from distrib.errors import UserError
from distrib.redaction import clean
from launch.pages import svg
from launch.pages.bench import bench_html, bench_markdown, bench_table, frontier
from launch.pages.html import el
from launch.pages.run import run_html, run_markdown, thinned, write_pages
from launch.pages.text import figure, si

BENCH: list[Callable[[Any], str]] = [bench_html, bench_markdown, bench_table]
RUN: list[Callable[[Path], str]] = [run_html, run_markdown]
VOID = {"meta", "link"}
STYLE = Path(svg.__file__).with_name("style.css").read_text()


class Page(HTMLParser):
    """Elements in order, each (name, attributes, text below it); every one must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def all(self, name: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        found = [(attributes, "".join(text)) for tag, attributes, text in self.elements if tag == name]
        return [(a, text) for a, text in found if all(a.get(key) == value for key, value in wanted.items())]

    def table(self, label: str) -> list[list[tuple[str, str | None]]]:
        """(text, sort key) of every cell, by row, of the table in the region of this name."""
        inside, rows = False, []
        for tag, attributes, text in self.elements:
            if attributes.get("class") == "scroll":
                inside = attributes["aria-label"] == label
            elif inside and tag == "tr":
                rows.append([])
            elif inside and tag in ("th", "td"):
                rows[-1].append(("".join(text), attributes.get("data-key")))
        return rows


def figures(made: dict[str, Any]) -> list[dict[str, tuple[str, str | None]]]:
    head, *rows = Page(bench_html(made)).table("All figures")
    return [dict(zip([title for title, _ in head], cells, strict=True)) for cells in rows]


@pytest.mark.parametrize("render", BENCH)
def test_a_users_text_is_never_markup_and_secrets_are_left_out(render: Callable[[Any], str]) -> None:
    text = render(many())
    assert "SEEN" not in text
    assert "5550199" not in text
    assert "(hidden)" in text
    assert "alert(1)" in text
    if render is bench_html:
        assert [text for _, text in Page(text).all("script") if "alert" in text] == []
        assert "num_key_value_heads: 2" in text
    if render is bench_markdown:
        assert r"\<script\>alert(1)\</script\>" in text
        assert len({line.count("|") - line.count(r"\|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_control_characters_do_not_reach_a_terminal() -> None:
    text = bench_table(result([nothing("x", 8, status="failed", why="\x1b[2J\x07red\u202e")]))
    assert re.search(r"x at length 8: failed: \[2J red$", text, re.MULTILINE)
    assert all(character.isprintable() or character == "\n" for character in text)


def test_what_is_unknown_is_said_and_is_no_number() -> None:
    rows = {cells["strategy"][0]: cells for cells in figures(many())}
    unknown = rows["unmeasured"]
    measured = [title for title in unknown if title not in ("strategy", "length", "status", "fidelity")]
    assert len(measured) == 18
    assert {unknown[title] for title in measured} == {("unknown", None)}
    assert rows["gc"]["status"][0] == "out of memory: 31 GiB of logits"
    assert {rows["gc"][title] for title in measured} == {("not measured", None)}
    assert all(text for cells in rows.values() for text, _ in cells.values())
    known = rows["plain, baseline"]
    assert known["tokens/s"] == ("20,000", "20000")
    assert known["energy per token"] == ("12.3 mJ ± 4 %", "0.0123")
    assert known["step time / plain's"] == ("1.25 (1.2 to 1.3)", "1.25")
    assert known["longest length"] == ("16,384 in 24 GiB", "16384")


def test_the_longest_length_is_unknown_only_where_it_was_asked() -> None:
    def longest(*lengths: int | None) -> list[str]:
        rows = [row(f"s{index}", 8, 1, 1, max_length=length) for index, length in enumerate(lengths)]
        return [cells["longest length"][0] for cells in figures(result(rows))]

    assert longest(None, None) == ["not asked", "not asked"]
    assert longest(None, 99) == ["unknown", "99 in 24 GiB"]


def test_a_zero_and_what_is_no_number_are_shown_as_such() -> None:
    rows = figures(result([row("a", 8, 1, 1, grad_error=0.0), row("b", 8, 1, 1, grad_error=math.nan)]))
    assert [cells["gradient error"] for cells in rows] == [("0 (float32)", "0.0"), ("not a number (float32)", None)]


@pytest.mark.parametrize("render", BENCH)
def test_a_comparison_of_nothing_is_a_page(render: Callable[[Any], str]) -> None:
    empty: dict[str, Any] = {"rows": [], "status": "partial", "machine": {}, "model": {}, "recipe": {}}
    assert "partial" in render(empty)
    text = render(result([nothing("x", 8)]))
    assert "unknown" in text
    if render is bench_html:
        page = Page(text)
        assert page.all("svg") == []
        reasons = [text for _, text in page.all("p") if text.startswith("There is no plot: ")]
        assert len(reasons) == 3


@pytest.mark.parametrize("seed", range(8))
def test_any_figure_may_be_missing_or_no_number(seed: int) -> None:
    draw = random.Random(seed)
    rows = [dict(one) for one in many()["rows"]]
    for one in rows:
        for key in draw.sample(sorted(one.keys() - {"status"}), 12):
            is_number = isinstance(one[key], float)
            one[key] = draw.choice([None, math.nan, math.inf, 0.0]) if is_number else None
    for render in BENCH:
        text = render(result(rows, status=None))
        assert not re.search(r"\b(None|nan|inf)\b", text)


@pytest.mark.parametrize("render", BENCH)
def test_what_is_not_exact_is_marked_wherever_it_is_named(render: Callable[[Any], str]) -> None:
    text = render(many())
    if render is bench_markdown:
        text = text.replace("\\", "")
    for name, mark in (("spaco", "unbiased"), ("fp4", "approximate, emulated")):
        named = re.findall(rf"\b{name}\b[^<]{{0,25}}", text)
        assert len(named) >= 2
        assert all(found.startswith(f"{name} ({mark})") for found in named)
    assert "partial" in text
    assert "Not all of these compute the same gradient" in " ".join(text.split())


def test_engines_and_worlds_are_named_where_they_differ() -> None:
    rows = [row("plain", 8, 1, 1), row("plain", 8, 2, 1, engine="fsdp2")]
    assert [cells["strategy"][0] for cells in figures(result(rows))] == [
        "plain, engine ddp, baseline",
        "plain, engine fsdp2, baseline",
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_is_what_no_other_point_dominates(seed: int) -> None:
    draw = random.Random(seed)
    points = [(draw.randrange(1, 9), draw.randrange(1, 9)) for _ in range(draw.randrange(1, 30))]
    rows = [row(str(index), 8, speed, peak) for index, (peak, speed) in enumerate(points)]
    expected = {
        index
        for index, (peak, speed) in enumerate(points)
        if not any(p <= peak and s >= speed and (p, s) != (peak, speed) for p, s in points)
    }
    found = frontier(rows)
    assert {int(one["strategy"]) for one in found} == expected
    assert found == sorted(found, key=lambda one: (one["peak_bytes"], one["tokens_per_s"]))


def test_the_frontier_is_drawn_and_said() -> None:
    page = Page(bench_html(result([one for one in many()["rows"] if one["length"] == 2048])))
    said = [text for _, text in page.all("li") if text.startswith("Length 2,048")]
    assert said == [
        "Length 2,048: the efficient frontier, from the smallest to the fastest: "
        "spaco (unbiased) (1.5 GiB, 16,000 tokens/s); plain (6 GiB, 20,000 tokens/s). Of the exact strategies alone: "
        "streambp:chunk=512 (2 GiB, 15,000 tokens/s); plain (6 GiB, 20,000 tokens/s)."
    ]
    (drawn,) = [a["d"] for a, _ in page.all("path", **{"class": "frontier"}) if a["d"] != "M1 7H27"]
    where = {
        match[1]: (float(match[2]), float(match[3]))
        for attributes, text in page.all("path", **{"class": "mark"})
        if ": peak memory" in text
        for match in [re.match(r"(.*?): .*?translate\((.*?) (.*?)\)", f"{text}{attributes['transform']}")]
        if match
    }
    assert len(where) == 5
    (x, y), (end_x, end_y) = where["spaco (unbiased)"], where["plain"]
    assert drawn == f"M{x} {y}H{end_x}V{end_y}H{svg.RIGHT}"
    assert x < end_x
    assert y > end_y


def test_bounds_of_energy_are_drawn_around_the_end_of_a_bar() -> None:
    (bar,), (bound,) = [
        re.findall(pattern, svg.bars("k", "t", "d", [svg.Bar("a", 2.0, (1.0, 3.0), "said", 0)], "joules"))
        for pattern in (r'd="M8\.0 17H([\d.]+)v', r'd="M([\d.]+) 19v8M([\d.]+) 19v8')
    ]
    low, high, middle = float(bound[0]), float(bound[1]), float(bar)
    assert middle == pytest.approx((low + high) / 2, abs=0.2)
    assert low == pytest.approx((8 + middle) / 2, abs=0.2)


def test_a_table_can_be_sorted_and_a_plot_has_words_and_figures() -> None:
    page = Page(bench_html(many()))
    heads = page.all("th", scope="col")
    assert {attributes["aria-sort"] for attributes, _ in heads} == {"none"}
    assert len(page.all("button", type="button")) == len(heads)
    plots = page.all("svg", role="img")
    assert len(plots) == 2 + 1 + 2
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes, _ in plots:
        assert {attributes["aria-labelledby"], attributes["aria-describedby"]} <= set(ids)
    rows = page.table("Speed against memory at length 2,048")
    assert [text for text, _ in rows[1]] == ["plain", "6", "20,000"]
    assert len(rows) == 6


def test_texts_in_both_modes_and_series_have_enough_contrast() -> None:
    """WCAG 2: 4.5 for text, 3 for what is drawn."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    modes = [dict(re.findall(r"--(\w+): (#\w{6})", mode)) for mode in STYLE.split("prefers-color-scheme")]
    assert [len(mode) for mode in modes] == [5 + svg.COLOURS] * 2
    for mode, (name, least), ground in itertools.product(
        modes,
        [("text", 4.5), ("faint", 4.5), *((f"s{index}", 3.0) for index in range(svg.COLOURS))],
        ("page", "panel"),
    ):
        low, high = sorted([luminance(mode[name]), luminance(mode[ground])])
        assert (high + 0.05) / (low + 0.05) >= least, (name, ground, mode)


def test_no_two_of_forty_series_look_alike() -> None:
    looks = {(index % svg.COLOURS, index % len(svg.SHAPES)) for index in range(40)}
    assert len(looks) == 40


@pytest.mark.parametrize(
    ("values", "log"),
    [
        ([3.0], False), ([0.0], False), ([1e-6, 3e-6], False), ([1, 7, 1000], False), ([-5.0, 2.5], False),
        ([1e12, 1e13], False), ([0.1, 9], True), ([1, 7, 1000], True), ([128, 2**22], True), ([0.0, 7.0], True),
    ],
)  # fmt: skip
def test_ticks_are_round_few_and_inside(values: list[float], log: bool) -> None:
    scale = svg.Scale(svg.Axis("x", log=log), values, 0, 100)
    assert scale.log is (log and min(values) > 0)
    assert [scale(value) for value in sorted(values)] == sorted(scale(value) for value in values)
    assert all(0 <= scale(value) <= 100 for value in [*values, *scale.ticks])
    assert len(scale.ticks) <= 8
    assert len(scale.ticks) >= (2 if len(values) > 1 else 0)
    labels = [scale.label(tick) for tick in scale.ticks]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels), default=0) <= 7


def test_numbers_are_short_and_honest() -> None:
    assert [figure(value) for value in (0, 1234567, 0.00012345, 12.3456, math.inf)] == [
        "0", "1,234,567", "0.0001234", "12.35", "infinite",
    ]  # fmt: skip
    assert [si(value, "J") for value in (0.0, 1.5e-5, 0.0123, 1, 45600.0)] == [
        "0 J",
        "15 µJ",
        "12.3 mJ",
        "1 J",
        "45.6 kJ",
    ]
    assert [svg.compact(value) for value in (0, 2e-4, 0.1 + 0.2, 20000, 2.5e6)] == ["0", "2e-4", "0.3", "20k", "2.5M"]


def test_values_of_keys_that_look_like_secrets_are_hidden() -> None:
    known = {"API_KEY": 1, "a": [{"hubToken": "x", "pad_token_id": 3, "client_secret": None}], "user_password_id": "y7"}
    assert clean(known) == {
        "API_KEY": "(hidden)",
        "a": [{"hubToken": "(hidden)", "pad_token_id": 3, "client_secret": None}],
        "user_password_id": "(hidden)",
    }
    said = clean("run --hub-token abc MY_SECRET='a b' num_key_value_heads=2 seed=3")
    assert said == "run --hub-token (hidden) MY_SECRET=(hidden) num_key_value_heads=2 seed=3"


def test_an_element_escapes_what_is_not_one() -> None:
    assert el("p", "<b>&", el("i", '"'), title='"<') == '<p title="&quot;&lt;">&lt;b&gt;&amp;<i>"</i></p>'


def test_a_run_is_told_whole(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", 6, finished=True)
    page = Page(run_html(folder))
    assert "Finished, with step 6." in [text for _, text in page.all("p")]
    assert len(page.all("svg", role="img")) == 6
    said = {text for _, text in page.all("dd")}
    assert said >= {"6", "600", "4.9", "101", "1 GiB", "60 J", "40 J", "20 W", "counter", "100 %", "plain", "ddp", "2"}
    assert "one device was lost" in [text for _, text in page.all("li")]
    assert [row[1][0] for row in page.table("Events")[1:]] == [
        "start", "stop", "resume", "skipped step", "precision switch",
    ]  # fmt: skip
    assert page.table("Evaluations")[1] == [("2", "2"), ("4.25", "4.25"), ("8", "8")]
    assert page.all("pre")[0][1] == "a text </pre> of the model"
    assert len(page.all("path", **{"class": "event"})) == 6 * len(
        ["stop", "resume", "skipped step", "precision switch"]
    )


def test_power_is_energy_by_time_and_leaves_out_the_time_between_two_starts(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", 4, finished=True)
    power = [row[-1] for row in Page(run_html(folder)).table("The lines")[1:]]
    assert power == [("20 W", "20.0"), ("20 W", "20.0"), ("20 W", "20.0"), ("20 W", "20.0")]
    (folder / "events.jsonl").unlink()
    assert [row[-1][0] for row in Page(run_html(folder)).table("The lines")][1:] == [
        "unknown", "20 W", "0.01998 W", "20 W",
    ]  # fmt: skip


def test_power_that_is_unknown_says_why(tmp_path: Path) -> None:
    page = Page(run_html(run_folder(tmp_path / "mine", 4, finished=True, joules=None)))
    assert "Power: unknown, one device was lost" in [text for _, text in page.all("p")]
    assert len(page.all("svg", role="img")) == 5


@pytest.mark.parametrize("render", RUN)
def test_energy_names_its_devices_and_whose_carbon_it_is(tmp_path: Path, render: Callable[[Path], str]) -> None:
    folder = run_folder(tmp_path / "mine", 4, finished=True)
    report = json.loads((folder / "report.json").read_text())
    gpu = {"kind": "gpu", "name": "GPU-1", "joules": 700.0}
    parts = [gpu, {"kind": "package", "name": "package-0", "joules": None}]
    carbon = {"grams_co2": 12.5, "grams_co2_per_kwh": 380.0, "intensity_source": "the grid's own figure"}
    report["energy"] |= {"parts": parts, "resets": 0} | carbon
    (folder / "report.json").write_text(json.dumps(report))
    page = unescape(render(folder))
    assert "CO2 (380 g/kWh, the grid's own figure)" in page
    assert "12.5 g" in page
    assert "gpu GPU-1" in page
    assert "package package-0" in page
    assert "resets of counters" in page


@pytest.mark.parametrize("render", RUN)
def test_an_unfinished_run_says_so_and_why(tmp_path: Path, render: Callable[[Path], str]) -> None:
    folder = run_folder(tmp_path / "mine", 6, finished=False)
    assert "Not finished: the newest step on record is 5 of 6. It ended early: told to." in render(folder)
    # The report of a run that has gone on since is of another step.
    (folder / "report.json").write_text(json.dumps({"step": 3, "tokens": 777, "device": "old"}))
    assert "Not finished" in render(folder)
    assert "777" not in render(folder)
    write_lines(folder / "metrics.jsonl", [])
    (folder / "report.json").unlink()
    assert "no step is on record" in render(folder)


@pytest.mark.parametrize("render", RUN)
def test_a_runs_page_has_no_markup_and_no_secret_of_a_user(tmp_path: Path, render: Callable[[Path], str]) -> None:
    text = render(run_folder(tmp_path / "mine", 4, True, config_overrides={"a": MEAN, "API_KEY": "hf_SEEN"}))
    assert "SEEN" not in text
    assert "alert(1)" in text
    assert "&lt;script&gt;alert" in text if render is run_html else r"\<script\>alert" in text
    assert render is run_html or "\n\n    a text </pre> of the model\n" in text


def test_damage_is_one_line(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", 4, finished=True)
    (folder / "metrics.jsonl").write_text("{\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: "):
        write_pages(folder)
    assert not (folder / "report.html").exists()
    with pytest.raises(UserError, match="is not a run"):
        write_pages(tmp_path)


def test_thinning_keeps_order_ends_of_stretches_and_every_spike() -> None:
    points = [(float(step), 1.0 + 0.001 * (step % 7)) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[7007] = (7007.0, -5.0)
    kept = thinned(points, 400)
    assert len(kept) <= 401
    assert kept == sorted(kept)
    assert {(4321.0, 99.0), (7007.0, -5.0)} <= set(kept)
    assert set(kept) <= set(points)
    assert thinned(points[:400], 400) == points[:400]


def test_the_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", 20_000, finished=True)
    text = run_html(folder)
    assert len(text) < 400_000
    rows = Page(text).table("The lines")
    assert [rows[1][0][0], rows[-1][0][0]] == ["1", "20,000"]
    assert len(rows) <= 103


def test_the_command_writes_both_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from launch import cli

    folder = run_folder(tmp_path / "mine", 4, finished=False)
    assert cli.main(["report", str(folder), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made == {"html": str(folder / "report.html"), "markdown": str(folder / "report.md")}
    assert (folder / "report.html").read_text("ascii").startswith("<!DOCTYPE html>\n<html lang=")
    assert (folder / "report.md").read_text("utf-8").startswith("# Run mine: tiny\n")


def test_columns_of_the_terminals_table_are_aligned_and_narrow() -> None:
    text = bench_table(many())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    head = lines[0]
    assert re.findall(r"\S+(?: \S+)*", head) == [
        "strategy", "length", "tokens/s", "s/step", "/ plain", "peak", "longest", "per token", "grad error",
    ]  # fmt: skip
    assert lines[1].startswith("plain ")
    assert len(lines[1]) == len(head)
    for index in (head.index("length") + 6, head.index("peak") + 4):
        assert all(line[index - 1] != " " and line[index : index + 1] in (" ", "") for line in lines[:4])


def test_what_no_row_knows_is_said_below_the_terminals_table() -> None:
    text = bench_table(result([row("plain", 8, 1, GIB, joules_per_token=None, max_length=None)]))
    assert "per token" not in text.splitlines()[0]
    assert "energy per token: unknown" in text
    assert "longest length: not asked" in text
