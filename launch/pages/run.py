"""A run as a page and as Markdown: what it cost, its course over the steps, and what happened on the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from distrib import journal
from distrib.errors import UserError
from distrib.files import write_text
from distrib.redaction import clean, clean_texts
from launch.pages import document, html, svg, text
from launch.pages.document import Block, Cell, Document, Facts, Items, Listing, Notice, Plots, Table
from launch.pages.text import figure, known

LOCK = "recipe.lock.yaml"
MOST_POINTS, MOST_LINES = 400, 100
Line = Mapping[str, Any]
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step": ("step", figure),
    "loss": ("loss", figure),
    "grad_norm": ("gradient norm", figure),
    "learning_rate": ("learning rate", figure),
    "tokens": ("tokens so far", figure),
    "tokens_per_s": ("tokens/s", figure),
    "nonpad_tokens_per_s": ("non-pad tokens/s", figure),
    "loss_tokens_per_s": ("loss tokens/s", figure),
    "peak_bytes": ("peak memory", text.byte_count),
    "watts": ("power", text.watts),
}


@dataclass(frozen=True)
class Run:
    """What a run's folder says. `report` is empty until the run is finished, and again when it goes on."""

    name: str
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    evaluations: Sequence[Line]
    events: Sequence[Line]
    report: dict[str, Any]


def run_html(run: Path) -> str:
    return html.page(_document(_read(run)))


def run_markdown(run: Path) -> str:
    return document.markdown(_document(_read(run)))


def write_pages(run: Path) -> dict[str, str]:
    """`report.html` and `report.md` beside the run's other files; returns where they are."""
    try:
        made = _document(_read(run))
        pages = {"report.html": html.page(made), "report.md": document.markdown(made)}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{run} does not hold what a run writes: {type(error).__name__}: {error}") from None
    for name, page in pages.items():
        write_text(run / name, page)
    return {"html": str(run / "report.html"), "markdown": str(run / "report.md")}


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """The figures of a run, of the lines that it has written."""
    return {
        **{key: lines[-1][key] for key in ("step", "tokens", "nonpad_tokens", "loss_tokens")},
        "loss_first": lines[0]["loss"],
        "loss_last": lines[-1]["loss"],
        "tokens_per_s": median(line["tokens_per_s"] for line in lines),
        "peak_bytes": max((line["peak_bytes"] for line in lines if line["peak_bytes"] is not None), default=None),
    }


def _read(run: Path) -> Run:
    if not (run / LOCK).exists():
        raise UserError(f"{run} is not a run: it has no {LOCK}")
    from launch.strict_yaml import parse

    def journalled(name: str) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = _undamaged(run / f"{name}.jsonl", journal.read)
        return lines

    recipe = clean(parse((run / LOCK).read_text("utf-8"), str(run / LOCK)))
    lines, events = journalled("metrics"), clean_texts(journalled("events"))
    report = run / "report.json"
    made = _undamaged(report, lambda path: json.loads(path.read_text())) if report.exists() else {}
    if lines and made.get("step", 0) < lines[-1]["step"]:
        made = {}
    _add_power(lines, events)
    return Run(run.resolve().name, recipe, lines, journalled("evaluations"), events, clean_texts(made))


