"""The stream and its windows: nothing lost, nothing twice, whatever the ranks and micro-batches."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distrib.errors import UserError
from distrib.topology import Topology
from launch.data import open_data
from launch.data.order import Mixture, permutation, turns
from launch.recipe import Recipe
from launch.tokenizer import byte_tokenizer

END, PAD = 256, 257


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EBBTIDE_CACHE", str(tmp_path / "cache"))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def numbered(path, count, first=0):
    """Samples whose learned token is their number."""
    return write(path, [{"prompt": "p" * (1 + i % 5), "completion": chr(first + i)} for i in range(count)])


def data_of(dataset, evaluation=False, **fields):
    fields = {"max_length": 64} | fields
    return open_data(Recipe(dataset=dataset, **fields), byte_tokenizer(), Topology(), evaluation)


def learned_numbers(window):
    """The sample numbers that this window learns from."""
    labels = torch.cat([batch["labels"].flatten() for batch in window.micro_batches])
    return [int(label) for label in labels if label not in (-100, END)]


def step(data, index, size, world, batch):
    return [data.window(index * size, (index + 1) * size, rank, world, batch) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_every_row_once_an_epoch_at_any_world(tmp_path, world, batch):
    data = data_of(numbered(tmp_path / "a.jsonl", 24))
    assert data.rows == 24
    ids, seen = [], []
    for index in range(12):  # 12 steps of 6 rows are 3 epochs
        windows = step(data, index, 6, world, batch)
        ids += [row_id for window in windows for row_id in window.ids]
        seen += [number for window in windows for number in learned_numbers(window)]
    assert sorted(ids) == list(range(3 * 24))
    for epoch in range(3):
        assert sorted(seen[epoch * 24 : (epoch + 1) * 24]) == list(range(24))
        assert seen[epoch * 24 : (epoch + 1) * 24] != list(range(24))
    assert seen[:24] != seen[24:48]


def test_a_step_sees_the_same_rows_at_any_world(tmp_path):
    """World and micro-batch change in the middle; so does the process, for nothing is remembered."""
    name = numbered(tmp_path / "a.jsonl", 23)
    alone = [data_of(name).window(index * 5, (index + 1) * 5, 0, 1, 5).ids for index in range(14)]
    assert len({row_id for ids in alone for row_id in ids}) == 14 * 5
    for index, (world, batch) in enumerate([(2, 1), (3, 2), (1, 3), (4, 1), (2, 2)] * 2):
        windows = step(data_of(name), index, 5, world, batch)
        assert [row_id for window in windows for row_id in window.ids] == alone[index]


def test_the_order_follows_the_seed(tmp_path):
    name = numbered(tmp_path / "a.jsonl", 30)
    orders = [tuple(data_of(name, seed=seed).window(0, 30, 0, 1, 30).ids) for seed in (1, 1, 2, 2**32 - 1)]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_the_order_of_a_seed_never_changes():
    assert permutation(8, 42, 0).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]


@pytest.mark.parametrize(("size", "world", "batch"), [(5, 4, 1), (1, 3, 2), (7, 2, 2), (9, 4, 2)])
def test_every_rank_gets_as_many_micro_batches_and_fillers_count_nothing(tmp_path, size, world, batch):
    data = data_of(numbered(tmp_path / "a.jsonl", 24))
    windows = step(data, 0, size, world, batch)
    assert len({len(window.micro_batches) for window in windows}) == 1
    shares = [len(window.ids) for window in windows]
    assert sum(shares) == size
    assert max(shares) - min(shares) <= 1
    for window in windows:
        real = -(-len(window.ids) // batch)
        for filler in window.micro_batches[real:]:
            assert (filler["labels"] == -100).all()
            assert filler["input_ids"].numel() > 0
        assert window.tokens == sum(m["input_ids"].numel() for m in window.micro_batches[:real])
        assert window.nonpad_tokens == sum(int((m["input_ids"] != PAD).sum()) for m in window.micro_batches[:real])
        assert window.loss_tokens == 2 * len(window.ids)
    one = data.window(0, size, 0, 1, size)
    assert one.loss_tokens == sum(window.loss_tokens for window in windows)
    assert one.nonpad_tokens == sum(window.nonpad_tokens for window in windows)


def test_a_batch_is_padded_on_the_right_and_labels_are_not_shifted(tmp_path):
    name = write(tmp_path / "a.jsonl", [{"prompt": "abc", "completion": "d"}, {"prompt": "x", "completion": "y"}])
    (batch,) = data_of(name).window(0, 2, 0, 1, 2).micro_batches
    assert set(batch) == {"input_ids", "labels"}
    rows = sorted(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True))
    assert rows == [
        ([*b"abcd", END], [-100] * 3 + [*b"d", END]),
        ([*b"xy", END, PAD, PAD], [-100, *b"y", END, -100, -100]),
    ]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_an_end_token_that_pads_is_still_learned_where_it_ends(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    name = write(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "x"}])
    data = open_data(Recipe(dataset=name), tokenizer, Topology())
    (batch,) = data.window(0, 2, 0, 1, 2).micro_batches
    short = batch["labels"][batch["input_ids"][:, 0] == ord("x")]
    assert short.tolist() == [[-100, END, -100, -100]]


def test_pairs_are_interleaved(tmp_path):
    records = [{"prompt": f"{i}", "chosen": "yes" * i, "rejected": "no"} for i in range(1, 6)]
    data = data_of(write(tmp_path / "a.jsonl", records), objective="dpo")
    window = data.window(0, 4, 0, 2, 2)
    (batch,) = window.micro_batches
    assert batch["input_ids"].shape[0] == 2 * len(window.ids)
    for pair in range(2):
        chosen, rejected = (
            bytes(row[mask != -100].tolist()[:-1])
            for row, mask in zip(
                batch["input_ids"][2 * pair : 2 * pair + 2],
                batch["labels"][2 * pair : 2 * pair + 2],
                strict=True,
            )
        )
        number = int(chr(batch["input_ids"][2 * pair, 0]))
        assert batch["input_ids"][2 * pair + 1, 0] == ord(str(number))
        assert (chosen, rejected) == (b"yes" * number, b"no")


def test_groups_of_any_size_and_their_advantages(tmp_path):
    rewards = [[1.0, 2.0, 4.0], [0.5, 0.5], [3.0], [0.0, 1.0, 0.0, 1.0]]
    records = [
        {"prompt": str(i), "completions": [chr(97 + j) for j in range(len(r))], "rewards": r}
        for i, r in enumerate(rewards)
    ]
    data = data_of(write(tmp_path / "a.jsonl", records), objective="grpo")
    (batch,) = data.window(0, 4, 0, 1, 4).micro_batches
    expected = {str(i): (np.array(r) - np.mean(r)) / (np.std(r) + 1e-4) for i, r in enumerate(rewards)}
    assert batch["advantages"].dtype == torch.float32
    assert batch["advantages"].shape == (10,)
    for tokens, advantage in zip(batch["input_ids"], batch["advantages"], strict=True):
        group, member = chr(tokens[0]), int(tokens[1]) - 97
        assert advantage.item() == pytest.approx(expected[group][member], rel=1e-6)


@pytest.mark.parametrize(("weights", "counts"), [((1.0, 1.0), (10, 20)), ((0.5, 1.0), (5, 20)), ((2.0, 0.25), (20, 5))])
def test_weights_are_shares_of_each_set(tmp_path, weights, counts):
    names = [numbered(tmp_path / "a.jsonl", 10), numbered(tmp_path / "b.jsonl", 20, first=100)]
    data = data_of([{"name": n, "weight": w} for n, w in zip(names, weights, strict=True)])
    assert data.rows == sum(counts)
    epochs = [data.window(e * data.rows, (e + 1) * data.rows, 0, 1, 8) for e in range(4)]
    for window in epochs:
        seen = learned_numbers(window)
        assert (sum(n < 100 for n in seen), sum(n >= 100 for n in seen)) == counts
    ids = [row_id for window in epochs for row_id in window.ids]
    assert sorted(ids) == list(range(4 * data.rows))
    for numbers, weight in ((range(10), weights[0]), (range(100, 120), weights[1])):
        total = Counter(n for window in epochs for n in learned_numbers(window) if n in numbers)
        assert total == dict.fromkeys(numbers, 4 * weight)


def test_a_part_of_a_set_is_not_its_first_part():
    mixture = Mixture((1000,), (0.1,), seed=3)
    first = sorted(mixture.locate(position)[2] for position in range(100))
    assert len(set(first)) == 100
    assert 350 < np.mean(first) < 650


def test_turns_keep_the_shares_from_the_start():
    taken = [source for source, _ in zip(turns([1.0, 2.0, 0.5]), range(700), strict=False)]
    assert Counter(taken) == {0: 200, 1: 400, 2: 100}
    for stop in range(1, 700):
        assert abs(taken[:stop].count(1) - stop * 2 / 3.5) <= 1


def test_the_longest_micro_batch(tmp_path):
    records = [{"text": "a" * n} for n in (3, 30, 9, 31, 2)]
    data = data_of(write(tmp_path / "a.jsonl", records))
    batch = data.longest(2)
    assert sorted((batch["labels"] != -100).sum(1).tolist()) == [30, 31]
    assert data.longest(9)["input_ids"].shape == (9, 32)
    lengths = (5, 5, 5, 5, 12, 6)  # the longest document is not in the fullest row
    texts = write(tmp_path / "p.jsonl", [{"text": "a" * (n - 1)} for n in lengths])
    assert data_of(texts, packing=True, max_length=20).longest(1)["input_ids"].shape == (1, 20)
    groups = [{"prompt": "p", "completions": ["a" * n] * k, "rewards": [0] * k} for n, k in ((2, 8), (20, 2), (5, 3))]
    data = data_of(write(tmp_path / "g.jsonl", groups), objective="grpo")
    assert data.longest(1)["input_ids"].shape == (2, 22)
    assert data.longest(2)["input_ids"].shape == (10, 22)


def test_evaluation_sees_the_first_rows_in_order(tmp_path):
    names = [numbered(tmp_path / "a.jsonl", 3), numbered(tmp_path / "b.jsonl", 40, first=100)]
    data = data_of("stdlib", evaluation=True, eval_dataset=names, eval_rows=9, streaming=True, max_steps=1)
    assert data.rows == 9
    window = data.window(0, 9, 0, 1, 4)
    assert learned_numbers(window) == [0, 100, 1, 101, 2, 102, 103, 104, 105]
    assert window.ids == list(range(9))
    assert [summary["rows"] for summary in data.summaries] == [3, 9]


def test_evaluation_needs_its_data():
    with pytest.raises(UserError, match=r"^eval_dataset=null: an evaluation needs one"):
        data_of("stdlib", evaluation=True)


TEXTS = ["hello", "a", "packed documents", "do not see each other", "x" * 37, "", "bc", "d" * 40, "the end"]


def test_packing_keeps_every_document_whole(tmp_path):
    data = data_of(write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]), packing=True, max_length=41)
    rows = [row for _, row in data.fetch(0, data.rows)]
    documents = [bytes(sequence.tokens.tolist()[:-1]).decode() for row in rows for sequence in row]
    assert sorted(documents) == sorted(text for text in TEXTS if text)
    assert all(sum(len(sequence.tokens) for sequence in row) <= 41 for row in rows)
    assert data.rows == 4  # 137 tokens in rows of 41: fewer would not do
    (batch,) = data.window(0, 4, 0, 1, 4).micro_batches
    assert batch["position_ids"].shape == batch["input_ids"].shape
    for tokens, labels, positions in zip(
        *(batch[key].tolist() for key in ("input_ids", "labels", "position_ids")), strict=True
    ):
        used = next((i for i, token in enumerate(tokens) if token == PAD), len(tokens))
        start = 0
        while start < used:
            length = tokens.index(END, start) - start + 1
            assert positions[start : start + length] == list(range(length))
            assert labels[start : start + length] == [-100, *tokens[start + 1 : start + length]]
            start += length
        assert positions[used:] == list(range(len(tokens) - used))
        assert labels[used:] == [-100] * (len(tokens) - used)


def summed_loss(model, micro_batches):
    """Cross-entropy summed over labels, from plain logits."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in micro_batches:
        inputs = {key: batch[key] for key in ("input_ids", "position_ids") if key in batch}
        logits = model(**inputs).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
    return total


@pytest.mark.parametrize("batch", [1, 3])
def test_packed_documents_do_not_see_each_other(tmp_path, batch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,  # with a cache Transformers ignores where documents begin
    )
    model = LlamaForCausalLM(config).double()
    name = write(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    losses, gradients = [], []
    for packing in (False, True):
        data = data_of(name, packing=packing, max_length=41)
        window = data.window(0, data.rows, 0, 1, batch)
        loss = summed_loss(model, window.micro_batches)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for unpacked, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, unpacked, rtol=1e-11, atol=1e-12)
