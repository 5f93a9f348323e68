"""Data files that are wrong by construction, and what the refusal must name."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

GOOD = {
    "sft": {"prompt": "1 + 1", "completion": "2"},
    "dpo": {"prompt": "1 + 1", "chosen": "2", "rejected": "3"},
    "grpo": {"prompt": "1 + 1", "completions": ["2", "3"], "rewards": [1, 0]},
}
NO_TEXT: list[Any] = [3, 1.5, True, {"a": 1}, {}, [[]], [3], [{"role": 3, "content": "x"}], [{"content": "x"}]]
MESSAGES: list[Any] = [
    3,
    "x",
    {},
    [],
    [3],
    [[]],
    ["x"],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": 3}],
    [{"role": 1, "content": "x"}],
    [{"role": "wizard", "content": "x"}],
    [{"role": "user", "content": ["x"]}],
    [{"role": "user", "content": None}],
]
REWARDS: list[Any] = [
    [1],
    [1, 2, 3],
    [1, "2"],
    [1, None],
    [1, True],
    [1, float("nan")],
    [1, float("inf")],
    [1, [2]],
    [1, {}],
    [1, 10**400],
    "ab",
    {"0": 1},
    3,
]
LINES = [
    '{"text": "a"',
    "{text: 1}",
    "nonsense",
    "[1]",
    "3",
    '"x"',
    "null",
    "{'text': 'a'}",
    '{"text": "a"} {"text": "b"}',
    "[" * 100_000,
    '{"text": ' * 20_000,
    '{"text": ' + "9" * 5000 + "}",
    '{"text": "\\ud800"}',
    '{"text": "\\q"}',
    '{"text": "\x01"}',
    '{"txt": "a"}',
    "{}",
    '{"text": null}',
]

Made = tuple[str, str, str]
"""(file or folder, objective, what is named)"""


def line(dice: random.Random, folder: Path) -> Made:
    good = [json.dumps({"text": f"row {i}"}) for i in range(dice.randrange(1, 6))]
    spot = dice.randrange(len(good) + 1)
    text = dice.choice(LINES)
    (folder / "a.jsonl").write_text("\n".join([*good[:spot], text, *good[spot:]]) + "\n")
    is_json = text.startswith(('{"txt', "{}", '{"text": null', '{"text": "\\ud'))
    return "a.jsonl", "sft", f"record {spot}" if is_json else f"line {spot + 1}"


def listed(dice: random.Random, folder: Path) -> Made:
    good = json.dumps({"text": "a"})
    bad, says = dice.choice(
        [("3", "item 2"), ("[]", "item 2"), ("", "list"), ("null", "item 2"), ('{"text": 3}', "record 1")]
    )
    (folder / "a.json").write_text(f"[{good}, {bad}]")
    return "a.json", "sft", says


def column(dice: random.Random, folder: Path) -> Made:
    objective = dice.choice(list(GOOD))
    row = dict(GOOD[objective])
    key = dice.choice([key for key in row if key != "rewards"])
    if key == "completions":
        row[key] = dice.choice([3, "ab", {}, [], [3, 4], [None, None]])
    else:
        row[key] = dice.choice(NO_TEXT)
    rows = [GOOD[objective]] * dice.randrange(4)
    (folder / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*rows, row]))
    return "a.jsonl", objective, f"record {len(rows)}"


def messages(dice: random.Random, folder: Path) -> Made:
    (folder / "a.jsonl").write_text(json.dumps({"messages": dice.choice(MESSAGES)}) + "\n")
    return "a.jsonl", "sft", "record 0"


def rewards(dice: random.Random, folder: Path) -> Made:
    row = GOOD["grpo"] | {"rewards": dice.choice(REWARDS)}
    (folder / "a.jsonl").write_text(json.dumps(GOOD["grpo"]) + "\n" + json.dumps(row) + "\n")
    return "a.jsonl", "grpo", "record 1"


def missing(dice: random.Random, folder: Path) -> Made:
    objective = dice.choice(list(GOOD))
    row = dict(GOOD[objective])
    del row[dice.choice([key for key in row if key != "prompt" or objective != "dpo"])]
    (folder / "a.jsonl").write_text(json.dumps(row) + "\n")
    return "a.jsonl", objective, "record 0"


def coding(dice: random.Random, folder: Path) -> Made:
    name = dice.choice(["a.txt", "a.py", "a.jsonl", "a.json"])
    bad = dice.choice([b"\xff\xfe", b"\x80abc", b"\xed\xa0\x80", b"caf\xe9", bytes(range(128, 256))])
    (folder / name).write_bytes(b'{"text": "' + bad + b'"}\n')
    return name, "sft", name


def zipped(dice: random.Random, folder: Path) -> Made:
    whole = gzip.compress(b'{"text": "a"}\n' * 200, mtime=0)
    spot = dice.randrange(12, len(whole) - 8)
    flipped = bytearray(whole)
    flipped[spot:] = bytes(byte ^ 0xFF for byte in flipped[spot:])
    bad = dice.choice([whole[:spot], b"", b"no gzip at all", bytes(flipped), whole + b"rest"])
    (folder / "a.jsonl.gz").write_bytes(bad)
    return "a.jsonl.gz", "sft", "a.jsonl.gz"


def parquet(dice: random.Random, folder: Path) -> Made:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(50)]}), buffer)
    whole = buffer.getvalue()
    length = len(whole)
    bad = dice.choice(
        [whole[: dice.randrange(length)], b"", b"PAR1", b"PAR1" + b"\xff" * 500 + b"PAR1", whole[4:], whole + b"x" * 9]
    )
    (folder / "a.parquet").write_bytes(bad)
    return "a.parquet", "sft", "a.parquet"


def typed(dice: random.Random, folder: Path) -> Made:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values: Any = dice.choice([[1, 2], [1.5], [True], [b"\xff\xfe"], [[1]], [{"a": 1}], [None]])
    pq.write_table(pa.table({"text": values}), folder / "a.parquet")
    return "a.parquet", "sft", "record 0"


def folder_of(dice: random.Random, folder: Path) -> Made:
    """Folders that `datasets` reads: what it would take for something else, or that names files outside."""
    inside = folder / "set"
    inside.mkdir()
    good = json.dumps({"text": "a"}) + "\n"
    (inside / "a.jsonl").write_text(good)
    match dice.randrange(7):
        case 0:
            (inside / "a.jsonl").write_text(
                dice.choice(
                    [line for line in LINES if "text" in line and "\\ud" not in line and "null" not in line][:4]
                )
            )
        case 1:
            (inside / "a.jsonl").unlink()
            (inside / "a.pkl").write_bytes(b"x")
        case 2:
            for i in range(5):
                (inside / f"{i}.csv").write_text("text\na\n")
        case 3:
            (folder / "other.jsonl").write_text(good)
            (inside / "README.md").write_text(
                "---\nconfigs:\n- config_name: default\n  data_files: ../other.jsonl\n---\n"
            )
        case 4:
            (inside / "README.md").write_text("---\nconfigs: [\n---\n")
        case 5:
            (inside / "a.jsonl").rename(inside / "a.csv")
        case 6:
            (inside / "README.md").write_text(
                "---\nconfigs:\n- config_name: default\n  data_files: https://localhost:9/x.jsonl\n---\n"
            )
    return "set", "sft", "set"


def nothing(dice: random.Random, folder: Path) -> Made:
    name, text = dice.choice(
        [
            ("a.jsonl", ""),
            ("a.jsonl", "\n \n"),
            ("a.json", "[]"),
            ("a.txt", ""),
            ("a.pkl", "x"),
            ("a.csv", "text\na"),
            ("a", "x"),
        ]
    )
    (folder / name).write_text(text)
    return name, "sft", name


KINDS: list[Callable[[random.Random, Path], Made]] = [
    line,
    line,
    line,
    listed,
    column,
    column,
    messages,
    rewards,
    missing,
    coding,
    zipped,
    parquet,
    typed,
    folder_of,
    nothing,
]


def wrong_data(seed: int, folder: Path) -> Made:
    """Writes it below `folder`."""
    return KINDS[seed % len(KINDS)](random.Random(1000 + seed), folder)