def _undamaged(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _add_power(lines: Sequence[dict[str, Any]], events: Sequence[Line]) -> None:
    """Watts since the line before, or since the run started or went on after that line."""
    begins = [(event["step"], event["time"]) for event in events if event["event"] in ("start", "resume")]
    before = -math.inf
    for line in lines:
        since = max([before, *(time for step, time in begins if step < line["step"] and time < line["time"])])
        joules, before = line.get("joules"), line["time"]
        is_known = joules is not None and -math.inf < since < before
        line["watts"] = joules / (before - since) if is_known else None


def _document(run: Run) -> Document:
    from launch.strict_yaml import dump

    figures = run.report or (summary(run.lines) if run.lines else {})
    evaluations = [("Evaluations", _evaluations(run))] if run.evaluations else []
    accounts = [Listing(f"What {name} did", dump(said)) for name, said in run.report.get("accounts", {}).items()]
    return Document(
        f"Run {run.name}: {run.recipe['model_name_or_path']}",
        [
            ("", [_state(run), Facts(_facts(run, figures))]),
            ("Over the steps", _plots(run)),
            ("Energy", _energy(figures)),
            *([("Strategies", accounts)] if accounts else []),
            ("Events", [_events(run) if run.events else "No event is on record."]),
            *evaluations,
            ("The lines", _lines(run)),
            ("The recipe", [Listing("Every key of it", dump(run.recipe))]),
        ],
    )


def _state(run: Run) -> Block:
    step = run.lines[-1]["step"] if run.lines else 0
    if run.report:
        return f"Finished, with step {run.report['step']:,}."
    asked = run.recipe.get("max_steps")
    of = f" of {asked:,}" if asked else ""
    last = run.events[-1] if run.events else {}
    why = f" It ended early: {last['detail']}." if last.get("event") == "stop" else ""
    return Notice(f"Not finished: the newest step on record is {step:,}{of}.{why}")


def _facts(run: Run, figures: Mapping[str, Any]) -> dict[str, str]:
    return {
        "steps": known(figures.get("step"), figure),
        "tokens": known(figures.get("tokens"), figure),
        "of them without padding": known(figures.get("nonpad_tokens"), figure),
        "of them learned": known(figures.get("loss_tokens"), figure),
        "first loss": known(figures.get("loss_first"), figure),
        "last loss": known(figures.get("loss_last"), figure),
        "tokens/s (median)": known(figures.get("tokens_per_s"), figure),
        "peak memory": known(figures.get("peak_bytes"), text.byte_count),
        "strategy": ", ".join(section["name"] for section in run.recipe["strategy"]),
        "engine": run.recipe["engine"]["name"],
        "ranks": known(figures.get("world")),
        "device": known(figures.get("device")),
        **{name: known(version) for name, version in (figures.get("versions") or {}).items()},
    }


def _energy(figures: Mapping[str, Any]) -> list[Block]:
    account = figures.get("energy") or {"joules": figures.get("joules")}
    facts = {
        "energy": known(account.get("joules"), text.joules),
        "bound of its error": known(account.get("bound_joules"), text.joules),
        "net of idle": known(account.get("net_joules"), text.joules),
        "per token": known(account.get("joules_per_token"), text.joules),
        "per step": known(account.get("joules_per_step"), text.joules),
        "mean power": known(account.get("watts"), text.watts),
        "idle power": known(account.get("idle_watts"), text.watts),
        "source": known(account.get("source")),
        "coverage": known(account.get("coverage"), text.percent),
    }
    notes = Items(account.get("notes") or [])
    if set(facts.values()) == {text.UNKNOWN}:
        return ["The energy of this run is unknown.", notes]
    facts["resets of counters"] = known(account.get("resets"), figure)
    if "grams_co2" in account:
        source = f"{account['grams_co2_per_kwh']:g} g/kWh, {account['intensity_source']}"
        facts[f"CO2 ({source})"] = known(account["grams_co2"], lambda grams: f"{grams:.3g} g")
    facts |= {
        f"{part['kind']} {part['name']}": known(part["joules"], text.joules) for part in account.get("parts") or ()
    }
    return [Facts(facts), notes]


def _plots(run: Run) -> list[Block]:
    if not run.lines:
        return ["There is no plot: no step is on record."]
    size, unit = text.byte_unit(max(line["peak_bytes"] or 0 for line in run.lines))
    held_out = [(line["step"], line["eval_loss"]) for line in run.evaluations if text.is_finite(line.get("eval_loss"))]
    losses = [_series(run, "training", "loss"), svg.Series("evaluation", held_out, style=1)]
    rates = [
        _series(run, "processed", "tokens_per_s", style=0),
        _series(run, "without padding", "nonpad_tokens_per_s", style=1),
        _series(run, "learned", "loss_tokens_per_s", style=2),
    ]
    step = svg.Axis("step", whole=True)
    drawn = [
        _plot(run, "Loss", losses, svg.Axis("loss"), step),
        _plot(run, "Gradient norm", [_series(run, "norm", "grad_norm")], svg.Axis("before clipping"), step),
        _plot(run, "Learning rate", [_series(run, "rate", "learning_rate")], svg.Axis("rate", zero=True), step),
        _plot(run, "Memory", [_series(run, "peak", "peak_bytes", size)], svg.Axis(f"peak, {unit}", zero=True), step),
        _plot(run, "Throughput", rates, svg.Axis("tokens/s", zero=True), step),
        _plot(run, "Power", [_series(run, "power", "watts")], svg.Axis("watts", zero=True), step),
    ]
    said = ["Dotted lines are events."] if run.events else []
    if len(run.lines) > MOST_POINTS:
        said.append("Of every stretch of steps the lowest and the highest value are drawn.")
    return [Plots(drawn), " ".join(said)]


def _series(run: Run, name: str, key: str, size: float = 1, style: int = 0) -> svg.Series:
    points = [(line["step"], line[key] / size) for line in run.lines if text.is_finite(line.get(key))]
    return svg.Series(name, thinned(points, MOST_POINTS), style, marks=False)


def thinned(points: Sequence[svg.Point], most: int) -> list[svg.Point]:
    """About `most` points: of every stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    width = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), width):
        stretch = sorted(points[start : start + width], key=lambda point: point[1])
        kept += sorted({stretch[0], stretch[-1]})
    return kept


def _plot(run: Run, title: str, series: Iterable[svg.Series], y: svg.Axis, x: svg.Axis) -> html.Html:
    series = [one for one in series if one.points]
    if not series:
        notes = (run.report.get("energy") or {}).get("notes") if title == "Power" else None
        why = "; ".join(notes or ["no line of this run has it"])
        return html.el("figure", html.el("h3", title), html.el("p", f"{title}: {text.UNKNOWN}, {why}"))
    events = [(event["step"], f"{event['event']} at step {event['step']}") for event in run.events]
    words = " ".join(map(_course, series))
    key = title.lower().replace(" ", "-")
    return svg.plot(key, title, words, series, x, y, events=events, figures=False)


def _course(series: svg.Series) -> str:
    """A line in words, for whoever does not see it."""
    (first, begin), (last, end) = series.points[0], series.points[-1]
    low, high = (pick(series.points, key=lambda point: point[1]) for pick in (min, max))
    return (
        f"{series.name}: {figure(begin)} at step {first:,}, {figure(end)} at step {last:,}; "
        f"lowest {figure(low[1])} at step {low[0]:,}, highest {figure(high[1])} at step {high[0]:,}."
    )


def _events(run: Run) -> Table:
    rows = []
    for event in run.events:
        time = datetime.fromtimestamp(event["time"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        detail = event.get("detail") or "none"
        order = [event["step"], event["event"], event["time"], detail]
        rows.append(
            [Cell(*cell) for cell in zip([figure(event["step"]), event["event"], time, detail], order, strict=True)]
        )
    return Table("Events", ["step", "event", "time", "detail"], rows)


def _evaluations(run: Run) -> list[Block]:
    keys = dict.fromkeys(key for line in run.evaluations for key in line if key not in ("time", "eval_texts"))
    rows = [[_cell(line.get(key), figure) for key in keys] for line in run.evaluations]
    texts = [
        Listing(f"Text {number} that the model wrote at step {line['step']:,}", written)
        for line in run.evaluations
        for number, written in enumerate(line.get("eval_texts") or [], 1)
    ]
    return [Table("Evaluations", [key.replace("_", " ") for key in keys], rows), *texts]


def _lines(run: Run) -> list[Block]:
    """The first line, the last, and every n-th between."""
    stride = math.ceil(len(run.lines) / MOST_LINES) or 1
    chosen = [line for index, line in enumerate(run.lines) if index % stride == 0 or line is run.lines[-1]]
    rows = [[_cell(line.get(key), show) for key, (_, show) in COLUMNS.items()] for line in chosen]
    head = [title for title, _ in COLUMNS.values()]
    return [f"{len(chosen):,} of {len(run.lines):,}; metrics.jsonl has them all.", Table("The lines", head, rows)]


def _cell(value: Any, show: Callable[[Any], str]) -> Cell:
    return Cell(known(value, show), value)
