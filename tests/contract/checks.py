"""What every strategy and every pair must hold, as functions of a factory of it; a failing check raises AssertionError.

`CHECKS` is the suite: `test_contract.py` runs it on every strategy, and `test_wrong.py` shows that strategies
which are wrong in small ways do not pass. Engines and later strategies reuse `gradients` and the cases of
`reference`.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import reference
from contract.reference import Batch, Loss
from torch import Tensor, nn

import strategies
from distrib.contracts import Context
from distrib.errors import Refused
from strategies import DPO, GRPO, Fidelity, Objective, Strategy
from strategies.core.contract import is_exact, overrides

Factory = Callable[[], Strategy | Sequence[Strategy]]
"""Of one strategy, or of several that train together."""
KINDS = ("full", "tied", "lora")
EXACT = 1e-12


def small(name: str) -> dict[str, Any]:
    """Settings under which short sequences are several chunks, and a strategy that estimates is exact."""
    kind = strategies.get(name)
    chunk = {"chunk": 4} if "chunk" in {field.name for field in dataclasses.fields(kind)} else {}
    return {**chunk, **kind.exact_with}


def settings() -> dict[str, Factory]:
    """Every strategy under `small` settings, and as it is where it approximates."""
    found = {name: partial(strategies.get(name), **small(name)) for name in strategies.names()}
    return found | {f"{name}, approximate": strategies.get(name) for name in approximate_ones() if small(name)}


def approximate_ones() -> list[str]:
    return [name for name in strategies.names() if approximates(strategies.get(name)())]


def approximates(strategy: Strategy) -> bool:
    """By edits, in the backward alone: the forward is exact, and the gradient within the bound every time."""
    vague = strategy.fidelity is Fidelity.APPROXIMATE and not is_exact(strategy)
    return vague and not overrides(strategy, "step")


def listed(factory: Factory) -> list[Strategy]:
    chosen = factory()
    return [chosen] if isinstance(chosen, Strategy) else list(chosen)


def tolerance(factory: Factory) -> float:
    """Of gradients, relative, in float64; bounds add up. What a step estimates is held to its own bound by tests of its
    own."""
    vague = [strategy for strategy in listed(factory) if approximates(strategy)]
    assert all(strategy.bound for strategy in vague), "how far off is it?"
    assert all(is_exact(strategy) for strategy in listed(factory) if strategy not in vague), "when is it exact?"
    return EXACT + sum(strategy.bound for strategy in vague)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def gradients(
    factory: Factory,
    kind: str,
    case: str,
    objective: Objective | None = None,
    loss: Loss = reference.sft,
    weight: float | None = None,
    annotate: Callable[[Batch], Batch] = lambda batch: batch,
) -> None:
    """Loss, gradients and log-probabilities of a step are those of the reference."""
    batches = [annotate(batch) for batch in reference.cases()[case]]
    model = reference.tiny_model(kind)
    wanted = reference.truth(copy.deepcopy(model), batches, loss, weight)
    step = strategies.prepare(model, listed(factory), objective)
    result = step(batches)
    assert reference.difference(gradients_of(model), wanted.gradients) < tolerance(factory)
    assert abs(result.loss - wanted.loss) < EXACT * wanted.loss.abs()
    assert result.tokens == sum(batch["input_ids"].numel() for batch in batches)
    for found, right in zip(step.logprobs(batches), wanted.logprobs, strict=True):
        assert found.shape == right.shape
        assert not found.requires_grad
        assert (found - right).abs().max() <= EXACT * right.abs().max()


def with_references(batch: Batch) -> Batch:
    """What DPO and GRPO read beside the tokens, made up."""
    generator = torch.Generator().manual_seed(batch["input_ids"].numel())

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = batch["labels"].shape
    made = {"reference_logprobs": noise(*shape) - 5, "old_logprobs": noise(*shape) * 0.3 - 5}
    return {**batch, **made, "advantages": noise(shape[0])}


def dpo_loss(rows: list[Tensor], batch: Batch) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for chosen in range(0, len(rows), 2):
        rewards = []
        for row in (chosen, chosen + 1):
            learned = batch["labels"][row] != -100
            learned[0] = False
            rewards.append(((rows[row] - batch["reference_logprobs"][row]) * learned).sum())
        if learned.any():
            x = 0.1 * (rewards[0] - rewards[1])
            total = total + 0.8 * torch.log1p(torch.exp(-x)) + 0.2 * torch.log1p(torch.exp(x))
    return total


def grpo_loss(rows: list[Tensor], batch: Batch) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, logprobs in enumerate(rows):
        terms = []
        for t in range(1, len(logprobs)):
            if batch["labels"][row, t] != -100:
                ratio = (logprobs[t] - batch["old_logprobs"][row, t]).exp()
                advantage = batch["advantages"][row]
                gain = torch.min(ratio * advantage, torch.clamp(ratio, 0.8, 1.2) * advantage)
                ahead = batch["reference_logprobs"][row, t] - logprobs[t]
                terms.append(-gain + 0.05 * (ahead.exp() - ahead - 1))
        if terms:
            total = total + torch.stack(terms).mean()
    return total


def keeps_names(factory: Factory) -> None:
    """Parameters, buffers and state dict are the same tensors under the same names, before and after a
    step."""
    for kind in KINDS:
        model = reference.tiny_model(kind)
        state, names = dict(model.state_dict()), [name for name, _ in model.named_parameters()]
        classes = [type(module).__name__ for module in model.modules()]
        strategies.prepare(model, listed(factory))(reference.cases()["one"])
        after = model.state_dict()
        assert list(after) == list(state)
        assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
        assert [name for name, _ in model.named_parameters()] == names
        assert [type(module).__name__ for module in model.modules()] == classes


def undoes(factory: Factory) -> None:
    """After undo, modules are of the classes they were, hold what they held, and train as plain
    Transformers."""
    for kind in KINDS:
        model = reference.tiny_model(kind)
        before = [(id(m), type(m), sorted(vars(m))) for m in model.modules()]
        step = strategies.prepare(model, listed(factory))
        step(reference.cases()["one"])
        step.undo()
        assert [(id(m), type(m), sorted(vars(m))) for m in model.modules()] == before
        (batch,) = reference.cases()["one"]
        wanted = reference.truth(copy.deepcopy(model), [batch])
        model.zero_grad()
        logits = model(**batch).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
        assert reference.difference(gradients_of(model), wanted.gradients) < 1e-12


def generates(factory: Factory) -> None:
    """Logits and generated tokens are bitwise those of the model before, between steps too."""
    for kind in KINDS:
        model = reference.tiny_model(kind).eval()
        prompt = reference.cases()["one"][0]["input_ids"][:, :5]

        def generate(model: nn.Module = model, prompt: Tensor = prompt) -> Tensor:
            return model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)

        logits, tokens = model(input_ids=prompt).logits, generate()
        step = strategies.prepare(model, listed(factory))
        for _ in range(2):
            assert torch.equal(model(input_ids=prompt).logits, logits)
            assert torch.equal(generate(), tokens)
            step(reference.cases()["one"])


def prepares_twice(factory: Factory) -> None:
    """The same strategies again change nothing; others are refused; after an undo the model is free again."""

    class Other(Strategy):
        pass

    batches = reference.cases()["accumulation"]
    model = reference.tiny_model("full")
    wanted = reference.truth(copy.deepcopy(model), batches)
    first = strategies.prepare(model, listed(factory))
    second = strategies.prepare(model, listed(factory))
    second(batches)
    assert reference.difference(gradients_of(model), wanted.gradients) < tolerance(factory)
    names = ", ".join(map(strategies.name_of, listed(factory)))
    with pytest.raises(Refused, match=f"already prepared for {names}: undo that first"):
        strategies.prepare(model, [Other()])
    first.undo()
    strategies.prepare(model, [Other()])


def copies(factory: Factory) -> None:
    """A deep copy and a pickle of a prepared model train by themselves, and can be undone."""
    batches = reference.cases()["packing"]
    model = reference.tiny_model("tied")
    wanted = reference.truth(copy.deepcopy(model), batches)
    strategies.prepare(model, listed(factory))(batches)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        made.zero_grad()
        step = strategies.prepare(made, listed(factory))
        step(batches)
        assert reference.difference(gradients_of(made), wanted.gradients) < tolerance(factory)
        step.undo()
        assert [type(m) for m in made.modules()] == [type(m) for m in reference.tiny_model("tied").modules()]
    assert reference.difference(gradients_of(model), wanted.gradients) < tolerance(factory)


def adds_up(factory: Factory) -> None:
    """A second step without clearing adds its gradients to the first one's."""
    batches = reference.cases()["accumulation"]
    model = reference.tiny_model("lora")
    step = strategies.prepare(model, listed(factory))
    step(batches)
    once = {name: g.clone() for name, g in gradients_of(model).items()}
    step(batches)
    twice = {name: 2 * g for name, g in once.items()}
    assert reference.difference(gradients_of(model), twice) < EXACT


