"""A prepared model in HF Trainer: the same losses and weights as the model that Trainer would have
trained."""

from __future__ import annotations

import copy

import pytest
import torch
from families import VOCABULARY, build
from transformers import Trainer, TrainingArguments

import strategies


class Ragged(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        length = 3 + index % 6
        ids = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 3] = -100
        return {"input_ids": ids, "labels": labels}


def collate(samples):
    width = max(len(sample["input_ids"]) for sample in samples)

    def pad(name, value):
        rows = [torch.nn.functional.pad(s[name], (0, width - len(s[name])), value=value) for s in samples]
        return torch.stack(rows)

    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}


def losses(model, folder):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        optim="adamw_torch",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, arguments, train_dataset=Ragged(), eval_dataset=Ragged(), data_collator=collate)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return logged, norms, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_the_same(tmp_path, checkpointing):
    plain = build("llama", initializer_range=0.02).float()
    model = copy.deepcopy(plain)
    strategies.prepare(model, [strategies.get("plain")()])
    if checkpointing:
        for each in (plain, model):
            # Its name changed; the old one warns.
            getattr(each, "activation_checkpointing_enable", each.gradient_checkpointing_enable)()
    wanted, wanted_norms, wanted_eval = losses(plain, tmp_path)
    found, norms, evaluated = losses(model, tmp_path)
    assert len(found) == 4
    assert found == pytest.approx(wanted, rel=1e-5)
    assert norms == pytest.approx(wanted_norms, rel=1e-4)
    assert evaluated == pytest.approx(wanted_eval, rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).norm() < 1e-3 * (b - b.mean()).norm(), name
