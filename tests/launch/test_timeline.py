"""The command's figures, its pictures and traces, and what it refuses."""

from __future__ import annotations

import json
import re
import struct
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distrib.pipeline import record
from distrib.pipeline.ops import Op
from distrib.pipeline.record import Span, Timeline
from distrib.pipeline.schedules import NAMES, make
from distrib.pipeline.simulate import Costs, simulate
from launch import cli
from launch.pages.png import Canvas
from launch.pages.timeline import COLOURS, View, svg
from launch.timeline import _view

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "tiny-pipeline.yaml")
SPACE = "{http://www.w3.org/2000/svg}"


def figures(capsys: pytest.CaptureFixture[str], *words: str, recipe: str = RECIPE) -> dict[str, Any]:
    assert cli.main(["timeline", recipe, *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_recipes_schedule_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys)
    assert (found["ranks"], found["micro_batches"], found["written"]) == (4, 8, None)
    (row,) = found["schedules"]
    assert (row["schedule"], row["units"], row["seconds"], row["recorded"]) == ("h1", 27.0, None, False)
    assert row["bubble"] == pytest.approx(1 / 9)
    assert row["peak_micro_batches"] == [4.0] * 4
    assert row["peak_bytes"] == [None] * 4


def test_words_change_what_the_recipe_says(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--schedule", ",".join(NAMES), "--stages=2", "--micro-batches", "3")
    assert (found["ranks"], found["micro_batches"]) == (2, 3)
    assert [row["schedule"] for row in found["schedules"]] == list(NAMES)
    assert figures(capsys, "gradient_accumulation_steps=5")["micro_batches"] == 5
    assert figures(capsys, "gradient_accumulation_steps=1", "global_batch_size=6")["micro_batches"] == 6
    assert figures(capsys, "--stages", "3", recipe=str(ROOT / "recipes/tiny.yaml"))["micro_batches"] == 1
    assert figures(capsys, "strategy.schedule=1f1b")["schedules"][0]["units"] == 33.0
    assert figures(capsys, "--costs", "1:1.17:0.68")["schedules"][0]["units"] == pytest.approx(
        simulate(make("h1", 4, 8), Costs.equal(4, 1.0, 1.17, 0.68)).seconds
    )
    peaks = [figures(capsys, *words)["schedules"][0]["peak_micro_batches"] for words in ([], ["strategy.pending=0"])]
    assert peaks == [[4, 4, 4, 4], [4, 3, 2, 1]]


def test_two_stages_a_rank_cost_what_one_does(capsys: pytest.CaptureFixture[str]) -> None:
    rows = figures(capsys, "--schedule", "1f1b,interleaved,v")["schedules"]
    busy = [round(row["units"] * (1 - row["bubble"]), 9) for row in rows]
    assert busy == [24.0, 24.0, 24.0]


def test_figures_are_printed_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["timeline", RECIPE, "--schedule", "naive,h1"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["4", "ranks,", "8", "micro-batches"],
        ["schedule", "step", "idle", "peak", "of", "a", "rank"],
        ["naive", "simulated", "96", "75", "%", "1", "micro-batch"],
        ["h1", "simulated", "27", "11.11", "%", "4", "micro-batches"],
    ]


def test_a_file_is_a_schedule_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(make("1f1b", 4, 8).text())
    assert figures(capsys, "--schedule", f"{path},h1")["schedules"][0]["units"] == 33.0
    assert figures(capsys, f"strategy.schedule={path}")["schedules"][0]["schedule"] == "mine.csv"


def test_the_docs_picture_is_what_their_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = (ROOT / "docs" / "timeline.md").read_text()
    said = re.search(r"^ebbtide (timeline .*) --output (\S+)$", docs, re.MULTILINE)
    assert said
    monkeypatch.chdir(ROOT)
    assert cli.main([*said[1].split(), "--output", str(tmp_path / "made.svg")]) == 0
    assert (tmp_path / "made.svg").read_text() == Path(said[2]).read_text()
    assert f"]({Path(said[2]).name})" in docs


def test_the_docs_figures_are_the_simulators() -> None:
    docs = (ROOT / "docs" / "timeline.md").read_text()
    rows = re.findall(r"^\| `(\S+)` \| (\S+) % \| (\S+) % \| (\S+) % \| (\S+) \|", docs, re.MULTILINE)
    assert [row[0] for row in rows] == list(NAMES)
    for name, *idle, peak in rows:
        views = [_view(make(name, *size), size[0], (1.0, 1.0, 1.0)) for size in ((4, 4), (4, 8), (8, 16))]
        assert idle == [f"{100 * view.timeline.bubble:.1f}" for view in views]
        assert peak == f"{max(views[1].peaks):g}"


def drawing(*names: str, ranks: int = 4, count: int = 8) -> ET.Element:
    return ET.fromstring(svg("<Title>", [_view(make(name, ranks, count), ranks, (1.0, 1.0, 1.0)) for name in names]))


def test_a_picture_has_every_operation_at_its_time() -> None:
    tree = drawing("h1")
    titles = [(box, box.find(f"{SPACE}title")) for box in tree.iter(f"{SPACE}rect")]
    boxes = {title.text: box for box, title in titles if title is not None and box.get("class") != "idle"}
    schedule = make("h1", 4, 8)
    assert Counter(box.get("class") for box in boxes.values()) == Counter(
        op.kind for ops in schedule.ranks for op in ops
    )
    times = {str(op): (start, end) for spans in simulate(schedule, Costs.equal(4)).ranks for op, start, end in spans}
    zero, unit = 0.0, 0.0
    for said, box in sorted(boxes.items(), key=lambda item: float(item[1].get("x", ""))):
        assert said
        start, end = times[said.split(",")[0]]
        x, width = float(box.get("x", "")), float(box.get("width", ""))
        zero, unit = (zero, unit) if unit else (x, width)
        assert x == pytest.approx(zero + unit * start, abs=1.5)
        assert width == pytest.approx(unit * (end - start), abs=0.3)
    assert len(boxes) == sum(map(len, schedule.ranks))


def test_a_picture_says_what_it_shows_without_scripts() -> None:
    text = svg("<Title>", [_view(make(name, 4, 8), 4, (1.0, 1.0, 1.0)) for name in ("1f1b", "h1")])
    tree = ET.fromstring(text)
    assert text.isascii()
    assert not re.search(r"<script|<a |href|\son\w+=|http(?!://www\.w3\.org/2000/svg)", text)
    assert tree.get("role") == "img"
    named = {element.get("id"): element.text for element in tree.iter() if element.get("id")}
    assert named[str(tree.get("aria-labelledby"))] == "<Title>"
    described = str(named[str(tree.get("aria-describedby"))])
    for said in ("1f1b: step 33, idle 27.27 %, peak 4 micro-batches", "h1: step 27, idle 11.11 %"):
        assert said in described
        assert any((element.text or "").startswith(said) for element in tree.iter(f"{SPACE}text"))
    words = {element.text for element in tree.iter(f"{SPACE}text")}
    assert {"rank 3", "idle 11.11 %", "F7", "I7", "W7", "B7"} <= words


def test_letters_stay_within_their_boxes() -> None:
    for count, label in ((2, "F1"), (16, "F"), (300, "")):
        tree = drawing("naive", count=count)
        assert {group.findtext(f"{SPACE}text") for group in tree.iter(f"{SPACE}g")} >= {label or "F"}
        boxes = [box for box in tree.iter(f"{SPACE}rect") if box.get("class") == "F"]
        assert len(boxes) == 1 + 4 * count  # one is the legend's


def pixels(data: bytes) -> list[list[tuple[int, ...]]]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, place = {}, 8
    while place < len(data):
        size, name = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + size]
        assert zlib.crc32(name + body) == struct.unpack_from(">I", data, place + 8 + size)[0]
        chunks[name], place = body, place + 12 + size
    width, height, depth, kind = struct.unpack_from(">IIBB", chunks[b"IHDR"])
    assert (depth, kind) == (8, 2)
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(raw) == height * (1 + 3 * width)
    lines = [raw[row * (1 + 3 * width) :][: 1 + 3 * width] for row in range(height)]
    assert {line[0] for line in lines} == {0}
    return [[tuple(line[1 + 3 * column :][:3]) for column in range(width)] for line in lines]


def test_a_png_is_the_same_picture(tmp_path: Path) -> None:
    assert cli.main(["timeline", RECIPE, "--output", str(tmp_path / "made.png")]) == 0
    seen = pixels((tmp_path / "made.png").read_bytes())
    tree = drawing("h1")
    assert (len(seen[0]), len(seen)) == tuple(2 * int(size) for size in str(tree.get("viewBox")).split()[2:])
    boxes = [box for box in tree.iter(f"{SPACE}rect") if box.get("class") in set("FBIW")]
    assert len(boxes) > 60
    for box in boxes:
        x, y = (round(2 * float(box.get(side, ""))) for side in "xy")
        assert seen[y + 4][x + 4] == COLOURS[str(box.get("class"))][0]


def test_letters_are_drawn_where_they_are_anchored() -> None:
    for anchor, left in (("start", 10), ("middle", 7), ("end", 4)):
        canvas = Canvas(20, 10, 1)
        canvas.text(10, 9, "F", (0, 0, 0), anchor)
        inked = ["".join(".#"[pixel == (0, 0, 0)] for pixel in line) for line in pixels(canvas.encoded())]
        assert [line.rstrip(".") for line in inked] == [
            "",
            "",
            *("." * left + row for row in ("#####", "#", "#", "####", "#", "#", "#")),
            "",
        ]


def test_a_trace_loads_as_chromes(tmp_path: Path) -> None:
    assert cli.main(["timeline", RECIPE, "--schedule", "1f1b,h1", "--output", str(tmp_path / "made.json")]) == 0
    events = json.loads((tmp_path / "made.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert all(isinstance(event["pid"], int) and isinstance(event["tid"], int) for event in events)
    names = {event["pid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(names.values()) == [f"{name}: rank {rank}" for name in ("1f1b", "h1") for rank in range(4)]
    spans = simulate(make("h1", 4, 8), Costs.equal(4)).ranks[3]
    mine = [event for event in events if event["pid"] == 7]
    assert [(event["name"], event["ts"], event["dur"]) for event in mine if event["ph"] == "X"] == [
        (str(op), start * 1e6, (end - start) * 1e6) for op, start, end in spans
    ]
    held = [event["args"]["micro-batches"] for event in mine if event["ph"] == "C"]
    assert (max(held), held[-1]) == (4, 0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a step of h1, a second late, whose ranks took 10 ms for F and B, 6 for I and 4 for W."""
    costs = Costs.equal(4, 0.010, 0.006, 0.004)
    made = simulate(make("h1", 4, 8), costs)
    late = tuple(tuple(Span(op, start + 1, end + 1) for op, start, end in spans) for spans in made.ranks)
    record.write(tmp_path / record.FILE, Timeline("h1", late, (2**20, None, 3 * 2**20, None), 7))
    return tmp_path


def test_what_a_run_recorded_stands_beside_what_it_could_be(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--recorded", str(run), "--schedule", "h1,1f1b", "--output", str(run / "beside.svg"))
    recorded, simulated, other = found["schedules"]
    assert (recorded["recorded"], recorded["step"], recorded["units"]) == (True, 7, None)
    assert recorded["peak_bytes"] == [2**20, None, 3 * 2**20, None]
    assert simulated["peak_bytes"] == [None] * 4
    expected = simulate(make("h1", 4, 8), Costs.equal(4, 0.010, 0.006, 0.004))
    assert recorded["seconds"] == pytest.approx(expected.seconds) == simulated["seconds"]
    assert recorded["bubble"] == pytest.approx(expected.bubble) == simulated["bubble"]
    assert other["seconds"] == pytest.approx(0.020 * (8 + 3))
    text = (run / "beside.svg").read_text()
    assert "h1, recorded in step 7: step 196 ms, idle 18.37 %, peak 3 MiB" in text
    assert "1f1b, simulated at the recorded costs: step 220 ms" in text
    assert cli.main(["timeline", RECIPE, "--recorded", str(run / record.FILE)]) == 0
    assert "h1               recorded       196 ms" in capsys.readouterr().out


def test_unknown_memory_is_said_so() -> None:
    costs = Costs.equal(1)
    line = replace(simulate(make("1f1b", 1, 1), costs), peak_bytes=(None,))
    assert (
        View(line, costs, in_seconds=True, recorded=True).said() == "1f1b, recorded: step 3 s, idle 0 %, peak unknown"
    )


def test_costs_are_measured_from_a_recording() -> None:
    spans = [
        Span(Op(0, "F", 0), 0, 1),
        Span(Op(0, "F", 1), 1, 4),
        Span(Op(0, "F", 2), 5, 7),
        Span(Op(0, "B", 0), 7, 17),
    ]
    more = [Span(Op(1, "F", 0), 1, 2), Span(Op(1, "I", 0), 2, 5), Span(Op(1, "W", 0), 5, 6)]
    split = Costs.measured(Timeline("mine", (tuple(spans), tuple(more)), (None, None)))
    assert (split.forward, split.input, split.weight) == ((2, 1), (7.5, 3), (2.5, 1))
    alone = Costs.measured(Timeline("mine", (tuple(spans),), (None,)))
    assert (alone.input, alone.weight) == ((5,), (5,))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--schedule", "h2"], "schedule='h2': choose naive,"),
        (["--stages", "0"], "--stages 0 with --micro-batches 8: must be at least 1 each"),
        (["--micro-batches", "0"], "--stages 4 with --micro-batches 0: must be at least 1 each"),
        (["--micro-batches", "99999"], "99999 micro-batches on 4 ranks: at most 16384 together"),
        (["--costs", "1:2"], "--costs 1:2: must be three numbers, as in 1:1.2:0.7"),
        (["--costs", "1:0:1"], "--costs 1:0:1: must be above 0"),
        (["--costs", "1:nan:1"], "--costs 1:nan:1: must be above 0"),
        (["--output", "made.gif"], "the ending of --output made.gif='.gif': choose .svg, .png, .json"),
        (["--output", "no/folder.svg"], "--output no/folder.svg: No such file or directory"),
        (["--output", "no/folder.png"], "--output no/folder.png: No such file or directory"),
        (["--recorded", "none"], "none: no such recording"),
        (["--recorded", "none", "--stages", "4"], "--stages with --recorded, which has its own"),
        (["--recorded", "none", "--costs", "1:1:1"], "--costs with --recorded, which has its own"),
        (["--schedule", "short.csv"], "schedule short.csv: has 2 micro-batches, and the pipeline 8"),
        (["--schedule", "few.csv"], "schedule few.csv: has 2 ranks, and the pipeline 4"),
        (["--schedule", "broken.csv"], "schedule broken.csv: rank 0: 0B0 stands without 0F0 before it"),
        (["--schedule", "binary.csv"], "schedule binary.csv: 'utf-8' codec can't decode"),
        (["strategy.stages=many"], "strategy.stages='many': must be a whole number"),
        (["strategy.pending=-1"], "pending=-1: must be 0 or more"),
        (["strategy=plain"], "the recipe has no strategy twobp with its stages: add --stages N"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.csv").write_text(make("1f1b", 4, 2).text())
    Path("few.csv").write_text(make("1f1b", 2, 8).text())
    Path("broken.csv").write_text("0B0,0F0\n")
    Path("binary.csv").write_bytes(b"\xff\xfe")
    assert cli.main(["timeline", RECIPE, *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ebbtide: {said}")
    assert err.count("\n") == 1


def test_a_recording_that_is_no_schedule_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads((run / record.FILE).read_text())
    tree["ranks"][1]["ops"].pop()
    (run / record.FILE).write_text(json.dumps(tree))
    assert cli.main(["timeline", RECIPE, "--recorded", str(run)]) == 2
    assert "rank 1: 1I7 has no 1W7 after it" in capsys.readouterr().err
