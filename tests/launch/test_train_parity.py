"""Training computes what a plain loop over a Hugging Face model does, on every engine and number of ranks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import ENGINES, answers, lines, logprobs, order, recipe, run, trained, write_rows

from distrib.errors import Refused
from distrib.topology import Topology
from launch.train import train

RATE = 2e-4
STEPS = 20


def plain_loop(
    folder: Path,
    batches: list[list[int]],
    optimizer: Callable[..., torch.optim.Optimizer],
    clip: float = 1.0,
    decay: float = 0.0,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: cosine decay, weights decay in matrices only."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    rows = answers(14)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    made = optimizer(groups, lr=RATE)
    figures = []
    for index, batch in enumerate(batches):
        terms = [-logprobs(model, rows[i]["prompt"], rows[i]["completion"]) for i in batch]
        loss = torch.cat(terms).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in made.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * index / len(batches)))
        made.step()
        made.zero_grad()
        figures.append((loss.item(), norm.item()))
    return figures


def figures(folder: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in lines(folder)]


def assert_close(found: list[tuple[float, float]], expected: list[tuple[float, float]], bound: float) -> None:
    assert len(found) == len(expected)
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True), 1):
        assert mine == pytest.approx(theirs, rel=bound), f"step {step}"


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_one_process_trains_as_a_plain_loop(tmp_path: Path, dataset: str, model_folder: Path, clip: float) -> None:
    made = recipe(
        tmp_path / "run",
        dataset,
        model_name_or_path=str(model_folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        weight_decay=0.1,
        max_grad_norm=clip,
    )
    train(made, Topology())
    found = figures(tmp_path / "run")
    batches = order(tmp_path / "run", 14)
    expected = plain_loop(model_folder, batches, torch.optim.AdamW, clip or math.inf, decay=0.1)
    assert_close(found, expected, 1e-5)
    assert max(norm for _, norm in expected) > 0.5
    # The bound tells this loop from one that forgets the clipping or decays every parameter.
    other = plain_loop(model_folder, batches, torch.optim.AdamW, math.inf, decay=0.0)
    with pytest.raises(AssertionError):
        assert_close(found, other, 1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, dataset: str) -> list[tuple[float, float]]:
    folder = tmp_path_factory.mktemp("alone")
    train(recipe(folder, dataset, max_steps=STEPS, learning_rate=RATE), Topology())
    return figures(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_train_as_one(tmp_path: Path, dataset: str, alone: list[tuple[float, float]], engine: str) -> None:
    trained(recipe(tmp_path, dataset, max_steps=STEPS, learning_rate=RATE, engine=ENGINES[engine]), 2)
    assert_close(figures(tmp_path), alone, 1e-5)
    assert alone[0][0] > alone[-1][0]


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adamax": (torch.optim.Adamax, {}),
    "sgd": (lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9), {"momentum": 0.9}),
    "adagrad": (lambda groups, lr: torch.optim.Adagrad(groups, lr=lr, eps=1e-8), {}),
    "rmsprop": (
        lambda groups, lr: torch.optim.RMSprop(groups, lr=lr, momentum=0.9),
        {"momentum": 0.9},
    ),
    "adafactor": (torch.optim.Adafactor, {}),
}


ALIKE = {"adam", "nadam", "radam", "adamax", "rmsprop"}
"""Elementwise ones of torch, which go the way of adamw."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in OPTIMIZERS]
)
def test_every_optimizer_updates_as_torch_does(tmp_path: Path, dataset: str, model_folder: Path, name: str) -> None:
    made, fields = OPTIMIZERS[name]
    common: dict[str, Any] = {
        "model_name_or_path": str(model_folder),
        "max_steps": 5,
        "optimizer": {"name": name, **fields},
    }
    train(recipe(tmp_path / "alone", dataset, **common), Topology())
    expected = plain_loop(model_folder, order(tmp_path / "alone", 14), made)
    assert_close(figures(tmp_path / "alone"), expected, 1e-5)
    for engine in {"adafactor": ["ddp"], "adagrad": ["ddp", "fsdp2"]}.get(name, ["fsdp2", "zero2"]):
        trained(recipe(tmp_path / engine, dataset, **common, engine=ENGINES[engine]), 2)
        assert_close(figures(tmp_path / engine), expected, 1e-5)


