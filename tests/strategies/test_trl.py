"""TRL's supervised fine-tuning on a model with streambp: an unchanged script, its defaults, the losses of the model
as it was, and every layer streamed."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build

pytest.importorskip("trl", reason="trl is not installed: pip install -c constraints.txt 'ebbtide[trl]'")

import strategies
from launch.tokenizer import byte_tokenizer
from strategies.streaming import blocks

pytestmark = [
    pytest.mark.trl,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),  # TRL sets it under the older name
]

STEPS, MICRO_BATCHES, LAYERS = 3, 2, 2
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


@pytest.fixture
def starts(monkeypatch):
    """Whether gradients were on, for every start of a layer."""
    noted = []
    start = blocks.start_run

    def noting(*args):
        noted.append(torch.is_grad_enabled())
        return start(*args)

    monkeypatch.setattr(blocks, "start_run", noting)
    return noted


def texts():
    from datasets import Dataset

    return Dataset.from_list([{"text": "ab cd " * (2 + i % 5) + chr(97 + i)} for i in range(12)])


def dialogues():
    from datasets import Dataset

    rows = [
        [{"role": "user", "content": "hello " * (1 + i % 3)}, {"role": "assistant", "content": "ab" * (2 + i % 4)}]
        for i in range(12)
    ]
    return Dataset.from_list([{"prompt": row[:1], "completion": row[1:]} for row in rows])


def trained(model, folder, data, peft_config=None, **changes):
    """What was logged at each step, and by an evaluation. Settings that TRL has by default stay as they are."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        dataloader_pin_memory=False,
        **changes,
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    more = {"processing_class": tokenizer, "peft_config": peft_config}
    trainer = SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, **more)
    batches = []
    model.model.register_forward_pre_hook(lambda *_: batches.append(torch.is_grad_enabled()))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    return {name: [entry[name] for entry in logged] for name in names}, trainer.evaluate(), trainer.model, batches


def tiny():
    return build("llama", vocab_size=264, initializer_range=0.02).float()


def prepared(starts):
    model = tiny()
    strategies.prepare(model, [strategies.get("streambp")(chunk=4)])
    with torch.no_grad():
        model(input_ids=torch.ones(1, 6, dtype=torch.long), labels=torch.ones(1, 6, dtype=torch.long))
    starts.clear()
    return model


def assert_streamed(model, starts, batches):
    """Once a layer and batch, in training and in the evaluation."""
    counts = [part._ebbtide_block.backwards for part in model.modules() if "_ebbtide_block" in vars(part)]
    assert counts == [batches.count(True)] * LAYERS
    assert starts.count(True) == LAYERS * batches.count(True)
    assert starts.count(False) == LAYERS * batches.count(False)


def assert_same(found, wanted, model, plain, near=1e-4):
    (logged, evaluated), (right, right_evaluated) = found, wanted
    for name, values in right.items():
        assert logged[name] == pytest.approx(values, rel=near), name
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert evaluated[name] == pytest.approx(right_evaluated[name], rel=near), name
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            assert (a - b).norm() < 10 * near * b.norm(), name


@pytest.mark.parametrize("data", [texts, dialogues])
@pytest.mark.parametrize("packing", [False, True])
def test_sft_trains_the_same(tmp_path, starts, data, packing):
    changes = {"packing": True, "max_length": 64} if packing else {}
    model = prepared(starts)
    *wanted, plain, batches = trained(tiny(), tmp_path, data(), bf16=False, **changes)
    *found, model, _ = trained(model, tmp_path, data(), bf16=False, **changes)
    assert_same(found, wanted, model, plain)
    assert_streamed(model, starts, batches)
    assert len(batches) < 8 if packing else batches == [True] * STEPS * MICRO_BATCHES + [False] * 2


def test_sft_with_adapters_trains_the_same(tmp_path, starts):
    from peft import LoraConfig

    model = prepared(starts)
    adapters = LoraConfig(r=3, target_modules="all-linear", init_lora_weights=True)
    pairs = []
    for each in (tiny(), model):
        torch.manual_seed(5)
        pairs.append(trained(each, tmp_path, texts(), copy.deepcopy(adapters), bf16=False))
    (*wanted, plain, batches), (*found, model, _) = pairs
    assert_same(found, wanted, model, plain)
    assert_streamed(model, starts, batches)


def test_defaults_in_bf16_are_as_close_as_plain(tmp_path, starts):
    model = prepared(starts)
    exact, *_ = trained(tiny(), tmp_path, texts(), bf16=False)
    wanted, *_ = trained(tiny(), tmp_path, texts())
    found, _, model, batches = trained(model, tmp_path, texts())
    assert_streamed(model, starts, batches)
    error = max(abs(a - b) for a, b in zip(wanted["loss"], exact["loss"], strict=True))
    assert error > 0, "this was not bf16"
    assert max(abs(a - b) for a, b in zip(found["loss"], exact["loss"], strict=True)) < max(2 * error, 2e-3)
