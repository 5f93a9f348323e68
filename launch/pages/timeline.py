"""Timelines of pipelines as a picture: a row a rank, a box an operation, and below it what the rank holds.

Boxes have letters and differ in fill, so that the picture is read without colour; idle time is hatched. Several
timelines stand under one another on one scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from distrib.pipeline.ops import Op
from distrib.pipeline.record import Timeline
from distrib.pipeline.simulate import Costs, memory
from launch.pages.html import Html, el
from launch.pages.png import Canvas
from launch.pages.svg import Axis, Scale
from launch.pages.text import UNKNOWN, byte_count, figure, percent, si

WIDTH, LEFT, RIGHT = 960, 98, 948
TOP, HEAD, BOX, CURVE, GAP, FOOT = 40, 34, 20, 18, 10, 44
LETTER = 7.2
KINDS = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradients of the weights"}
STYLE = """
svg { color-scheme: light dark; --page: #ffffff; --text: #1c1e21; --faint: #5b6068; --rule: #d4d7dc;
  --F: #0062a8; --B: #a23c85; --I: #f5b78f; --W: #ffffff; --edge: #c24a00 }
@media (prefers-color-scheme: dark) {
  svg { --page: #15171a; --text: #e6e8eb; --faint: #a3a9b2; --rule: #3a3f46;
    --F: #6cb6f5; --B: #ea9bd2; --I: #7a3a12; --W: #15171a; --edge: #ff9a5c }
}
text { font: 11.5px system-ui, sans-serif; fill: var(--text) }
.faint { fill: var(--faint) }
.head { font-weight: 600 }
.page { fill: var(--page) }
.grid { stroke: var(--rule) }
.idle { fill: url(#idle); stroke: var(--rule) }
.idle-line { stroke: var(--faint); stroke-width: .7 }
.memory { fill: none; stroke: var(--text); stroke-width: 1.4 }
.F { fill: var(--F); stroke: var(--page) } .B { fill: var(--B); stroke: var(--page) }
.I { fill: var(--I); stroke: var(--edge) } .W { fill: var(--W); stroke: var(--edge); stroke-dasharray: 3 1.5 }
.onF, .onB { fill: var(--page) }
"""
COLOURS = {
    "F": ((0, 98, 168), (255, 255, 255)),
    "B": ((162, 60, 133), (255, 255, 255)),
    "I": ((245, 183, 143), (194, 74, 0)),
    "W": ((255, 255, 255), (194, 74, 0)),
    "idle": ((255, 255, 255), (212, 215, 220)),
}
TEXT, FAINT, RULE, PAGE = (28, 30, 33), (91, 96, 104), (212, 215, 220), (255, 255, 255)


def micro_batches(count: float) -> str:
    return f"{figure(count)} micro-batch{'' if count == 1 else 'es'}"


@dataclass(frozen=True)
class View:
    """A timeline, and the costs by which its memory is counted, in micro-batches of a rank's share of the model."""

    timeline: Timeline
    costs: Costs
    in_seconds: bool = False
    recorded: bool = False

    @property
    def name(self) -> str:
        words = [self.timeline.schedule]
        if self.recorded:
            words.append("recorded" if self.timeline.step is None else f"recorded in step {self.timeline.step}")
        elif self.in_seconds:
            words.append("simulated at the recorded costs")
        return ", ".join(words)

    @cached_property
    def peaks(self) -> list[float]:
        """The most micro-batches that each rank holds."""
        return [max(value for _, value in curve) for curve in self.curves]

    @cached_property
    def curves(self) -> list[list[tuple[float, float]]]:
        return [memory(spans, self.costs) for spans in self.timeline.ranks]

    def time(self, value: float) -> str:
        return si(value, "s") if self.in_seconds else figure(value)

    def peak(self) -> str:
        """The highest of the ranks, measured where the timeline was recorded."""
        if not self.recorded:
            return micro_batches(max(self.peaks))
        known = [peak for peak in self.timeline.peak_bytes if peak is not None]
        return byte_count(max(known)) if known else UNKNOWN

    def said(self) -> str:
        line = self.timeline
        return f"{self.name}: step {self.time(line.seconds)}, idle {percent(line.bubble)}, peak {self.peak()}"


@dataclass(frozen=True)
class Rect:
    """`kind` is an operation's letter, or idle; `said` is its title."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    label: str = ""
    said: str = ""


@dataclass(frozen=True)
class Text:
    x: float
    y: float
    text: str
    kind: str = ""
    anchor: str = "start"


@dataclass(frozen=True)
class Path:
    """A line through the points; `kind` is grid or memory."""

    points: Sequence[tuple[float, float]]
    kind: str


Mark = Rect | Text | Path


def _marks(views: Sequence[View]) -> tuple[float, list[Mark]]:
    """The height of the picture, and all that is on it."""
    longest = max(view.timeline.seconds for view in views)
    most = max(peak for view in views for peak in view.peaks)
    axis = Axis("time in seconds" if views[0].in_seconds else "time, in units of the costs", zero=True)
    scale = Scale(axis, [0.0, longest], LEFT, RIGHT)
    marks: list[Mark] = [*_legend()]
    top = float(TOP)
    for view in views:
        marks.append(Text(12, top + 20, view.said(), "head"))
        top += HEAD
        bottom = top + len(view.timeline.ranks) * (BOX + CURVE + GAP)
        marks += [Path([(scale(tick), top), (scale(tick), bottom)], "grid") for tick in scale.ticks]
        for rank in range(len(view.timeline.ranks)):
            marks += _row(view, rank, top, scale, most)
            top += BOX + CURVE + GAP
    marks += [Text(scale(tick), top + 12, scale.label(tick), "faint", "middle") for tick in scale.ticks]
    marks.append(Text(12, top + 32, "lines: micro-batches held, with the most beside them", "faint"))
    marks.append(Text(RIGHT, top + 32, axis.label, "faint", "end"))
    return top + FOOT, marks


def _legend() -> Iterator[Mark]:
    x = 12.0
    for kind, name in (*KINDS.items(), ("idle", "idle")):
        yield Rect(x, 12, BOX, 16, kind, kind if kind in KINDS else "")
        yield Text(x + BOX + 6, 24, name)
        x += BOX + 26 + 6.4 * len(name)


def _row(view: View, rank: int, top: float, scale: Scale, most: float) -> Iterator[Mark]:
    line = view.timeline
    spans, split = line.ranks[rank], len({span.op.stage for span in line.ranks[rank]}) > 1
    busy = sum(span.end - span.start for span in spans)
    idle = percent(round(1 - busy / line.seconds, 4))
    yield Text(12, top + 14, f"rank {rank}")
    yield Text(12, top + BOX + 13, f"idle {idle}", "faint")
    yield Rect(scale(0), top, scale(line.seconds) - scale(0), BOX, "idle", said=f"rank {rank}: idle {idle} of the step")
    for op, start, end in spans:
        left, right = scale(start - line.start), scale(end - line.start)
        said = f"{op}, {KINDS[op.kind]}: {view.time(start - line.start)} to {view.time(end - line.start)}"
        yield Rect(left, top, right - left, BOX, op.kind, _label(op, right - left, split), said)
    base = top + BOX + CURVE
    # of several changes at one time the last one stands
    levels = {scale(0): base} | {
        scale(time - line.start): round(base - (CURVE - 3) * held / most, 1) for time, held in view.curves[rank]
    }
    ends = [*list(levels)[1:], scale(line.seconds)]
    yield Path([(scale(0), base), (scale(line.seconds), base)], "grid")
    yield Path([(x, y) for (start, y), end in zip(levels.items(), ends, strict=True) for x in (start, end)], "memory")
    yield Text(scale(line.seconds) + 6, base - 3, figure(view.peaks[rank]), "faint")


def _label(op: Op, width: float, with_stage: bool) -> str:
    """As much of the operation's name as has room."""
    whole = str(op) if with_stage else f"{op.kind}{op.micro_batch}"
    return next((text for text in (whole, op.kind) if LETTER * len(text) <= width - 1), "")


def svg(title: str, views: Sequence[View]) -> str:
    height, marks = _marks(views)
    described = "; ".join(view.said() for view in views)
    hatch = el("path", d="M0 6 6 0", class_="idle-line")
    pattern = el("pattern", hatch, id="idle", width=6, height=6, patternUnits="userSpaceOnUse")
    drawn = el(
        "svg",
        el("title", title, id="title"),
        el("desc", described, id="desc"),
        el("style", Html(STYLE)),
        el("defs", pattern),
        el("rect", width=WIDTH, height=height, class_="page"),
        *map(_element, marks),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height:g}",
        role="img",
        aria_labelledby="title",
        aria_describedby="desc",
    )
    return drawn.encode("ascii", "xmlcharrefreplace").decode() + "\n"


def _element(mark: Mark) -> Html:
    match mark:
        case Text(x, y, text, kind, anchor):
            return el("text", text, x=_short(x), y=_short(y), text_anchor=anchor, class_=kind or None)
        case Path(points, kind):
            return el("path", d="M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points), class_=kind)
    box = el(
        "rect",
        *([el("title", mark.said)] if mark.said else []),
        x=_short(mark.x),
        y=_short(mark.y),
        width=_short(mark.width),
        height=_short(mark.height),
        class_=mark.kind,
    )
    if not mark.label:
        return box
    middle = (_short(mark.x + mark.width / 2), _short(mark.y + mark.height / 2 + 4))
    text = el("text", mark.label, x=middle[0], y=middle[1], text_anchor="middle", class_=f"on{mark.kind}")
    return el("g", box, text)


def _short(value: float) -> str:
    return f"{round(value, 1):g}"


def png(views: Sequence[View]) -> bytes:
    """The same picture in pixels, two to a unit."""
    height, marks = _marks(views)
    canvas = Canvas(WIDTH, round(height), 2)
    for mark in marks:
        match mark:
            case Text(x, y, text, kind, anchor):
                canvas.text(x, y, text, FAINT if kind == "faint" else TEXT, anchor)
            case Path(points, kind):
                canvas.path(points, TEXT if kind == "memory" else RULE)
            case Rect(x, y, width, tall, kind, label):
                fill, edge = COLOURS[kind]
                canvas.rect(x, y, width, tall, fill, edge, FAINT if kind == "idle" else None)
                canvas.text(x + width / 2, y + tall / 2 + 4, label, PAGE if kind in "FB" else TEXT, "middle")
    return canvas.encoded()


def trace(views: Iterable[View]) -> dict[str, Any]:
    """What chrome://tracing and Perfetto load: a process a rank; a unit of cost stands as a second."""
    events: list[dict[str, Any]] = []
    processes = ((view, rank) for view in views for rank in range(len(view.timeline.ranks)))
    for process, (view, rank) in enumerate(processes):
        common = {"pid": process, "tid": 0}
        events.append({"ph": "M", "name": "process_name", "args": {"name": f"{view.name}: rank {rank}"}, **common})
        for op, start, end in view.timeline.ranks[rank]:
            times = {"ts": (start - view.timeline.start) * 1e6, "dur": (end - start) * 1e6}
            told = {"stage": op.stage, "micro_batch": op.micro_batch}
            events.append({"ph": "X", "name": str(op), "cat": KINDS[op.kind], "args": told, **times, **common})
        for time, held in view.curves[rank]:
            at = (time - view.timeline.start) * 1e6
            events.append({"ph": "C", "name": "held", "ts": at, "args": {"micro-batches": held}, **common})
    return {"traceEvents": events, "displayTimeUnit": "ms"}
