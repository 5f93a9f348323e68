"""Every exact strategy under the real Trainer and TRL's SFT, DPO and GRPO trainers: what the trainer itself logs and
trains without strategies, step by step, and every micro-batch through the strategy."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from loop_cases import MICRO_BATCHES, STEPS, STRATEGIES, figures, tokenizer, trainer_of

import strategies
from strategies.recomputation import tape
from strategies.streaming.sequence import ChunkedBatch

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # as TRL calls it

KINDS = [pytest.param("trainer"), *(pytest.param(kind, marks=pytest.mark.trl) for kind in ("sft", "dpo", "grpo"))]
FAST = {("trainer", "seco"), ("trainer", "twobp"), ("sft", "seco"), ("dpo", "seco"), ("grpo", "seco")}
CASES = [
    pytest.param(*kind.values, name, marks=[*kind.marks, *([] if (*kind.values, name) in FAST else [pytest.mark.slow])])
    for kind in KINDS
    for name in STRATEGIES
]
ALL = STEPS * MICRO_BATCHES


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A trainer of each kind as it is, trained."""
    known = {}

    def trained(kind):
        if kind not in known:
            known[kind] = trainer_of(kind, tmp_path_factory.mktemp(kind))
            known[kind].train()
        return known[kind]

    return trained


@pytest.fixture
def runs(monkeypatch):
    """How many chunks were run with a graph, and how many values were computed again."""
    noted = Counter()
    states, rebuild = ChunkedBatch.states, tape.rebuild

    def noting(*args, **kwargs):
        noted["chunks"] += torch.is_grad_enabled()
        return states(*args, **kwargs)

    def counting(wanted):
        noted["again"] += 1
        return rebuild(wanted)

    monkeypatch.setattr(ChunkedBatch, "states", noting)
    monkeypatch.setattr(tape, "rebuild", counting)
    return noted


def needs_trl(kind):
    if kind != "trainer":
        pytest.importorskip("trl", reason="trl is not installed: pip install -c constraints.txt 'ebbtide[trl]'")


def layers(trainer):
    return [part for part in trainer.model.modules() if type(part).__name__ == "LlamaDecoderLayer"]


def assert_went_through(trainer, name, runs):
    """Once a micro-batch, in chunks where there are chunks, and by nobody else's checkpoint."""
    if name in ("seco", "spaco", "twobp"):
        assert trainer.attached.carrier.backwards == ALL
        assert not trainer.args.gradient_checkpointing
        assert runs["chunks"] == 0 if name == "twobp" else runs["chunks"] > 2 * ALL
    if name == "streambp":
        assert [layer._ebbtide_block.backwards for layer in layers(trainer)] == [ALL] * len(layers(trainer))
    if name == "recompute":
        # The very first micro-batch is looked at.
        assert runs["again"] >= (ALL - 1) * len(layers(trainer))


def assert_same(trainer, right):
    found, wanted = figures(trainer), figures(right)
    assert len(found) == len(wanted) == STEPS
    assert len({entry["loss"] for entry in wanted}) > STEPS / 2, "these rows say nothing"
    for entry, other in zip(found, wanted, strict=True):
        assert entry == pytest.approx(other, rel=2e-5, abs=2e-6)
    for (name, a), b in zip(trainer.model.named_parameters(), right.model.parameters(), strict=True):
        assert (a - b).norm() <= 2e-5 * b.norm(), name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_twenty_steps_are_the_trainers_own(tmp_path, plain, runs, kind, name):
    needs_trl(kind)
    trainer = trainer_of(kind, tmp_path, [strategies.get(name)(**STRATEGIES[name])])
    trainer.train()
    assert_same(trainer, plain(kind))
    assert_went_through(trainer, name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["seco", "streambp"])