@pytest.mark.parametrize(
    ("name", "engine"), [("adafactor", "fsdp2"), ("adafactor", "zero3"), ("adagrad", "zero1"), ("adamw4bit", "zero2")]
)
def test_an_optimizer_that_an_engine_cannot_run_is_refused_before_anything_is_built(
    tmp_path: Path, dataset: str, name: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.assemble.build", lambda *_: pytest.fail("a model was built"))
    made = recipe(tmp_path / "run", dataset, optimizer=name, engine=ENGINES[engine])
    with pytest.raises(Refused, match=f"optimizer.name='{name}' .*: choose|optimizer.name='{name}' .*; choose"):
        train(made, Topology())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def in_fp32(tmp_path_factory: pytest.TempPathFactory, dataset: str, model_folder: Path) -> list[tuple[float, float]]:
    folder = tmp_path_factory.mktemp("fp32")
    made = recipe(folder, dataset, model_name_or_path=str(model_folder), max_steps=8, learning_rate=1e-3)
    train(made, Topology())
    return figures(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_trains_close_to_fp32_with_fp32_master_weights(
    tmp_path: Path, dataset: str, model_folder: Path, in_fp32: list[tuple[float, float]], engine: str
) -> None:
    from safetensors.torch import load_file

    common: dict[str, Any] = {"model_name_or_path": str(model_folder), "engine": ENGINES[engine]}
    trained(recipe(tmp_path / "bf16", dataset, max_steps=8, learning_rate=1e-3, bf16=True, **common), 2)
    # Two roundings of a half of 2**-8 each, of weights and of activations.
    assert_close(figures(tmp_path / "bf16"), in_fp32, 0.02)
    assert figures(tmp_path / "bf16") != in_fp32
    # Weights near 0.1 would need a change of 2e-4 to move in bf16.
    trained(recipe(tmp_path / "slow", dataset, max_steps=2, learning_rate=1e-6, bf16=True, **common), 2)
    name = "model.layers.1.mlp.up_proj.weight"
    start = load_file(model_folder / "model.safetensors")[name]
    moved = load_file(tmp_path / "slow" / "final" / "model.safetensors")[name]
    assert moved.dtype == torch.float32
    # DeepSpeed's master weights begin as the bf16 ones.
    change = moved - (start.bfloat16() if engine.startswith("zero") else start)
    assert (change != 0).float().mean() > 0.9
    assert change.abs().max() < 3e-6


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("epochs", "expected"), [(0.5, [4, 3]), (1.0, [4, 4, 4, 2]), (2.0, [4] * 7)])
def test_epochs_end_with_the_data(tmp_path: Path, dataset: str, world: int, epochs: float, expected: list[int]) -> None:
    made = recipe(tmp_path, dataset, max_steps=None, num_train_epochs=epochs)
    trained(made, world)
    taken = order(tmp_path, 14)
    assert [len(rows) for rows in taken] == expected
    seen = Counter(row for rows in taken for row in rows)
    assert set(seen.values()) == {math.ceil(epochs)}
    assert len(seen) == min(14, round(14 * epochs))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_partial_window_trains_as_in_one_process(tmp_path: Path, model_folder: Path, engine: str) -> None:
    """Five rows: the last step has one, so that one of two ranks has only a filler."""
    data = write_rows(tmp_path / "five.jsonl", answers(14)[:5])
    common: dict[str, Any] = {"max_steps": None, "model_name_or_path": str(model_folder)}
    trained(recipe(tmp_path / "run", data, engine=ENGINES[engine], **common), 2)
    expected = plain_loop(model_folder, order(tmp_path / "run", 5), torch.optim.AdamW)
    assert_close(figures(tmp_path / "run"), expected, 1e-5)
    last = lines(tmp_path / "run")[-1]
    rows = [len(row["completion"].encode()) + 1 for row in answers(14)[:5]]
    assert last["loss_tokens"] == sum(rows)


def test_a_batch_without_loss_tokens_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}] + [{"prompt": "p" * 80, "completion": "cut off"}] * 3
    data = write_rows(tmp_path / "rows.jsonl", rows)
    made = recipe(tmp_path / "run", data, streaming=True, global_batch_size=1, max_steps=8, save_steps=1)
    for world in (1, 2):
        folder = tmp_path / f"run{world}"
        ends = run(made.model_copy(update={"output_dir": str(folder), "global_batch_size": world}), world)
        assert all(end.error.startswith("UserError: step ") for end in ends), ends
        assert all("no loss tokens" in end.error for end in ends)
        assert all(line["loss_tokens"] == 2 * line["step"] for line in lines(folder))
