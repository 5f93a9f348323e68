"""Plots as static SVG: lines, points and bars, readable without colour, on a phone and by a screen reader.

A drawing is 360 units wide whatever the screen, so that its text stays legible on a phone; legends are HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from launch.pages.document import Cell
from launch.pages.html import Html, details, el, table
from launch.pages.text import figure as figure_text

WIDTH, HEIGHT = 360, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 348, 26, 196
BAR_HEIGHT = 36
LONGEST_NAME = 34
COLOURS = 7
SHAPES = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0",
    "M-3.7-3.7h7.4v7.4h-7.4z",
    "M0-5 4.8 3.6h-9.6z",
    "M0-5.4 4.6 0 0 5.4-4.6 0z",
    "M-3.8-3.8 3.8 3.8M3.8-3.8-3.8 3.8",
    "M0 5 4.8-3.6h-9.6z",
)
DASHES = (None, "7 3", "2 2.5")
Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """`show` writes a value of it in full; `zero` begins it there, `whole` keeps its ticks at whole numbers."""

    label: str
    show: Callable[[float], str] = figure_text
    log: bool = False
    zero: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Series:
    """Points (x, y) under a name. `style` picks its colour, shape or dash; the legend leaves out hollow ones."""

    name: str
    points: Sequence[Point]
    style: int = 0
    line: bool = True
    marks: bool = True
    hollow: bool = False

    @property
    def colour(self) -> str:
        return f"s{self.style % COLOURS}"

    @property
    def dash(self) -> str | None:
        return None if self.marks else DASHES[self.style % len(DASHES)]


class Scale:
    """From values to units of the drawing, with round ticks."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, stop: float) -> None:
        self.log = axis.log and min(values) > 0
        zero = [0.0] if axis.zero and not self.log else []
        low, high = self._to(min([*values, *zero])), self._to(max([*values, *zero]))
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        self.low, self.high = low if zero and low == 0 else low - pad, high + pad
        self.start, self.stop = start, stop
        self.label = _binary if self.log else compact
        self.ticks = self._log_ticks() if self.log else self._ticks(axis.whole)

    def __call__(self, value: float) -> float:
        share = (self._to(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.stop - self.start), 1)

    def _to(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _ticks(self, whole: bool) -> list[float]:
        rough = (self.high - self.low) / 4
        size = 10 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.99)
        if whole:
            step = max(1, round(step))
        return [index * step for index in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def _log_ticks(self) -> list[float]:
        """Powers of two, as lengths and memories often are."""
        first, last = (math.log2(10**end) for end in (self.low, self.high))
        powers = range(math.ceil(first), math.floor(last) + 1)
        return [2.0**power for power in powers[:: math.ceil(len(powers) / 6) or 1]]


def compact(value: float) -> str:
    """A tick's label: 20k, 0.5, 2e-4."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for size, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{name}"
    return f"{round(value, 9):g}"


def _binary(value: float) -> str:
    for size, name in ((2**20, "Mi"), (2**10, "Ki")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


def plot(
    key: str,
    title: str,
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    frontier: Sequence[Point] = (),
    events: Sequence[tuple[float, str]] = (),
    figures: bool = True,
) -> Html:
    """Points and lines; `frontier` is drawn as steps that end at the right edge, `events` as vertical lines."""
    points = [point for one in series for point in one.points]
    to_x = Scale(x, [a for a, _ in points], LEFT, RIGHT)
    to_y = Scale(y, [b for _, b in points], BOTTOM, TOP)
    drawn = [*axes(x, to_x, y, to_y)]
    for step, said in events:
        if to_x.low <= step <= to_x.high:
            drawn.append(el("path", el("title", said), d=f"M{to_x(step)} {TOP}V{BOTTOM}", class_="event"))
    if frontier:
        drawn.append(el("path", d=steps([(to_x(a), to_y(b)) for a, b in frontier]), class_="frontier"))
    drawn += [drawn_series(one, to_x, to_y, x, y) for one in series]
    below = [_legend(series, bool(frontier))] if len(series) > 1 or frontier else []
    if figures:
        rows = [[Cell(s.name, s.name), Cell(x.show(a), a), Cell(y.show(b), b)] for s in series for a, b in s.points]
        below.append(details("Figures of this plot", table(title, ["series", x.label, y.label], rows)))
    return _figure(key, title, description, HEIGHT, drawn, below)


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    bounds: Point
    said: str
    style: int


def bars(key: str, title: str, description: str, rows: Sequence[Bar], label: str) -> Html:
    """From zero, each with its name and what is said of it above, and with the bounds of its end."""
    bottom = BAR_HEIGHT * len(rows)
    scale = Scale(Axis(label, zero=True), [bound for row in rows for bound in row.bounds], 8, RIGHT)
    drawn = []
    for tick in scale.ticks:
        drawn.append(el("path", d=f"M{scale(tick)} 0V{bottom}", class_="grid"))
        drawn.append(el("text", scale.label(tick), x=scale(tick), y=bottom + 14, text_anchor="middle", class_="faint"))
    drawn.append(el("text", label, x=RIGHT, y=bottom + 29, text_anchor="end", class_="faint"))
    for top, row in zip(range(0, bottom, BAR_HEIGHT), rows, strict=True):
        short = row.name if len(row.name) <= LONGEST_NAME else row.name[: LONGEST_NAME - 1] + "…"
        low, high, start = *map(scale, row.bounds), scale(0)
        bar = f"M{start} {top + 17}H{scale(row.value)}v12H{start}z"
        drawn += [
            el("text", short, x=8, y=top + 12),
            el("text", row.said, x=RIGHT, y=top + 12, text_anchor="end"),
            el(
                "g",
                el("path", el("title", f"{row.name}: {row.said}"), d=bar, class_="mark"),
                class_=f"s{row.style % COLOURS}",
            ),
        ]
        if low < high:
            whisker = f"M{low} {top + 19}v8M{high} {top + 19}v8M{low} {top + 23}H{high}"
            drawn.append(el("path", d=whisker, class_="bound"))
    return _figure(key, title, description, bottom + 34, drawn, [])


def _figure(key: str, title: str, description: str, height: int, drawn: Iterable[Html], below: Iterable[Html]) -> Html:
    named = [el("title", title, id=f"{key}-title"), el("desc", description, id=f"{key}-desc")]
    labels = {"aria_labelledby": f"{key}-title", "aria_describedby": f"{key}-desc"}
    svg = el("svg", *named, *drawn, viewBox=f"0 0 {WIDTH} {height}", role="img", **labels)
    return el("figure", el("figcaption", el("h3", title)), svg, *below)


def axes(x: Axis, to_x: Scale, y: Axis, to_y: Scale) -> Iterable[Html]:
    for tick in to_y.ticks:
        yield el("path", d=f"M{LEFT} {to_y(tick)}H{RIGHT}", class_="grid")
        yield el("text", to_y.label(tick), x=LEFT - 5, y=to_y(tick) + 4, text_anchor="end", class_="faint")
    for tick in to_x.ticks:
        yield el("path", d=f"M{to_x(tick)} {BOTTOM}v4", class_="grid")
        yield el("text", to_x.label(tick), x=to_x(tick), y=BOTTOM + 16, text_anchor="middle", class_="faint")
    yield el("path", d=f"M{LEFT} {BOTTOM}H{RIGHT}", class_="grid")
    yield el("text", y.label, x=4, y=12, class_="faint")
    yield el("text", x.label, x=RIGHT, y=BOTTOM + 32, text_anchor="end", class_="faint")


def drawn_series(series: Series, to_x: Scale, to_y: Scale, x: Axis, y: Axis) -> Html:
    at = [(to_x(a), to_y(b)) for a, b in series.points]
    parts = []
    if series.line and len(at) > 1:
        d = "M" + "L".join(f"{a} {b}" for a, b in at)
        parts.append(el("path", d=d, class_="line", stroke_dasharray=series.dash))
    if series.marks or len(at) == 1:
        for (a, b), (value_x, value_y) in zip(at, series.points, strict=True):
            said = el("title", f"{series.name}: {x.label} {x.show(value_x)}, {y.label} {y.show(value_y)}")
            parts.append(mark_at(series, a, b, said))
    return el("g", *parts, class_=series.colour)


def mark_at(series: Series, x: float, y: float, *inside: Html) -> Html:
    shape = SHAPES[series.style % len(SHAPES)]
    return el("path", *inside, d=shape, transform=f"translate({x} {y})", class_="hollow" if series.hollow else "mark")


def steps(points: Sequence[Point]) -> str:
    (x, y), *rest = points
    return f"M{x} {y}" + "".join(f"H{a}V{b}" for a, b in rest) + f"H{RIGHT}"


def _legend(series: Sequence[Series], frontier: bool) -> Html:
    entries = []
    for one in (one for one in series if not one.hollow):
        line = [el("path", d="M1 7H27", class_="line", stroke_dasharray=one.dash)] if one.line else []
        mark = [mark_at(one, 14, 7)] if one.marks else []
        entries.append((one.name, el("g", *line, *mark, class_=one.colour)))
    if frontier:
        entries.append(("efficient frontier", el("path", d="M1 7H27", class_="frontier")))
    samples = [(name, el("svg", drawn, viewBox="0 0 28 14", aria_hidden="true")) for name, drawn in entries]
    return el("ul", *(el("li", sample, name) for name, sample in samples), class_="legend")
