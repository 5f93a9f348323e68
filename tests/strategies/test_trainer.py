"""A prepared model in HF Trainer: the losses, norms and weights of the model that Trainer would have trained, whatever
is switched on beside it, and every layer streamed as often as it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from families import VOCABULARY, build
from transformers import Trainer, TrainingArguments

import strategies
from distrib.errors import Refused
from strategies.core import checkpointing
from strategies.core.lazy_logits import Reading
from strategies.streaming import blocks

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing:FutureWarning"
)  # the name that most scripts use

STEPS, MICRO_BATCHES, EVALUATED_BATCHES, LAYERS = 4, 3, 6, 2
STREAMBP = [strategies.get("streambp")(chunk=4)]


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
        rows = [F.pad(s[name], (0, width - len(s[name])), value=value) for s in samples]
        return torch.stack(rows)

    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}


def trainer_of(model, folder, more=None, **changes):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        optim="adamw_torch",
        dataloader_pin_memory=False,
        **changes,
    )
    data = {"train_dataset": Ragged(), "eval_dataset": Ragged(), "data_collator": collate}
    return Trainer(model, arguments, **data, **(more or {}))


def trained(model, folder, more=None, **changes):
    """Losses and norms of the steps, and the loss of an evaluation."""
    trainer = trainer_of(model, folder, more, **changes)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    evaluated = trainer.evaluate()["eval_loss"]
    return [entry["loss"] for entry in logged], [entry["grad_norm"] for entry in logged], evaluated


def assert_same(model, found, plain, wanted):
    for values, right in zip(found, wanted, strict=True):
        assert values == pytest.approx(right, rel=1e-4)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a - b).norm() < 1e-3 * (b - b.mean()).norm(), name


def tiny(initializer_range=0.02):
    return build("llama", initializer_range=initializer_range).float()


def switch(model, on=True):
    """By both names, one of which is newer."""
    for kind in ("gradient", "activation"):
        getattr(model, f"{kind}_checkpointing_{'enable' if on else 'disable'}", lambda: None)()


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A model as it is, trained."""
    plain = tiny()
    return plain, trained(plain, tmp_path_factory.mktemp("plain"))


class Counts:
    """How often layers started to stream, with and without gradients, and how often one began a forward: of a chunk,
    to record a chunk's keys, or because someone else runs the layer again."""

    def __init__(self):
        self.trained = self.evaluated = self.forwards = self.wanted_forwards = 0

    def start(self, chunks):
        if torch.is_grad_enabled():
            self.trained += 1
            self.wanted_forwards += 3 * chunks - 1
        else:
            self.evaluated += 1
            self.wanted_forwards += chunks

    def forward(self, *_):
        self.forwards += 1


@pytest.fixture
def counts(monkeypatch):
    counts = Counts()
    start = blocks.start_run

    def counted(*args):
        run, inputs = start(*args)
        counts.start(len(run.chunks))
        return run, inputs

    monkeypatch.setattr(blocks, "start_run", counted)
    return counts


def streamed(model, counts):
    """`model` prepared and past its trial, with the counts at zero."""
    strategies.prepare(model, STREAMBP)
    with torch.no_grad():
        model(**collate([Ragged()[5]]))
    counts.__init__()
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_pre_hook(counts.forward)
    return model


def assert_streamed(model, counts, evaluated=EVALUATED_BATCHES):
    """Each layer ran once forwards and once backwards a micro-batch, under no other checkpoint."""
    wanted = STEPS * MICRO_BATCHES
    assert [layer._ebbtide_block.backwards for layer in model.model.layers] == [wanted] * LAYERS
    assert (counts.trained, counts.evaluated) == (LAYERS * wanted, LAYERS * evaluated)
    as_they_are = LAYERS * (EVALUATED_BATCHES - evaluated)
    assert counts.forwards == counts.wanted_forwards + as_they_are


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "fields"), [("plain", {}), ("approx_bp", {"activations": False}), ("recompute", {"policy": "full"})]
)
def test_edits_that_are_exact_train_the_same(tmp_path, right, checkpointing, name, fields):
    model = tiny()
    strategies.prepare(model, [strategies.get(name)(**fields)])
    assert_same(model, trained(model, tmp_path, **({"gradient_checkpointing": True} if checkpointing else {})), *right)


@pytest.mark.parametrize("switched", ["never", "by the trainer", "before", "after", "before, after and by the trainer"])
def test_streambp_trains_the_same_whoever_switches_checkpointing_on(tmp_path, right, counts, switched):
    model = tiny()
    if "before" in switched:
        switch(model)
    streamed(model, counts)
    if "after" in switched:
        switch(model)
    found = trained(model, tmp_path, **({"gradient_checkpointing": True} if "trainer" in switched else {}))
    assert_same(model, found, *right)
    assert_streamed(model, counts)


