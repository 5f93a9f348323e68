"""Streaming: no cache, the same stream for all ranks, and a position as its only state."""

import json
from collections import Counter
from itertools import pairwise

import pytest

from distrib.errors import UserError
from distrib.topology import Topology
from launch.data import open_data, stream
from launch.data.rows import Encoder
from launch.recipe import Recipe
from launch.tokenizer import byte_tokenizer


@pytest.fixture(autouse=True)
def setting(tmp_path, monkeypatch):
    monkeypatch.setenv("EBBTIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stream, "SHUFFLE_ROWS", 8)
    yield
    assert not (tmp_path / "cache").exists()


def numbered(path, count, first=0):
    records = [{"prompt": "p" * (1 + i % 5), "completion": chr(first + i)} for i in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts(path, lengths):
    path.write_text("".join(json.dumps({"text": chr(97 + i % 26) * n}) + "\n" for i, n in enumerate(lengths)))
    return str(path)


def streamed(dataset, **fields):
    recipe = Recipe(dataset=dataset, **{"streaming": True, "max_steps": 9, "max_length": 20} | fields)
    return open_data(recipe, byte_tokenizer(), Topology())


def plain(rows):
    return [(row_id, [(s.tokens.tolist(), s.learned.tolist(), s.reward) for s in row]) for row_id, row in rows]


def numbers(rows):
    return [int(row[0].tokens[row[0].learned][0]) for _, row in rows]


def sources(tmp_path):
    return {
        "answers": numbered(tmp_path / "a.jsonl", 23),
        "texts": texts(tmp_path / "b.jsonl", [3, 50, 9, 1, 20, 19, 41, 2]),
    }


def test_every_pass_has_every_row_once_in_another_order(tmp_path):
    data = streamed(numbered(tmp_path / "a.jsonl", 23))
    assert data.rows is None
    passes = [data.fetch(23 * i, 23 * (i + 1)) for i in range(3)]
    for index, rows in enumerate(passes):
        assert sorted(numbers(rows)) == list(range(23))
        assert sorted(row_id for row_id, _ in rows) == list(range(23 * index, 23 * (index + 1)))
    assert numbers(passes[0]) != list(range(23))
    assert numbers(passes[0]) != numbers(passes[1])


@pytest.mark.parametrize("kind", ["answers", "texts"])
@pytest.mark.parametrize("packing", [False, True])
def test_it_goes_on_anywhere(tmp_path, kind, packing):
    """In a new process, at another world size, or after looking back."""
    name = sources(tmp_path)[kind]
    whole = plain(streamed(name, packing=packing).fetch(0, 60))
    assert plain(streamed(name, packing=packing).fetch(37, 60)) == whole[37:]
    data = streamed(name, packing=packing)
    assert plain(data.fetch(50, 60)) == whole[50:]
    assert plain(data.fetch(3, 9)) == whole[3:9]
    assert len({row_id for row_id, _ in whole}) == 60


@pytest.mark.parametrize(("world", "batch"), [(1, 2), (2, 1), (3, 2), (7, 1)])
def test_the_ranks_share_each_window(tmp_path, world, batch):
    name = numbered(tmp_path / "a.jsonl", 23)
    expected = [row_id for row_id, _ in streamed(name).fetch(0, 50)]
    ranks = [streamed(name) for _ in range(world)]
    for start, stop in pairwise(range(0, 51, 5)):
        windows = [data.window(start, stop, rank, world, batch) for rank, data in enumerate(ranks)]
        assert [row_id for window in windows for row_id in window.ids] == expected[start:stop]
        assert len({len(window.micro_batches) for window in windows}) == 1


def test_the_order_follows_the_seed(tmp_path):
    name = numbered(tmp_path / "a.jsonl", 23)
    orders = [tuple(numbers(streamed(name, seed=seed).fetch(0, 23))) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_what_is_passed_over_is_not_tokenised(tmp_path, monkeypatch):
    seen = []
    rows = Encoder.rows
    monkeypatch.setattr(Encoder, "rows", lambda self, *args: seen.append(args) or rows(self, *args))
    streamed(numbered(tmp_path / "a.jsonl", 23)).fetch(40, 43)
    assert len(seen) == 3


def test_weights_are_shares_of_the_rows(tmp_path):
    names = [numbered(tmp_path / "a.jsonl", 10), numbered(tmp_path / "b.jsonl", 23, first=100)]
    data = streamed([{"name": names[0], "weight": 3.0}, {"name": names[1]}])
    rows = data.fetch(0, 80)
    seen = numbers(rows)
    assert sum(number < 100 for number in seen) == 60
    assert Counter(number for number in seen if number < 100) == dict.fromkeys(range(10), 6)
    assert len({row_id for row_id, _ in rows}) == 80
    assert [summary["weight"] for summary in data.summaries] == [3.0, 1.0]


@pytest.mark.parametrize(("packing", "rows"), [(False, 13), (True, 8)])
def test_a_pass_of_texts_has_every_token_once(tmp_path, packing, rows):
    lengths = [3, 50, 9, 1, 20, 19, 41, 2]  # with their ends 153 tokens; in rows of 20, 13 parts
    data = streamed(texts(tmp_path / "b.jsonl", lengths), packing=packing)
    for start in (0, rows):
        tokens = Counter(
            token
            for _, row in data.fetch(start, start + rows)
            for sequence in row
            for token in sequence.tokens.tolist()
        )
        assert tokens == {256: 8} | {97 + i: length for i, length in enumerate(lengths)}


def test_cut_samples_are_said_once(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b" * 30}))
    data = streamed(str(path))
    for position in range(3):
        data.window(position, position + 1, 0, 1, 1)
    assert capsys.readouterr().err == f"data: {path}: samples are cut at max_length=20\n"


def test_the_longest_is_a_full_row(tmp_path):
    groups = [{"prompt": "p", "completions": ["a", "bc", ""], "rewards": [1, 2, 3]}]
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps(groups[0]))
    assert streamed(str(path), objective="grpo").longest(2)["input_ids"].shape == (6, 20)
    name = numbered(tmp_path / "a.jsonl", 5)
    batch = streamed(name, packing=True).longest(2)
    assert batch["input_ids"].shape == batch["position_ids"].shape == (2, 20)
    assert int((batch["labels"] != -100).sum()) == 2 * 19


def test_a_stream_without_anything_to_learn_is_said(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="has no loss tokens"):
        streamed(str(path)).fetch(0, 1)
    path.write_text("")
    with pytest.raises(UserError, match="has no loss tokens"):
        streamed(str(path)).fetch(0, 1)


def test_a_wrong_record_is_said_with_its_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": 5}\n')
    with pytest.raises(UserError, match="record 1: text is int"):
        streamed(str(path)).fetch(0, 2)
