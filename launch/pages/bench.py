"""The comparison of `ebbtide bench` as a page, as Markdown and as a table for a terminal.

All three are given the object of `bench --json`. Any figure in it may be null and is then said to be unknown.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from distrib.redaction import clean, clean_texts, one_line
from launch.pages import document, html, svg, text
from launch.pages.document import Block, Cell, Document, Facts, Items, Listing, Notice, Plots, Table
from launch.pages.text import figure, known

Row = Mapping[str, Any]
STATUS = {"ok": "ok", "oom": "out of memory", "refused": "refused", "failed": "failed"}
ON_REQUEST = ("max_length",)
"""Fields that are measured only when asked for: null in every row, they were not."""


@dataclass(frozen=True)
class Column:
    """A field of the rows; `show` writes it where it is known. `brief` is its title in a terminal, if it is there."""

    field: str
    title: str
    show: Callable[[Row], str]
    brief: str = ""
    baseline: str = ""

    def value(self, row: Row) -> Any:
        value = row.get(self.field)
        return ((value or {}).get(self.baseline) or {}).get("median") if self.baseline else value


def _of(field: str, title: str, show: Callable[[Any], str] = str, brief: str = "") -> Column:
    return Column(field, title, lambda row: show(row[field]), brief)


def _spread(value: float, bounds: Sequence[float | None]) -> str:
    return figure(value) + ("" if None in bounds else " ({} to {})".format(*map(figure, bounds)))  # type: ignore[arg-type]


def _status(row: Row) -> str:
    status = STATUS.get(row["status"], str(row["status"]))
    return status if status == "ok" else f"{status}: {row.get('why') or 'reason unknown'}"


def _step(row: Row) -> str:
    return _spread(row["step_s"], row.get("step_s_iqr") or [None]) + f", {known(row.get('steps_timed'))} steps"


def _against(baseline: str, row: Row) -> str:
    ratio = row["against"][baseline]
    return _spread(ratio["median"], [ratio.get("low"), ratio.get("high")])


def _max_length(row: Row) -> str:
    return f"{figure(row['max_length'])} in {known(row.get('max_length_budget_bytes'), text.byte_count)}"


def _joules(row: Row) -> str:
    bound = row.get("energy_bound")
    return text.joules(row["joules_per_token"]) + (", bound unknown" if bound is None else f" ± {text.percent(bound)}")


def _grad_error(row: Row) -> str:
    return figure(row["grad_error"]) + f" ({known(row.get('grad_error_dtype'))})"


def _gemm(row: Row) -> str:
    return ", ".join(f"{kind.replace('_', ' ')} {known(count)}" for kind, count in row["gemm"].items())


COLUMNS = [
    _of("length", "length", figure, "length"),
    Column("status", "status", _status),
    _of("tokens_per_s", "tokens/s", figure, "tokens/s"),
    _of("nonpad_tokens_per_s", "non-pad tokens/s", figure),
    _of("loss_tokens_per_s", "loss tokens/s", figure),
    Column("step_s", "seconds a step (middle half)", _step, "s/step"),
    _of("peak_bytes", "peak memory", text.byte_count, "peak"),
    _of("activation_peak_bytes", "peak of activations", text.byte_count),
    Column("max_length", "longest length", _max_length, "longest"),
    _of("flops_per_s", "arithmetic", lambda flops: text.si(flops, "FLOP/s")),
    _of("mfu", "MFU", text.percent),
    Column("joules_per_token", "energy per token", _joules, "per token"),
    _of("net_joules_per_token", "net of idle", text.joules),
    _of("watts", "mean power", text.watts),
    _of("energy_source", "source of energy"),
    _of("energy_coverage", "coverage of energy", text.percent),
    Column("grad_error", "gradient error", _grad_error, "grad error"),
    _of("grad_error_parameter", "parameter of that error"),
    _of("fidelity", "fidelity"),
    Column("gemm", "matrix products", _gemm),
]


class View:
    """What the three renderings share: names, cells, points and sentences."""

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result: Mapping[str, Any] = clean_texts(result)
        self.rows: list[Row] = self.result["rows"]
        self.varied = [key for key in ("engine", "world") if len({row.get(key) for row in self.rows}) > 1]
        names = dict.fromkeys(self.name(row) for row in self.rows)
        self.styles = {name: index for index, name in enumerate(names)}
        self.lengths = sorted({row["length"] for row in self.rows if text.is_finite(row.get("length"))})
        baselines = dict.fromkeys(name for row in self.rows for name in row.get("against") or {})
        after = next(index for index, column in enumerate(COLUMNS, 1) if column.field == "step_s")
        ratios = [
            Column("against", f"step time / {name}'s", partial(_against, name), f"/ {name}", name) for name in baselines
        ]
        self.columns = [*COLUMNS[:after], *ratios, *COLUMNS[after:]]

    def name(self, row: Row) -> str:
        """The strategy, what tells its rows apart, and in parentheses what its numbers must not be taken for."""
        parts = [known(row.get("strategy")), *(f"{key} {known(row.get(key))}" for key in self.varied)]
        marks = [row["fidelity"]] if row.get("fidelity") not in ("exact", None) else []
        marks += ["emulated"] if (row.get("gemm") or {}).get("emulated") else []
        return ", ".join(parts) + (f" ({', '.join(marks)})" if marks else "")

    def at(self, length: int, *fields: str) -> list[Row]:
        """The rows of a length that have all these figures."""
        return [row for row in self.rows if row.get("length") == length and _has(row, *fields)]

    def cell(self, column: Column, row: Row) -> Cell:
        value = column.value(row)
        if value is None:
            return Cell(self.absent(column, row), None)
        said = column.show(row)
        return Cell(said, value if isinstance(value, int | float | str) else said)

    def absent(self, column: Column, row: Row) -> str:
        if column.field in ON_REQUEST and all(column.value(other) is None for other in self.rows):
            return "not asked"
        return text.UNKNOWN if row["status"] == "ok" else "not measured"

    def table(self) -> Table:
        rows = []
        for row in self.rows:
            name = self.name(row) + (", baseline" if row.get("baseline") else "")
            rows.append([Cell(name, name), *(self.cell(column, row) for column in self.columns)])
        return Table("All figures", ["strategy", *(column.title for column in self.columns)], rows)

    def frontiers(self) -> list[str]:
        return [self.frontier_words(length) for length in self.lengths]

    def frontier_words(self, length: int) -> str:
        rows = self.at(length, "peak_bytes", "tokens_per_s")
        if not rows:
            return f"Length {length:,}: no strategy has both a known speed and a known peak of memory."
        found = frontier(rows)
        words = f"Length {length:,}: the efficient frontier, from the smallest to the fastest: {self._listed(found)}."
        if any(row.get("fidelity") != "exact" for row in found):
            exact = frontier([row for row in rows if row.get("fidelity") == "exact"])
            words += f" Of the exact strategies alone: {self._listed(exact) or 'none has both figures'}."
        return words

    def _listed(self, rows: Sequence[Row]) -> str:
        return "; ".join(
            f"{self.name(row)} ({text.byte_count(row['peak_bytes'])}, {figure(row['tokens_per_s'])} tokens/s)"
            for row in rows
        )

    def missing(self) -> list[str]:
        """Every row without numbers, with its reason."""
        lost = [row for row in self.rows if row["status"] != "ok"]
        return [f"{self.name(row)} at length {known(row.get('length'), figure)}: {_status(row)}" for row in lost]

    def notices(self) -> list[str]:
        said = []
        if self.result["status"] != "complete":
            said.append("This comparison is partial: it ended before every row was measured.")
        if any(row.get("fidelity") not in ("exact", None) for row in self.rows):
            said.append("Not all of these compute the same gradient: what is not exact is marked beside its name.")
        if any((row.get("gemm") or {}).get("emulated") for row in self.rows):
            said.append(
                "Emulated arithmetic stands for hardware that this machine lacks: its speed says nothing of that."
            )
        return said


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The rows that no other beats in speed or in memory without losing in the other; the smallest first."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["peak_bytes"], -row["tokens_per_s"])):
        speed = row["tokens_per_s"]
        if not kept or speed > kept[-1]["tokens_per_s"] or _place(row) == _place(kept[-1]):
            kept.append(row)
    return kept


def _place(row: Row) -> svg.Point:
    return row["peak_bytes"], row["tokens_per_s"]


def _has(row: Row, *fields: str) -> bool:
    return row["status"] == "ok" and all(text.is_finite(row.get(field)) for field in fields)


def bench_html(result: Mapping[str, Any]) -> str:
    return html.page(_document(View(result)))


def bench_markdown(result: Mapping[str, Any]) -> str:
    return document.markdown(_document(View(result)))


def bench_table(result: Mapping[str, Any]) -> str:
    """About 110 columns wide; what no row knows is said below instead of in a column."""
    view = View(result)
    rows = [row for row in view.rows if row["status"] == "ok"]
    brief = [column for column in view.columns if column.brief]
    shown = [column for column in brief if any(column.value(row) is not None for row in rows)]
    lines, said = [], []
    if rows:
        cells = [[view.name(row), *(_brief(view.cell(column, row)) for column in shown)] for row in rows]
        lines = [document.plain_table(["strategy", *(column.brief for column in shown)], cells)]
        said = [f"{column.title}: {view.absent(column, rows[0])}" for column in brief if column not in shown]
    said += view.frontiers() + view.missing() + view.notices()
    lines += [textwrap.fill(one_line(one), 110, subsequent_indent="  ", break_on_hyphens=False) for one in said]
    return "\n".join(lines) + "\n"


def _brief(cell: Cell) -> str:
    """A cell without its bounds and remarks."""
    return re.split(r" \(| ± | in |, ", cell.text)[0]


def _document(view: View) -> Document:
    from launch.strict_yaml import dump

    result = view.result
    model, machine = result["model"], result["machine"]
    titles = {column.field: column.title for column in view.columns} | {"against": "step time / a baseline's"}
    about = {
        "made": known(result.get("created")),
        "command": known(result.get("command")),
        "model": known(model.get("name")),
        "kind of model": known(model.get("type")),
        "parameters": known(model.get("parameters"), figure),
        "of them trained": known(model.get("trainable_parameters"), figure),
        "precision": known(model.get("dtype")),
        "repeats": known(result.get("repeats")),
        "timed steps a repeat": known(result.get("steps")),
        "steps before them, untimed": known(result.get("warm_up_steps")),
    }
    place = {
        "device": known(machine.get("device")),
        "devices": known(machine.get("devices")),
        "memory of a device": known(machine.get("device_memory_bytes"), text.byte_count),
        "processor": known(machine.get("cpu")),
        "cores": known(machine.get("cores")),
        "memory": known(machine.get("memory_bytes"), text.byte_count),
        "platform": known(machine.get("platform")),
        **{name: known(version) for name, version in (machine.get("versions") or {}).items()},
    }
    how = [f"{titles.get(field, field)}: {said}" for field, said in (result.get("how") or {}).items()]
    lost = view.missing()
    return Document(
        f"Strategies compared: {about['model']} on {place['device']}",
        [
            ("", [*map(Notice, view.notices()), Facts(about)]),
            ("Speed against memory", [*_speed(view), Items(view.frontiers())]),
            ("Memory against length", _lengths(view)),
            ("Energy per token", _energy(view)),
            ("All figures", ["The ratios are of paired steps; above 1 is slower than the baseline.", view.table()]),
            ("Without numbers", [Items(lost) if lost else "Every row was measured."]),
            ("How each number was got", [Items(how) if how else text.UNKNOWN]),
            ("The machine", [Facts(place)]),
            ("The recipe", [Listing("Every key of it", dump(clean(result["recipe"])))]),
        ],
    )


def _speed(view: View) -> list[Block]:
    plots = []
    for length in view.lengths:
        rows = view.at(length, "peak_bytes", "tokens_per_s")
        if not rows:
            continue
        size, unit = text.byte_unit(max(row["peak_bytes"] for row in rows))
        at = {id(row): (row["peak_bytes"] / size, row["tokens_per_s"]) for row in rows}
        names = [view.name(row) for row in rows]
        series = [
            svg.Series(name, [at[id(row)]], view.styles[name], line=False)
            for name, row in zip(names, rows, strict=True)
        ]
        x, y = svg.Axis(f"peak memory, {unit}"), svg.Axis("tokens/s", zero=True)
        title, words = f"Speed against memory at length {length:,}", view.frontier_words(length)
        edge = [at[id(row)] for row in frontier(rows)]
        plots.append(svg.plot(f"speed-{length}", title, words, series, x, y, edge))
    return [Plots(plots) if plots else "There is no plot: no row has both a known speed and a known peak of memory."]


def _lengths(view: View) -> list[Block]:
    rows = [row for row in view.rows if _has(row, "length", "peak_bytes")]
    longest = {view.name(row): row for row in view.rows if row.get("max_length") is not None}
    said = [f"The longest length of {name}: {_max_length(row)}." for name, row in longest.items()]
    ends = {name: row for name, row in longest.items() if row.get("max_length_budget_bytes")}
    if len({row["length"] for row in rows}) < 2 and not ends:
        why = "one length was measured" if rows else "no peak of memory is known"
        return [f"There is no plot: {why}, and no longest length within a known budget.", Items(said)]
    every = [row["peak_bytes"] for row in rows] + [row["max_length_budget_bytes"] for row in ends.values()]
    size, unit = text.byte_unit(max(every))
    series = []
    for name, style in view.styles.items():
        points = sorted((row["length"], row["peak_bytes"] / size) for row in rows if view.name(row) == name)
        if points:
            series.append(svg.Series(name, points, style))
        if name in ends:
            end = (ends[name]["max_length"], ends[name]["max_length_budget_bytes"] / size)
            series.append(svg.Series(f"{name}: longest", [end], style, line=False, hollow=True))
    xs, ys = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    x = svg.Axis("length, tokens", log=max(xs) > 8 * min(xs))
    y = svg.Axis(f"peak memory, {unit}", log=max(ys) > 20 * min(ys), zero=True)
    courses = [f"{one.name}: " + ", ".join(f"{figure(b)} at {figure(a)}" for a, b in one.points) for one in series]
    hollow = "Hollow: the longest length, at the memory that was allowed for it." if ends else ""
    words = f"Peak memory in {unit} at each length. " + "; ".join(courses) + "."
    return [Plots([svg.plot("length", "Peak memory against length", words, series, x, y)]), hollow, Items(said)]


def _energy(view: View) -> list[Block]:
    plots = []
    for length in view.lengths:
        rows = view.at(length, "joules_per_token")
        bars = []
        for row in sorted(rows, key=lambda row: float(row["joules_per_token"])):
            joules, name = row["joules_per_token"], view.name(row)
            bound = row["energy_bound"] if _has(row, "energy_bound") else 0.0
            bounds = (joules * (1 - bound), joules * (1 + bound))
            bars.append(svg.Bar(name, joules, bounds, _joules(row), view.styles[name]))
        if bars:
            words = "; ".join(f"{bar.name}: {bar.said}" for bar in bars) + "."
            title = f"Energy per token at length {length:,}"
            plots.append(svg.bars(f"energy-{length}", title, words, bars, "joules per token"))
    if not plots:
        return ["There is no plot: the energy of every row is unknown."]
    return [Plots(plots), "Gross, of the whole job; the thin line at the end of a bar is the bound of its error."]