def trains_in_any_loop(factory: Factory) -> None:
    """A strategy that only edits is right under `model(**batch).loss.backward()`, packed rows included."""
    if any(overrides(strategy, "step") for strategy in listed(factory)):
        return
    for kind in KINDS:
        for case in ("right padding", "packing"):
            batch = reference.cases()[case][0]
            model = reference.tiny_model(kind)
            wanted = reference.truth(copy.deepcopy(model), [batch])
            strategies.prepare(model, listed(factory))
            output = model(**batch)
            output.loss.backward()
            assert abs(output.loss - wanted.loss) < EXACT * wanted.loss
            assert reference.difference(gradients_of(model), wanted.gradients) < tolerance(factory)


def repeats_bitwise(factory: Factory) -> None:
    """With dropout, the context alone decides: again is bitwise the same, another step is not, and the
    caller's randomness goes on untouched."""
    batches = reference.cases()["accumulation"]
    model = reference.tiny_model("full", dropout=0.3).train()
    step = strategies.prepare(model, listed(factory))
    found = []
    for number in (4, 4, 5):
        model.zero_grad()
        torch.manual_seed(number + len(found))
        state = torch.get_rng_state()
        result = step(batches, Context(seed=1, step=number, weight=20.0))
        assert torch.equal(torch.get_rng_state(), state)
        found.append((result.loss, {name: g.clone() for name, g in gradients_of(model).items()}))
    (loss, first), (again, second), (other, _) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(loss, other)


CHECKS: dict[str, Callable[[Factory], None]] = {
    f"gradients, {kind}, {case}": partial(gradients, kind=kind, case=case)
    for kind in KINDS
    for case in reference.cases()
}
for _kind in KINDS:
    CHECKS[f"gradients, {_kind}, dpo"] = partial(
        gradients,
        kind=_kind,
        case="partial window",
        objective=DPO(beta=0.1, label_smoothing=0.2),
        loss=dpo_loss,
        weight=1.0,
        annotate=with_references,
    )
    CHECKS[f"gradients, {_kind}, grpo"] = partial(
        gradients,
        kind=_kind,
        case="partial window",
        objective=GRPO(beta=0.05, clip=0.2),
        loss=grpo_loss,
        weight=2.0,
        annotate=with_references,
    )
for _check in (
    keeps_names,
    undoes,
    generates,
    prepares_twice,
    copies,
    adds_up,
    trains_in_any_loop,
    repeats_bitwise,
):
    CHECKS[_check.__name__] = _check
