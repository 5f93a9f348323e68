"""Every kind of source, and what is said of one that cannot be read."""

import gzip
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from distrib.errors import UserError
from launch.data import sources
from launch.data.chat import _checked
from launch.data.sources import open_source
from launch.recipe import Source

RECORDS = [{"prompt": "a", "completion": "ä"}, {"prompt": "b\n", "completion": ""}]


def read(name, **fields):
    return list(open_source(Source(name=str(name), **fields)).read())


def parquet(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_standard_library_is_its_sources():
    records = read("stdlib")
    texts = [record["text"] for record in records if record["begins"]]
    assert 300 < len(texts) < 1500
    assert any("class OrderedDict" in text for text in texts)
    assert all(record["text"] for record in records)
    assert open_source(Source(name="stdlib")).fingerprint == open_source(Source(name="stdlib")).fingerprint


def test_json_of_every_kind(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(RECORDS) + "\n\n")
    (tmp_path / "b.json").write_text(json.dumps(RECORDS, indent=2))
    (tmp_path / "c.json").write_text(lines(RECORDS))
    with gzip.open(tmp_path / "d.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines(RECORDS))
    for name in ("a.jsonl", "b.json", "c.json", "d.jsonl.gz"):
        assert read(tmp_path / name) == RECORDS


def test_records_need_not_have_one_form(tmp_path):
    records = [
        {"text": "a"},
        {"messages": [{"role": "user", "content": "b", "name": "c"}]},
        {"text": "d", "n": 1},
    ]
    (tmp_path / "a.jsonl").write_text(lines(records))
    assert read(tmp_path / "a.jsonl") == records


def test_a_parquet_file(tmp_path):
    parquet(tmp_path / "a.parquet", RECORDS)
    assert read(tmp_path / "a.parquet") == RECORDS


def test_messages_from_parquet(tmp_path):
    """Columns give every message all fields; the empty ones are dropped before the template sees them."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "note": "c"}]
    parquet(tmp_path / "a.parquet", [{"messages": turns, "text": None}])
    (record,) = read(tmp_path / "a.parquet")
    assert record["messages"] == [turns[0] | {"note": None}, turns[1]]
    assert _checked(record["messages"]) == turns


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(RECORDS), encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("abc", encoding="utf-8-sig")
    assert read(tmp_path / "a.jsonl") == RECORDS
    assert read(tmp_path / "a.txt")[0]["text"] == "abc"


def test_a_folder_of_data_has_splits(tmp_path):
    parquet(tmp_path / "data" / "train-00000-of-00002.parquet", [{"text": "a"}])
    parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [{"text": "b"}])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"text": "c"}])
    (tmp_path / "README.md").write_text("about")
    assert read(tmp_path) == [{"text": "a"}, {"text": "b"}]
    assert read(tmp_path, split="test") == [{"text": "c"}]
    prints = {open_source(Source(name=str(tmp_path), split=split)).fingerprint for split in ("train", "test")}
    assert len(prints) == 2


def test_a_folder_of_json_lines(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(RECORDS))
    assert read(tmp_path) == RECORDS


def test_a_folder_of_text_is_one_document_a_file(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", "d.bin", ".hidden.txt", ".git/e.txt", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("" if name == "empty.txt" else f"in {name}\n")
    assert read(tmp_path) == [
        {"text": f"in {name}\n", "begins": True, "ends": True} for name in ("a.md", "b.txt", "sub/c.py")
    ]


@pytest.mark.parametrize("text", ["one\ntwo\nthree\nfour\n", "x" * 50, "a" * 8 + "\n" + "b" * 11])
def test_a_large_text_comes_in_pieces(tmp_path, monkeypatch, text):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 7)
    (tmp_path / "a.txt").write_text(text)
    pieces = read(tmp_path / "a.txt")
    assert len(pieces) > 1
    assert "".join(piece["text"] for piece in pieces) == text
    assert [piece["begins"] for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece["ends"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_reading_starts_over(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(RECORDS))
    records = open_source(Source(name=str(tmp_path / "a.jsonl")))
    next(records.read())
    assert list(records.read()) == list(records.read()) == RECORDS


def test_a_hub_name_is_read_at_its_revision(monkeypatch):
    """What `datasets` is asked, the hub being out of reach, and that a new commit is a new fingerprint."""
    commits = iter(["first", "first", "second"])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **k: SimpleNamespace(hash=next(commits)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or iter([{"text": "a"}]))
    source = Source(name="someone/set", subset="en", split="validation", revision="v1")
    opened = [open_source(source) for _ in range(3)]
    assert list(opened[0].read()) == [{"text": "a"}]
    assert asked == [(("someone/set",), {"name": "en", "split": "validation", "revision": "v1", "streaming": True})]
    assert opened[0].fingerprint == opened[1].fingerprint != opened[2].fingerprint


def test_a_hub_name_out_of_reach_is_one_line(tmp_path):
    script = (
        "from launch.data.sources import open_source; from launch.recipe import Source;"
        "from distrib.errors import UserError\n"
        "try: open_source(Source(name='someone/set'))\n"
        "except UserError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    repository = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("dataset='someone/set': no such file or folder, and not to be had from the hub (")
    assert done.stdout.endswith("or a hub name\n")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


def make(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


WRONG = [
    ("gone.jsonl", None, {}, "no such file or folder; choose stdlib, additions, a file or folder"),
    ("folder/gone", None, {}, "no such file or folder"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": \n', {}, "cannot be read: line 2 is not JSON: "),
    ("a.jsonl", b'{"text": "ok"}\n[1]\n', {}, "line 2 is list, must be an object"),
    ("a.json", b'[{"text": "ok"}, 3]', {}, "item 2 is int, must be an object"),
    ("a.json", b'[{"text": "ok"}', {}, "the list is not JSON: Expecting ',' delimiter"),
    ("a.jsonl", b"\xff\xfe", {}, "cannot be read: 'utf-8' codec"),
    ("a.jsonl.gz", b"not zipped", {}, "Not a gzipped file"),
    ("a.parquet", b"not parquet", {}, "cannot be read: "),
    ("a.txt", b"caf\xe9", {}, "a.txt is not UTF-8 text"),
    ("a.xlsx", b"", {}, "'.xlsx' is no known kind of file; choose"),
    ("Makefile", b"", {}, "'no suffix' is no known kind of file"),
    ("a.jsonl", b"{}", {"split": "test"}, "split='test', but a single file has no splits; leave split out"),
    ("a.jsonl", b"{}", {"subset": "en"}, "subset='en', but a single file has no subsets"),
    ("a.txt", b"a", {"revision": "v1"}, "revision='v1' is for hub names"),
]


@pytest.mark.parametrize(("name", "content", "fields", "says"), WRONG)
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, fields, says):
    path = tmp_path / name
    if content is not None:
        make(path, content)
    with pytest.raises(UserError) as error:
        read(path, **fields)
    assert str(error.value).startswith(f"dataset={str(path)!r}")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "fields", "says"),
    [
        ("a.bin", {}, "holds no text and no data files"),
        ("a.txt", {"split": "test"}, "a folder of text has no splits"),
        ("a.jsonl", {"split": "test"}, "Bad split: test. Available splits: ['train']"),
        ("a.jsonl", {"subset": "en"}, "BuilderConfig 'en' not found"),
    ],
)
def test_a_wrong_folder_is_one_line(tmp_path, file, fields, says):
    (tmp_path / file).write_text('{"text": "a"}')
    with pytest.raises(UserError) as error:
        read(tmp_path, **fields)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_built_in_sets_have_no_splits():
    with pytest.raises(UserError, match="a built-in set has no splits"):
        read("stdlib", split="test")
