"""Objectives against formulas written out, and their promise to be separable."""

from __future__ import annotations

import math

import pytest
import torch
from torch import tensor

from strategies import DPO, GRPO, SFT, Stats

IDS = torch.arange(24).view(4, 6)
# Learned tokens: row 0 has three, row 1 one, row 2 two, row 3 none (and its first token, which never counts).
LABELS = tensor([[9, -100, 1, 1, 1, -100], [-100] * 5 + [1], [1, 1, 1, -100, -100, -100], [1] + [-100] * 5])
LOGPROBS = torch.linspace(-3, -0.2, 6).double()


def stats(logprobs=LOGPROBS, **more):
    token = (LABELS[:, 1:] != -100).nonzero()
    flat = token[:, 0] * 6 + token[:, 1] + 1
    lengths = (LABELS[:, 1:] != -100).sum(1)
    return Stats(token[:, 0], flat, lengths, logprobs, **more)


def test_weights_are_known_before_any_forward():
    batch = {"input_ids": IDS, "labels": LABELS}
    assert SFT().weight(batch) == 6
    assert GRPO().weight(batch) == 3
    assert DPO().weight(batch) == 2
    only_fillers = {"input_ids": IDS, "labels": torch.full_like(LABELS, -100)}
    assert [o.weight(only_fillers) for o in (SFT(), DPO(), GRPO())] == [0, 0, 0]
    shifted = {"input_ids": IDS, "shift_labels": LABELS}
    assert SFT().weight(shifted) == 9


def test_statistics_find_their_entries():
    found = stats()
    assert found.take(IDS).tolist() == [2, 3, 4, 11, 13, 14]
    assert found.take_row(tensor([10, 20, 30, 40])).tolist() == [10, 10, 10, 20, 30, 30]
    assert found.sum_rows(torch.ones(6)).tolist() == [3, 1, 2, 0]
    cut = found.slice(2, 5)
    assert cut.take(IDS).tolist() == [4, 11, 13]
    assert cut.lengths_B.tolist() == [3, 1, 2, 0]
    assert cut.entropy_n is None


def test_sft_needs_only_what_it_uses():
    assert SFT().needs == frozenset()
    assert SFT(label_smoothing=0.1, z_loss=1.0).needs == {"mean_logprob", "logsumexp"}


def test_dpo_by_hand():
    reference = torch.zeros(4, 6).double()
    reference[0, 2:5] = -1
    reference[1, 5] = -0.5
    reference[2, 1:3] = -2
    sums = [float(LOGPROBS[:3].sum()) + 3, float(LOGPROBS[3]) + 0.5, float(LOGPROBS[4:].sum()) + 4, 0.0]
    margins = [0.3 * (sums[0] - sums[1]), 0.3 * (sums[2] - sums[3])]
    wanted = sum(0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in margins)
    found = DPO(beta=0.3, label_smoothing=0.1)(stats(), {"reference_logprobs": reference})
    assert float(found) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_grpo_by_hand(beta):
    old = LOGPROBS + tensor([0.5, -0.5, 0.01, 0.3, -0.3, 0.0]).double()
    per_token = torch.zeros(4, 6).double()
    per_token.view(-1)[stats().token_n] = old
    reference = per_token - 0.4
    advantages = [1.0, -2.0, 0.5, 3.0]
    rows, lengths = [0, 0, 0, 1, 2, 2], [3, 3, 3, 1, 2, 2]
    wanted = 0.0
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ratio = math.exp(LOGPROBS[i] - old[i])
        gain = min(ratio * advantages[row], min(max(ratio, 0.8), 1.2) * advantages[row])
        ahead = float(old[i]) - 0.4 - float(LOGPROBS[i])
        wanted += (-gain + beta * (math.exp(ahead) - ahead - 1)) / length
    batch = {"advantages": tensor(advantages), "old_logprobs": per_token, "reference_logprobs": reference}
    found = GRPO(beta=beta, clip=0.2)(stats(), batch)
    assert float(found) == pytest.approx(wanted, rel=1e-14)


def test_grpo_on_the_current_policy_is_the_policy_gradient():
    logprobs = LOGPROBS.clone().requires_grad_()
    GRPO()(stats(logprobs), {"advantages": tensor([1.0, -2.0, 0.5, 3.0])}).backward()
    wanted = tensor([-1 / 3, -1 / 3, -1 / 3, 2, -0.25, -0.25], dtype=torch.float64)
    assert torch.allclose(logprobs.grad, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "objective", [SFT(label_smoothing=0.1, z_loss=0.01), GRPO(beta=0.1)], ids=lambda o: type(o).__name__
)
def test_separable_objectives_are_the_sum_of_their_slices(objective):
    assert objective.separable
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(6, generator=generator).double().requires_grad_()
        for name in ("logprobs", "logsumexp_n", "mean_logprob_n")
    }
    tokens = torch.randn(4, 6, generator=generator).double()
    batch = {"advantages": tokens[:, 0], "old_logprobs": tokens, "reference_logprobs": tokens + 0.1}
    whole = stats(**values)
    wanted = torch.autograd.grad(objective(whole, batch), list(values.values()), materialize_grads=True)
    parts = [objective(whole.slice(i, j), batch) for i, j in ((0, 2), (2, 3), (3, 6))]
    found = [torch.autograd.grad(p, list(values.values()), materialize_grads=True) for p in parts]
    assert torch.allclose(sum(parts), objective(whole, batch), rtol=1e-14, atol=0)
    for i, right in enumerate(wanted):
        assert torch.equal(sum(gradients[i] for gradients in found), right)
