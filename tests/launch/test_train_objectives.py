"""DPO, GRPO, evaluation and packing through a whole run, against losses written out here on whole logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_cases import (
    END,
    ENGINES,
    answers,
    exact,
    groups,
    lines,
    logprobs,
    order,
    preferences,
    recipe,
    run,
    tokens,
    trained,
    write_rows,
)

RATE = 1e-2
STEPS = 3
ROWS = 6
ADAPTED: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_r": 4}}

Loss = Callable[[Any, Callable[[str, str], Tensor], list[int]], Tensor]


def initial(made: Any, folder: Path, world: int) -> Path:
    """The model before training, as a run with a learning rate of zero leaves it."""
    still = made.model_copy(update={"output_dir": str(folder), "max_steps": 1, "learning_rate": 0.0})
    trained(still, world)
    return folder / "final"


def plain_loop(final: Path, adapted: bool, batches: list[list[int]], loss_of: Loss) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a plain loop; the reference is the model before training."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    if adapted:
        model = AutoPeftModelForCausalLM.from_pretrained(final, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(final)
    frozen = AutoModelForCausalLM.from_pretrained(final / "base" if adapted else final)

    def reference(prompt: str, completion: str) -> Tensor:
        with torch.no_grad():
            return logprobs(frozen, prompt, completion)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    figures = []
    for batch in batches:
        loss = loss_of(model, reference, batch)
        loss.backward()
        figures.append((loss.item(), torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()))
        optimizer.step()
        optimizer.zero_grad()
    return figures


def dpo(model: Any, reference: Callable[[str, str], Tensor], batch: list[int]) -> Tensor:
    losses = []
    for row in (preferences(ROWS)[index] for index in batch):
        rewards = [
            logprobs(model, row["prompt"], row[kind]).sum() - reference(row["prompt"], row[kind]).sum()
            for kind in ("chosen", "rejected")
        ]
        losses.append(-(0.3 * (rewards[0] - rewards[1])).sigmoid().log())
    return torch.stack(losses).mean()


def grpo(model: Any, reference: Callable[[str, str], Tensor], batch: list[int]) -> Tensor:
    losses = []
    for row in (groups(ROWS)[index] for index in batch):
        rewards = torch.tensor(row["rewards"], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-4)
        for completion, advantage in zip(row["completions"], advantages, strict=True):
            mine = logprobs(model, row["prompt"], completion)
            ahead = reference(row["prompt"], completion) - mine
            gain = (mine - mine.detach()).exp() * advantage
            losses.append((-gain + 0.2 * (ahead.exp() - ahead - 1)).mean())
    return torch.stack(losses).mean()


OBJECTIVES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], Loss]] = {
    "dpo": ({"name": "dpo", "beta": 0.3}, preferences(ROWS), dpo),
    "grpo": ({"name": "grpo", "beta": 0.2}, groups(ROWS), grpo),
}
CASES = [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero3", 2)]


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("engine", "world"), CASES)
def test_preferences_and_groups_train_as_written_out(
    tmp_path: Path, engine: str, world: int, objective: str, adapted: str
) -> None:
    section, rows, loss_of = OBJECTIVES[objective]
    made = recipe(
        tmp_path / "run",
        write_rows(tmp_path / "rows.jsonl", rows),
        objective=section,
        engine=ENGINES[engine],
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        **ADAPTED[adapted],
    )
    trained(made, world)
    start = initial(made, tmp_path / "start", world)
    batches = order(tmp_path / "run", ROWS)
    expected = plain_loop(start, adapted == "lora", batches, loss_of)
    found = [(line["loss"], line["grad_norm"]) for line in lines(tmp_path / "run")]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-7)
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    if objective == "dpo":
        assert expected[0][0] == pytest.approx(math.log(2))
        assert abs(expected[2][0] - math.log(2)) > 1e-2


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)])
def test_evaluation_measures_writes_and_leaves_training_as_it_was(
    tmp_path: Path, dataset: str, engine: str, world: int
) -> None:
    from transformers import AutoModelForCausalLM

    common: dict[str, Any] = {"engine": ENGINES[engine], "learning_rate": 1e-2}
    common |= {"config_overrides": {"attention_dropout": 0.2}}
    held_out = answers(19)[14:]
    watched = {
        "eval_dataset": write_rows(tmp_path / "held_out.jsonl", held_out),
        "eval_steps": 2,
        "eval_samples": 2,
        "objective": {"name": "sft", "label_smoothing": 0.1},
    }
    trained(recipe(tmp_path / "blind", dataset, **common, objective=watched["objective"]), world)
    trained(recipe(tmp_path / "run", dataset, **common, **watched), world)
    assert exact(tmp_path / "run") == exact(tmp_path / "blind")

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    with torch.no_grad():
        terms = torch.cat([logprobs(model, row["prompt"], row["completion"]) for row in held_out])
    first, last = lines(tmp_path / "run", "evaluations")
    assert (first["step"], last["step"]) == (2, 4)
    assert last["eval_rows"] == 5
    assert last["eval_loss"] == pytest.approx(-terms.mean().item(), rel=1e-6)
    assert first["eval_loss"] > last["eval_loss"]
    for text, row in zip(last["eval_texts"], held_out, strict=False):
        assert text == greedy(model, row["prompt"])
    assert len(last["eval_texts"]) == 2


def greedy(model: Any, prompt: str) -> str:
    """Up to 64 tokens, the likeliest each time."""
    from launch.tokenizer import byte_tokenizer

    ids = list(prompt.encode())
    for _ in range(64):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return str(byte_tokenizer().decode(ids))


def test_evaluation_of_dpo_counts_pairs(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(ROWS))
    held_out = write_rows(tmp_path / "held_out.jsonl", preferences(3))
    made = recipe(
        tmp_path / "run",
        data,
        objective="dpo",
        eval_dataset=held_out,
        eval_steps=1,
        max_steps=1,
        learning_rate=0.0,
    )
    trained(made, 2)
    (line,) = lines(tmp_path / "run", "evaluations")
    assert line["eval_loss"] == pytest.approx(math.log(2), rel=1e-6)


TEXTS = ["def f(x): return x", "import os", "class A: pass # and more", "x = 1", "while True: y += 1", "pass"]


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("ddp", 2), ("fsdp2", 2), ("zero3", 2)])
def test_packed_rows_train_as_their_documents_alone(tmp_path: Path, engine: str, world: int) -> None:
    """One step over everything: packed into few rows, or a document a row."""
    data = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    common: dict[str, Any] = {"engine": ENGINES[engine], "max_steps": None, "num_train_epochs": 1.0}
    common |= {"global_batch_size": 8, "max_length": 48}
    trained(recipe(tmp_path / "packed", data, packing=True, **common), world)
    trained(recipe(tmp_path / "alone", data, **common), world)
    (packed,), (alone,) = lines(tmp_path / "packed"), lines(tmp_path / "alone")
    assert packed["loss_tokens"] == alone["loss_tokens"] == sum(len(text) for text in TEXTS)
    assert packed["nonpad_tokens"] == sum(len(text) + 1 for text in TEXTS)
    assert len(lines(tmp_path / "packed", "samples")[0]["ids"]) < len(TEXTS)
    for key in ("loss", "grad_norm"):
        assert packed[key] == pytest.approx(alone[key], rel=2e-6)


SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 264, "eos_token_id": END}
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "jamba": {"num_attention_heads": 4, "num_key_value_heads": 2, "use_mamba_kernels": False},
    "qwen3_next": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "lfm2": {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_packing_is_refused_for_layers_with_a_state_before_anything_is_built(
    tmp_path: Path, dataset: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    from distrib.errors import Refused
    from distrib.topology import Topology
    from launch.tokenizer import byte_tokenizer
    from launch.train import train

    AutoConfig.for_model(family, **SMALL, **RECURRENT[family]).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("launch.assemble.build", lambda *_: pytest.fail("a model was built"))
    made = recipe(tmp_path / "run", dataset, model_name_or_path=str(tmp_path / "model"), init="random", packing=True)
    with pytest.raises(Refused, match=r"packing=true: the .* layers of .*Config carry a state"):
        train(made, Topology())


@pytest.mark.parametrize(("engine", "world"), [("ddp", 1), ("fsdp2", 2)])
def test_a_model_whose_attention_leaks_is_refused(tmp_path: Path, dataset: str, engine: str, world: int) -> None:
    made = recipe(tmp_path / "run", dataset, packing=True, engine=ENGINES[engine])
    for end in run(made, world, ("leak",)):
        assert end.error.startswith("Refused: packing=true: packed documents see each other in ")
    assert not (tmp_path / "run").exists()


def test_tokens_here_are_those_of_the_tokenizer() -> None:
    from launch.tokenizer import byte_tokenizer

    ids, given = tokens("ab", "cé")
    assert ids[0].tolist() == [*byte_tokenizer()("abcé")["input_ids"], byte_tokenizer().eos_token_id]
    assert given == 2
