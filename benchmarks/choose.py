"""The picture of docs/choose.md, from what `ebbtide bench --json` printed.

    python benchmarks/choose.py docs/results/choose-cpu.json docs/results/choose-cpu.svg

Every row that has both figures is a mark: tokens a second against the peak of activations, both by those of the first
side; below it stand the figures themselves, so that the picture is read without colour. A script draws it, not a hand:
a test holds the picture to the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.pages import svg
from launch.pages.bench import frontier
from launch.pages.html import Html, el
from launch.pages.text import byte_count

LINE, KEY = 19, 244
STYLE = """
svg { color-scheme: light dark; --page: #ffffff; --text: #1c1e21; --faint: #5b6068; --rule: #d4d7dc;
  --s0: #0062a8; --s1: #c24a00; --s2: #007a5a; --s3: #a23c85; --s4: #846200; --s5: #00808f; --s6: #4d4d4d }
@media (prefers-color-scheme: dark) {
  svg { --page: #15171a; --text: #e6e8eb; --faint: #a3a9b2; --rule: #3a3f46;
    --s0: #6cb6f5; --s1: #ff9a5c; --s2: #3fd3a2; --s3: #ea9bd2; --s4: #e3c04a; --s5: #5fd6e4; --s6: #c9c9c9 }
}
text { font: 11.5px system-ui, sans-serif; fill: var(--text) }
.page { fill: var(--page) } .faint { fill: var(--faint) } .grid { stroke: var(--rule) }
.mark { fill: currentColor; stroke: currentColor; stroke-width: 1.5; stroke-linejoin: round }
.hollow { fill: none; stroke: currentColor; stroke-width: 2 }
.frontier { fill: none; stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 5 3 }
""" + "".join(f".s{index} {{ color: var(--s{index}) }}\n" for index in range(svg.COLOURS))
Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what `ebbtide bench --json` printed")
    parser.add_argument("picture", type=Path, help="the .svg")
    options = parser.parse_args()
    options.picture.write_text(picture(json.loads(options.result.read_text())))
    print(f"written: {options.picture}")


def place(row: Row, first: Row) -> svg.Point:
    """(memory, speed), both by the first side's."""
    return row["activation_peak_bytes"] / first["activation_peak_bytes"], row["tokens_per_s"] / first["tokens_per_s"]


def picture(result: Mapping[str, Any]) -> str:
    rows = [row for row in result["rows"] if row.get("activation_peak_bytes") and row.get("tokens_per_s")]
    series = [
        svg.Series(row["strategy"], [place(row, rows[0])], style, line=False, hollow=row["fidelity"] != "exact")
        for style, row in enumerate(rows)
    ]
    edge = [
        place(row, rows[0]) for row in frontier([{**row, "peak_bytes": row["activation_peak_bytes"]} for row in rows])
    ]
    height = KEY + LINE * (len(rows) + 1) + 6
    described = "; ".join(" ".join(words) for words in map(figures, rows, [rows[0]] * len(rows)))
    drawn = el(
        "svg",
        el("title", "Speed against memory", id="title"),
        el("desc", described, id="desc"),
        el("style", Html(STYLE)),
        el("rect", width=svg.WIDTH, height=height, class_="page"),
        *plotted(series, edge),
        *key(series, rows),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {svg.WIDTH} {height}",
        role="img",
        aria_labelledby="title",
        aria_describedby="desc",
    )
    return drawn.encode("ascii", "xmlcharrefreplace").decode() + "\n"


def plotted(series: Sequence[svg.Series], edge: Sequence[svg.Point]) -> Iterator[Html]:
    points = [point for one in series for point in one.points]
    name = series[0].name
    x = svg.Axis(f"peak of activations, of {name}'s")
    y = svg.Axis(f"tokens/s, of {name}'s", zero=True)
    to_x = svg.Scale(x, [0.0, *(a for a, _ in points)], svg.LEFT, svg.RIGHT)
    to_y = svg.Scale(y, [b for _, b in points], svg.BOTTOM, svg.TOP)
    yield from svg.axes(x, to_x, y, to_y)
    yield el("path", d=svg.steps([(to_x(a), to_y(b)) for a, b in edge]), class_="frontier")
    yield from (svg.drawn_series(one, to_x, to_y, x, y) for one in series)


def figures(row: Row, first: Row) -> tuple[str, str, str, str]:
    memory, speed = place(row, first)
    return row["strategy"], f"{speed:.2f}", f"{memory:.2f}", byte_count(row["activation_peak_bytes"])


def key(series: Sequence[svg.Series], rows: Sequence[Row]) -> Iterator[Html]:
    """A line a side: mark, name, figures."""
    columns = (246, 290, svg.RIGHT)
    for x, title in zip(columns, ("tokens/s", "memory", "peak"), strict=True):
        yield el("text", title, x=x, y=KEY + 4, text_anchor="end", class_="faint")
    for line, (one, row) in enumerate(zip(series, rows, strict=True), 1):
        y = KEY + LINE * line
        name, *said = figures(row, rows[0])
        yield el("g", svg.mark_at(one, 10, y), class_=one.colour)
        yield el("text", name, x=22, y=y + 4)
        yield from (el("text", text, x=x, y=y + 4, text_anchor="end") for x, text in zip(columns, said, strict=True))


if __name__ == "__main__":
    main()
