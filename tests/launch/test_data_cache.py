"""The cache: reused when nothing changed, rebuilt when something did, never half of one."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from distrib.errors import UserError
from distrib.topology import Topology
from launch.data import cache, open_data
from launch.data.cache import stored_rows
from launch.data.rows import Encoder, Sequence
from launch.recipe import Recipe
from launch.tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("EBBTIDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch):
    """The records that were tokenised, so that a reuse shows."""
    seen = []
    rows = Encoder.rows
    monkeypatch.setattr(Encoder, "rows", lambda self, *args: seen.append(args[0]) or rows(self, *args))
    return seen


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("first document")
    (folder / "sub" / "b.md").write_text("second one\n" * 9)
    return folder


def content(name, tokenizer=None, **fields):
    data = open_data(Recipe(dataset=str(name), **fields), tokenizer or byte_tokenizer(), Topology())
    rows = [row for _, row in sorted(data.fetch(0, data.rows), key=lambda numbered: numbered[0])]
    return [[sequence.tokens.tolist() for sequence in row] for row in rows]


def test_the_same_data_is_tokenised_once(texts, encoded):
    first = content(texts)
    assert len(encoded) == 2
    assert content(texts) == first
    assert len(encoded) == 2


def touch(texts):
    os.utime(texts / "a.txt", ns=(1, 1))


def grow(texts):
    (texts / "a.txt").write_text("first document!")


def grow_unseen(texts):
    """As archives do that restore the time of change."""
    before = (texts / "a.txt").stat().st_mtime_ns
    grow(texts)
    os.utime(texts / "a.txt", ns=(before, before))


def add(texts):
    (texts / "c.txt").write_text("third")


def rename(texts):
    (texts / "a.txt").rename(texts / "z.txt")


@pytest.mark.parametrize("change", [touch, grow, grow_unseen, add, rename])
def test_a_changed_file_is_seen(texts, encoded, change):
    content(texts)
    del encoded[:]
    change(texts)
    content(texts)
    assert len(encoded) == len(list(texts.rglob("*.*")))


@pytest.mark.parametrize("fields", [{"max_length": 7}, {"packing": True}])
def test_a_changed_recipe_is_seen(texts, encoded, fields):
    first = content(texts)
    assert content(texts, **fields) != first
    assert len(encoded) == 4


def test_a_changed_tokenizer_is_seen(texts, encoded):
    content(texts)
    other = byte_tokenizer()
    other.eos_token = "<|system|>"
    assert {row[0][-1] for row in content(texts, other)} == {260}
    assert len(encoded) == 4
    other.chat_template = "{{ messages }}"
    content(texts, other)
    assert len(encoded) == 6


def test_the_objective_is_part_of_the_key(tmp_path, encoded):
    path = tmp_path / "a.jsonl"
    record = {
        "text": "t",
        "prompt": "p",
        "chosen": "c",
        "rejected": "r",
        "completions": ["a"],
        "rewards": [1],
    }
    path.write_text(json.dumps(record) + "\n" + json.dumps({"text": "longer"} | record))
    assert [len(content(path, objective=name)[0]) for name in ("sft", "dpo", "grpo")] == [1, 2, 1]


def test_other_keys_of_the_recipe_reuse_it(texts, encoded):
    content(texts)
    content(texts, seed=7, learning_rate=1.0, per_device_train_batch_size=2)
    assert len(encoded) == 2


def rows(count):
    return [
        tuple(Sequence(np.arange(i, dtype=np.int32), np.arange(i) > 0, i / 3) for i in range(1, 2 + row % 3))
        for row in range(1, count + 1)
    ]


def test_rows_come_back_as_they_were():
    stored = stored_rows("set", {"a": 1}, lambda tally: iter(rows(10)))
    assert len(stored) == 10
    for row, expected in zip((stored[i] for i in range(10)), rows(10), strict=True):
        assert len(row) == len(expected)
        for got, sequence in zip(row, expected, strict=True):
            np.testing.assert_array_equal(got.tokens, sequence.tokens)
            np.testing.assert_array_equal(got.learned, sequence.learned)
            assert got.reward == sequence.reward
    lines, longest, tokens = stored.sizes()
    assert lines.tolist() == [len(row) for row in rows(10)]
    assert longest.tolist() == [max(len(s.tokens) for s in row) for row in rows(10)]
    assert tokens.tolist() == [sum(len(s.tokens) for s in row) for row in rows(10)]


@pytest.mark.parametrize("array", [*cache.ARRAYS, "summary.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_a_damaged_set_is_built_again(array, damage):
    stored = stored_rows("set", {}, lambda tally: iter(rows(5)))
    path = stored.folder / array
    whole = path.read_bytes()
    path.write_bytes(whole[:-1]) if damage == "cut" else path.unlink()
    stored_rows("set", {}, lambda tally: iter(rows(5)))
    assert path.read_bytes() == whole


def test_a_failed_build_leaves_nothing(root):
    def failing(tally):
        yield from rows(3)
        raise RuntimeError("reading failed")

    with pytest.raises(RuntimeError, match="reading failed"):
        stored_rows("set", {}, failing)
    assert [path for path in root.iterdir() if path.suffix != ".lock"] == []
    assert len(stored_rows("set", {}, lambda tally: iter(rows(4)))) == 4


SCRIPT = """
import sys, time, pathlib
from launch.data.cache import stored_rows
from tests_rows import rows

