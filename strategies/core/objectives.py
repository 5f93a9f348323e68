"""What is minimised, as functions of per-token statistics: they know nothing of logits, chunks or pipelines.

Shapes: B sequences, T positions, n learned tokens of a batch (or of a slice of them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distrib.contracts import IGNORE, loss_positions


@dataclass(frozen=True)
class Stats:
    """Statistics of the model's distribution at the learned tokens, and where those tokens are.

    `token_n` indexes the flattened [B, T] batch, aligned with `input_ids` (with `shift_labels` when the
    caller gave those); `lengths_B` counts the learned tokens of whole sequences, also when this is a slice of
    them.
    """

    row_n: Tensor
    token_n: Tensor
    lengths_B: Tensor
    logprob_n: Tensor
    """Log-probability of the token."""
    logsumexp_n: Tensor | None = None
    entropy_n: Tensor | None = None
    mean_logprob_n: Tensor | None = None
    """Mean over the vocabulary of the log-probability: what label smoothing needs."""

    def take(self, per_token_BT: Tensor) -> Tensor:
        """[n]: the entries of a [B, T] tensor at the learned tokens."""
        return per_token_BT.reshape(-1)[self.token_n]

    def take_row(self, per_row_B: Tensor) -> Tensor:
        """[n]: for each learned token, its sequence's entry of a [B] tensor."""
        return per_row_B[self.row_n]

    def sum_rows(self, per_token_n: Tensor) -> Tensor:
        """[B]: sums over the learned tokens of each sequence."""
        zeros_B = per_token_n.new_zeros(self.lengths_B.shape[0])
        return zeros_B.index_add(0, self.row_n, per_token_n)

    def slice(self, start: int, stop: int) -> Stats:
        """Tokens [start, stop) of these."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {
            name: value if value is None or name == "lengths_B" else value[start:stop] for name, value in whole.items()
        }
        return Stats(**cut)


class Objective(Protocol):
    """A sum over a batch, whose gradient divided by W is what a step leaves in the parameters.

    `separable`: the sum is over tokens, and a call on any slice of them gives exactly that slice's terms;
    then gradients can be computed where the statistics are, in the head's forward.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Statistics beside the log-probability: of logsumexp, entropy, mean_logprob."""
        ...

    @property
    def separable(self) -> bool: ...

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        """This batch's share of W, known before any forward."""
        ...

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        """The sum, as a scalar; not divided by W."""
        ...


def learned(batch: Mapping[str, Tensor]) -> Tensor:
    """[B, T] bool: positions whose next token is learned."""
    shifted = batch.get("shift_labels")
    return loss_positions(batch["labels"]) if shifted is None else shifted != IGNORE


@dataclass(frozen=True)
class SFT:
    """Cross-entropy of the labels; W counts loss tokens.

    Label smoothing mixes the target with the uniform distribution; `z_loss` adds that multiple of logsumexp
    squared, which keeps logits from drifting.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    separable = True

    @property
    def needs(self) -> frozenset[str]:
        wanted = {"mean_logprob": self.label_smoothing, "logsumexp": self.z_loss}
        return frozenset(name for name, factor in wanted.items() if factor)

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(learned(batch).sum())

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        loss_n = -(1 - self.label_smoothing) * stats.logprob_n
        if self.label_smoothing:
            loss_n = loss_n - self.label_smoothing * cast(Tensor, stats.mean_logprob_n)
        if self.z_loss:
            loss_n = loss_n + self.z_loss * cast(Tensor, stats.logsumexp_n) ** 2
        return loss_n.sum()


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (2305.18290); W counts pairs.

    Rows 2i and 2i + 1 of a batch are the chosen and the rejected answer of pair i; `reference_logprobs` [B,
    T] are the reference model's. `label_smoothing` is the assumed share of flipped preferences (the paper's
    conservative form). A pair without learned tokens counts nothing: it only fills up a rank's share.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    separable = False
    needs = frozenset[str]()

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(learned(batch).any(1).view(-1, 2).any(1).sum())

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        reference_n = stats.take(batch["reference_logprobs"]).to(stats.logprob_n.dtype)
        reward_P2 = stats.sum_rows(stats.logprob_n - reference_n).view(-1, 2)
        margin_P = self.beta * (reward_P2[:, 0] - reward_P2[:, 1])
        kept, flipped = F.logsigmoid(margin_P), F.logsigmoid(-margin_P)
        loss_P = -(1 - self.label_smoothing) * kept - self.label_smoothing * flipped
        return (loss_P * stats.lengths_B.view(-1, 2).any(1)).sum()


@dataclass(frozen=True)
class GRPO:
    """Group-relative policy optimisation (2402.03300) on given completions; W counts sequences.

    Clipped policy gradient with `advantages` [B], a mean over each sequence's learned tokens. `old_logprobs`
    [B, T] are those of the policy that sampled (absent: the current one's); with `beta` the k3 estimate of
    the divergence from `reference_logprobs` [B, T] is added. A sequence without learned tokens counts
    nothing.
    """

    beta: float = 0.0
    clip: float = 0.2
    separable = True
    needs = frozenset[str]()

    def weight(self, batch: Mapping[str, Tensor]) -> float:
        return float(learned(batch).any(1).sum())

    def __call__(self, stats: Stats, batch: Mapping[str, Tensor]) -> Tensor:
        logprob_n, dtype = stats.logprob_n, stats.logprob_n.dtype
        old_BT = batch.get("old_logprobs")
        old_n = logprob_n.detach() if old_BT is None else stats.take(old_BT).to(dtype)
        advantage_n = stats.take_row(batch["advantages"]).to(dtype)
        ratio_n = torch.exp(logprob_n - old_n)
        clipped_n = ratio_n.clamp(1 - self.clip, 1 + self.clip)
        loss_n = -torch.minimum(ratio_n * advantage_n, clipped_n * advantage_n)
        if self.beta:
            ahead_n = stats.take(batch["reference_logprobs"]).to(dtype) - logprob_n
            loss_n = loss_n + self.beta * (torch.exp(ahead_n) - ahead_n - 1)
        return (loss_n / stats.take_row(stats.lengths_B)).sum()