def test_with_adapters_that_the_trainer_puts_on(tmp_path, runs, kind, name):
    """After the model was given to it, in TRL; the reference is then the model without them."""
    from peft import LoraConfig

    needs_trl(kind)
    more = {"beta": 0.04} if kind == "grpo" else {}
    pair = []
    for chosen in (None, [strategies.get(name)(**STRATEGIES[name])]):
        torch.manual_seed(5)
        adapters = LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
        pair.append(trainer_of(kind, tmp_path, chosen, adapters, **more))
        # At once: completions are drawn.
        pair[-1].train()
    right, trainer = pair
    assert_same(trainer, right)
    assert_went_through(trainer, name, runs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_close_as_the_trainers_own(tmp_path, plain, kind):
    needs_trl(kind)
    exact, wanted, found = (
        [entry["grad_norm"] for entry in figures(trainer)]
        for trainer in (plain(kind), *(trained_in_bf16(kind, tmp_path, chosen) for chosen in (None, ["seco"])))
    )
    error = max(abs(a - b) / b for a, b in zip(wanted[:4], exact[:4], strict=True))
    assert error > 0, "this was not bf16"
    assert max(abs(a - b) / b for a, b in zip(found[:4], exact[:4], strict=True)) < max(3 * error, 1e-2)


def trained_in_bf16(kind, folder, names):
    chosen = names and [strategies.get(name)(**STRATEGIES[name]) for name in names]
    trainer = trainer_of(kind, folder, chosen, bf16=True, max_steps=4)
    trainer.train()
    return trainer


@pytest.mark.trl
def test_generation_runs_as_it_is(tmp_path, monkeypatch):
    needs_trl("grpo")
    trainer = trainer_of("grpo", tmp_path, [strategies.get("seco")(chunk=8)])
    calls = []
    step = trainer.attached.carrier.step
    monkeypatch.setattr(step, "halfway", lambda *args: calls.append(1) or type(step).halfway(step, *args))
    ids = torch.tensor([list(b"ab cd ab")])
    model = trainer.model.eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": tokenizer().pad_token_id}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert not calls
    trainer.attached.undo()
    assert found.tolist() == model.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist()


def test_evaluation_and_what_is_saved(tmp_path, runs):
    from loop_cases import rows
    from transformers import AutoModelForCausalLM

    right, trainer = (trainer_of("trainer", tmp_path, chosen) for chosen in (None, [strategies.get("seco")(chunk=8)]))
    data = rows("trainer")
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(right.evaluate(data)["eval_loss"], rel=1e-6)
    assert trainer.predict(data).predictions == pytest.approx(right.predict(data).predictions, rel=1e-4, abs=1e-5)
    assert not runs["chunks"]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded).__name__ == "LlamaForCausalLM"
    for (name, a), b in zip(loaded.named_parameters(), right.model.parameters(), strict=True):
        assert torch.equal(a, b), name


ROOT = Path(__file__).parents[2]
TRL = [pytest.param(f"trl_{kind}", marks=[pytest.mark.trl, pytest.mark.slow]) for kind in ("sft", "dpo", "grpo")]


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # no device to pin for
@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")  # as torchft calls logging
@pytest.mark.parametrize("name", ["hf_trainer", "bare_loop", "replicas", *TRL])
def test_the_examples_run(tmp_path, monkeypatch, name):
    if name.startswith("trl"):
        needs_trl("trl")
    if name == "replicas":
        pytest.importorskip("torchft", reason="torchft is not installed")
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path(str(ROOT / "recipes" / "loops" / f"{name}.py"))["main"](steps=2)
    if name in ("bare_loop", "replicas"):
        assert len(made) == 2
        return
    assert made.state.global_step == 2
    made.attached.assert_ran()
    assert (made.attached.carrier is None) == (name == "trl_sft")
    assert any((tmp_path / "runs" / "loops" / name).glob("*.safetensors"))


def test_every_example_is_run():
    shipped = {path.stem for path in (ROOT / "recipes" / "loops").glob("*.py")}
    assert shipped == {"hf_trainer", "bare_loop", "replicas", *(case.values[0] for case in TRL)}