def build(tally):
    with open("built", "a") as log:
        log.write("x")
    for row in rows:
        time.sleep(float(sys.argv[1]))
        yield row

print(len(stored_rows("set", {}, build)), flush=True)
"""
ROWS_MODULE = """
import numpy as np
from launch.data.rows import Sequence
rows = [(Sequence(np.arange(9, dtype=np.int32), np.arange(9) > 0),)] * 20
"""


@pytest.fixture
def builder(tmp_path):
    (tmp_path / "tests_rows.py").write_text(ROWS_MODULE)
    repository = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment = os.environ | {"PYTHONPATH": f"{repository}:{tmp_path}", "OMP_NUM_THREADS": "1"}

    def start(seconds_a_row):
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(seconds_a_row)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_processes_that_start_together_build_once(builder, tmp_path):
    processes = [builder(0.1) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [output for output, _ in outputs] == ["20\n"] * 3, outputs
    assert (tmp_path / "built").read_text() == "x"


def test_a_killed_build_is_not_taken_for_a_complete_one(builder, tmp_path, root):
    process = builder(30)
    deadline = time.monotonic() + 60
    while not (tmp_path / "built").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(root.glob("*.partial"))
    output, errors = builder(0).communicate(timeout=60)
    assert output == "20\n", errors
    assert (tmp_path / "built").read_text() == "xx"
    assert not list(root.glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch, texts):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EBBTIDE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"^EBBTIDE_CACHE='.*/file/cache' cannot be written \(Not a directory\)"):
        content(texts)


def test_a_set_that_teaches_nothing_is_said(tmp_path, root):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a long question", "completion": "b"}\n{"prompt": "abcde", "completion": "b"}\n')
    with pytest.raises(UserError, match=r"has no loss tokens: nothing is learned in its 2 samples \(2 were cut"):
        content(path, max_length=4)
    assert [item for item in root.iterdir() if item.suffix != ".lock"] == []


def test_what_was_cut_or_dropped_is_said_again_on_reuse(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "bcdefgh"}\n{"prompt": "abcdefgh", "completion": "b"}\n')
    for built in (True, False):
        content(path, max_length=4)
        shown = capsys.readouterr().err.splitlines()
        if built:
            assert shown.pop(0) == f"data: tokenising {path}"
        assert shown[0].endswith("a.jsonl: 1 rows, 4 tokens, 75.0% learned")
        assert shown[1].endswith("a.jsonl: 2 samples cut at max_length=4")
        assert shown[2].endswith("a.jsonl: 1 samples dropped: nothing learned")
        assert len(shown) == 3
    data = open_data(Recipe(dataset=str(path), max_length=4), byte_tokenizer(), Topology(rank=1, world=2))
    assert data.rows == 1
    assert capsys.readouterr().err == ""