def test_someone_elses_checkpoint_is_refused(tmp_path, monkeypatch):
    """Without the property that keeps Transformers' own away."""
    monkeypatch.delattr(checkpointing.RecomputesItself, "gradient_checkpointing")
    for reentrant in (False, True):
        model = tiny()
        strategies.prepare(model, STREAMBP)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with pytest.raises(Refused, match="switch the checkpointing around them off"):
            model.train()(**collate([Ragged()[5]])).loss.backward()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("during", [None, False, True])
def test_undo_leaves_the_switch_as_it_was_set(before, during):
    model = tiny()
    switch(model, before)
    step = strategies.prepare(model, STREAMBP)
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    if during is not None:
        switch(model, during)
    step.undo()
    wanted = before if during is None else during
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [wanted] * LAYERS
    model.train()(**collate([Ragged()[5]])).loss.backward()


def test_the_loss_of_a_step_is_a_mean_over_all_its_tokens(tmp_path, counts):
    model = streamed(tiny(0.3), counts)
    trainer = trainer_of(model, tmp_path)
    samples = [Ragged()[index] for index in (0, 6, 5, 11, 4, 3)]
    batches = [collate(samples[at : at + 2]) for at in (0, 2, 4)]
    items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    plain, losses, means = tiny(0.3), [], []
    for batch in batches:
        logits = plain(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        losses.append(F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum"))
        means.append(losses[-1] / (batch["labels"][:, 1:] != -100).sum())
    wanted = sum(losses) / sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    assert abs(wanted - sum(means) / 3) > 1e-3 * wanted, "these rows cannot tell"
    wanted.backward()
    trainer.current_gradient_accumulation_steps = MICRO_BATCHES
    found = sum(trainer.training_step(model, batch, num_items_in_batch=items) for batch in batches)
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm(), name


def test_bf16_is_as_close_as_plain_bf16(tmp_path, right, counts):
    exact, *_ = right[1]
    plain, model = tiny(), streamed(tiny(), counts)
    wanted, norms, evaluated = trained(plain, tmp_path, bf16=True)
    found, found_norms, found_evaluated = trained(model, tmp_path, bf16=True)
    assert_streamed(model, counts)
    assert found_norms == pytest.approx(norms, rel=2e-2)
    assert found_evaluated == pytest.approx(evaluated, rel=5e-3)
    error = max(abs(a - b) for a, b in zip(wanted, exact, strict=True))
    assert max(abs(a - b) for a, b in zip(found, exact, strict=True)) < max(2 * error, 2e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_logits_that_no_one_reads_are_not_formed(tmp_path, counts, monkeypatch, bf16):
    formed = []
    form = Reading.form
    monkeypatch.setattr(Reading, "form", lambda *args: formed.append(1) or form(*args))
    model = streamed(tiny(), counts)
    trained(model, tmp_path, bf16=bf16)
    assert not formed
    trainer_of(model, tmp_path, bf16=bf16).predict(Ragged())
    assert formed


def accuracy(prediction):
    right = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": right[prediction.label_ids[:, 1:] != -100].mean()}


def test_metrics_read_the_logits(tmp_path, counts):
    plain, model = tiny(), streamed(tiny(), counts)
    functions = {
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    wanted, found = (trainer_of(each, tmp_path, functions).evaluate()["eval_accuracy"] for each in (plain, model))
    assert found == wanted
    predicted, truth = (trainer_of(each, tmp_path).predict(Ragged()) for each in (model, plain))
    assert predicted.predictions.shape == truth.predictions.shape == (12, 8, VOCABULARY)
    assert predicted.predictions == pytest.approx(truth.predictions, rel=1e-4, abs=1e-5)
    assert predicted.metrics["test_loss"] == pytest.approx(truth.metrics["test_loss"], rel=1e-5)


def own_loss(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("how", ["label smoothing", "a loss of the loop's own"])
def test_losses_from_the_logits_stream_as_well(tmp_path, counts, how):
    more = {"compute_loss_func": own_loss} if how.startswith("a loss") else {}
    changes = {} if more else {"label_smoothing_factor": 0.1}
    plain, model = tiny(), streamed(tiny(), counts)
    wanted, found = (trained(each, tmp_path, more, **changes) for each in (plain, model))
    assert_same(model, found, plain, wanted)
    assert_streamed(model, counts, evaluated=0)


def test_bounds_of_packed_documents_need_their_positions(counts):
    model = streamed(tiny(), counts)
    ids, bounds = torch.arange(1, 9)[None], torch.tensor([0, 5, 8], dtype=torch.int32)
    packed = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    with pytest.raises(Refused, match="cu_seq_lens_k without position_ids"):
        model(input_ids=ids, labels=ids, **packed)
    position_ids = torch.cat([torch.arange(5), torch.arange(3)])[None]
    labels = torch.where(position_ids == 0, -100, ids)
    model(input_ids=ids, labels=labels, position_ids=position_ids, **packed).loss.backward()
    plain = tiny()
    losses = [
        F.cross_entropy(plain(input_ids=part[None]).logits[0, :-1], part[1:], reduction="sum")
        for part in (ids[0, :5], ids[0, 5:])
    ]
    (sum(losses) / 6).backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm(), name
