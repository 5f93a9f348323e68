"""Real trainers on a tiny model and a few rows of uneven length, with or without strategies."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from families import build
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

import strategies
from launch.tokenizer import byte_tokenizer

STEPS, MICRO_BATCHES, ROWS = 20, 2, 2
CHUNK = 8
STRATEGIES = {
    "plain": {},
    "recompute": {"policy": "full"},
    "streambp": {"chunk": CHUNK},
    "seco": {"chunk": CHUNK},
    "spaco": {"chunk": CHUNK, "p": 1.0},
    "twobp": {},
}
CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def tiny():
    return build("llama", vocab_size=264, initializer_range=0.1).float()


def tokenizer():
    made = byte_tokenizer()
    made.chat_template = CHAT
    return made


def rows(kind):
    from datasets import Dataset

    words = ["ab cd " * (1 + i % 5) + chr(97 + i) for i in range(24)]
    made = {
        "trainer": [{"input_ids": list(word.encode()), "labels": list(word.encode())} for word in words],
        "sft": [{"text": word} for word in words],
        "dpo": [{"prompt": word, "chosen": "yes" * (1 + i % 3), "rejected": "no"} for i, word in enumerate(words)],
        "grpo": [{"prompt": word} for word in words],
    }
    return Dataset.from_list(made[kind])


def collate(samples):
    width = max(len(sample["input_ids"]) for sample in samples)

    def pad(name, value):
        return torch.stack([F.pad(torch.tensor(s[name]), (0, width - len(s[name])), value=value) for s in samples])

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": (ids != 0).long()}


def reward(completions, **_):
    """Something that a random model gets in different measure."""
    return [float(sum(ord(letter) % 7 for letter in completion)) for completion in completions]


def parts(kind):
    """A trainer's class, its arguments' class, and what else it is made with."""
    if kind == "trainer":
        return Trainer, TrainingArguments, {"data_collator": collate}, {}
    import trl

    kinds = {
        "sft": (trl.SFTTrainer, trl.SFTConfig, {}, {}),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {}, {"max_length": 64}),
        "grpo": (
            trl.GRPOTrainer,
            trl.GRPOConfig,
            {"reward_funcs": reward},
            {"num_generations": 2, "max_completion_length": 9, "num_iterations": 2, "temperature": 0.9},
        ),
    }
    trainer, arguments, more, changes = kinds[kind]
    return trainer, arguments, {"processing_class": tokenizer(), **more}, {"bf16": False, **changes}


def trainer_of(kind, folder, chosen=None, peft_config=None, **changes):
    base, arguments, more, settings = parts(kind)
    usual = {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
    }
    given = arguments(output_dir=str(folder), **{**usual, **settings, **changes})
    model = tiny()
    if kind == "dpo" and peft_config is None:
        more["ref_model"] = copy.deepcopy(model)
    if peft_config is not None and kind == "trainer":
        model = get_peft_model(model, peft_config)
    elif peft_config is not None:
        more["peft_config"] = peft_config
    more["train_dataset"] = rows(kind)
    if chosen is None:
        return base(model, args=given, **more)
    return type("Mine", (strategies.TrainerMixin, base), {})(model, args=given, strategies=chosen, **more)


def figures(trainer):
    """Everything that is logged at each step, but for times."""
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    timed = ("time", "runtime", "per_second", "epoch")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in logged]
