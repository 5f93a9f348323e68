"""From hidden states to per-token statistics and back, one chunk of tokens at a time.

The logits of a chunk are the only ones alive. This file has the arithmetic;
`strategies/core/passes.py` puts it into autograd.

Shapes: B sequences, T positions, N = B * T, n learned tokens, C tokens of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strategies.core.objectives import Stats

# Small enough to stay out of the way of activations. Every chunk also passes once over the head's gradient, which
# asks for more rows where products are fast.
CHUNK_BYTES = 16 * 2**20
LEAST_ROWS = {"cpu": 128, "cuda": 1024}
SLAB_ROWS = 8192

LogitMap = Callable[[Tensor], Tensor]
"""What the model does to the head's output [C, V]: softcap, scaling; row by row."""


@dataclass(frozen=True)
class Tokens:
    """The learned tokens of a batch: where their hidden states are, what they are, whose they are."""

    position_n: Tensor
    target_n: Tensor
    row_n: Tensor
    token_n: Tensor
    lengths_B: Tensor

    def stats(self, values: dict[str, Tensor], start: int = 0) -> Stats:
        stop = start + values["logprob"].shape[0]
        named = {f"{name}_n": value for name, value in values.items()}
        return Stats(self.row_n[start:stop], self.token_n[start:stop], self.lengths_B, **named)


@dataclass(frozen=True)
class Work:
    """One pass over the learned tokens: what to measure, in which precision, after which map."""

    tokens: Tokens
    names: tuple[str, ...]
    logit_map: LogitMap | None
    matmul_dtype: torch.dtype
    head: nn.Linear

    @property
    def exact_dtype(self) -> torch.dtype:
        return torch.float64 if self.matmul_dtype == torch.float64 else torch.float32


@dataclass
class Chunk:
    """A chunk after its forward; the gradient of the logits is formed in the place of `logprob_CV`."""

    start: int
    position_C: Tensor
    target_C: Tensor
    hidden_CD: Tensor
    logits_CV: Tensor
    mapped_CV: Tensor
    logprob_CV: Tensor
    values: dict[str, Tensor]


def chunks(work: Work, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Iterator[Chunk]:
    """Forward chunk by chunk. Two buffers serve all chunks: fresh pages cost as much as a pass over them."""
    count, vocabulary = work.tokens.position_n.shape[0], weight_VD.shape[0]
    most = max(LEAST_ROWS[hidden_ND.device.type], CHUNK_BYTES // (4 * vocabulary))
    # Equal chunks: the last one would otherwise be a small, slow product.
    rows = -(-count // -(-count // most)) if count else 1
    logits_RV = hidden_ND.new_empty(rows, vocabulary, dtype=work.matmul_dtype)
    logprob_RV = torch.empty_like(logits_RV, dtype=work.exact_dtype)
    for start in range(0, count, rows):
        position_C = work.tokens.position_n[start : start + rows]
        target_C = work.tokens.target_n[start : start + rows]
        hidden_CD = hidden_ND.index_select(0, position_C).to(work.matmul_dtype)
        logits_CV, logprob_CV = logits_RV[: len(position_C)], logprob_RV[: len(position_C)]
        if bias_V is None:
            torch.mm(hidden_CD, weight_VD.t(), out=logits_CV)
        else:
            torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=logits_CV)
        logits_CV, mapped_CV = _mapped(work, logits_CV)
        torch.log_softmax(mapped_CV, -1, dtype=work.exact_dtype, out=logprob_CV)
        values = _measure(work.names, mapped_CV, logprob_CV, target_C)
        yield Chunk(start, position_C, target_C, hidden_CD, logits_CV, mapped_CV, logprob_CV, values)


def _mapped(work: Work, logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The logits as a leaf of the map's own little graph, and what the map makes of them."""
    if work.logit_map is None:
        return logits_CV, logits_CV
    leaf_CV = logits_CV.to(work.exact_dtype).detach().requires_grad_()
    with torch.enable_grad():
        return leaf_CV, work.logit_map(leaf_CV)


def _measure(names: tuple[str, ...], mapped_CV: Tensor, logprob_CV: Tensor, target_C: Tensor) -> dict[str, Tensor]:
    values = {"logprob": logprob_CV.gather(1, target_C[:, None])[:, 0]}
    if "logsumexp" in names:
        values["logsumexp"] = mapped_CV.detach().gather(1, target_C[:, None])[:, 0] - values["logprob"]
    if "entropy" in names:
        values["entropy"] = torch.special.entr(logprob_CV.exp()).sum(1)
    if "mean_logprob" in names:
        values["mean_logprob"] = logprob_CV.mean(1)
    return values


def logit_gradient(work: Work, chunk: Chunk, factors: dict[str, Tensor]) -> Tensor:
    """[C, V]: gradient of sum(factor_C * statistic_C) over the statistics, in terms of the head's output.

    With p the distribution and H its entropy, the derivatives by the mapped logits are: log-probability
    onehot - p, logsumexp p, mean log-probability 1/V - p, entropy -p log p - p H.
    """
    factor_C = factors["logprob"].to(work.exact_dtype)
    p_CV = chunk.logprob_CV.exp_()
    on_p_C = -factor_C
    if "logsumexp" in factors:
        on_p_C = on_p_C + factors["logsumexp"]
    if "mean_logprob" in factors:
        on_p_C = on_p_C - factors["mean_logprob"]
    if "entropy" in factors:
        surprise_CV = torch.special.entr(p_CV).mul_(factors["entropy"][:, None])
        p_CV.mul_((on_p_C - factors["entropy"] * chunk.values["entropy"])[:, None]).add_(surprise_CV)
    else:
        p_CV.mul_(on_p_C[:, None])
    if "mean_logprob" in factors:
        p_CV.add_(factors["mean_logprob"][:, None], alpha=1 / p_CV.shape[1])
    p_CV.scatter_add_(1, chunk.target_C[:, None], factor_C[:, None])
    if work.logit_map is not None:
        gradient_CV = p_CV.to(chunk.mapped_CV.dtype)
        (p_CV,) = torch.autograd.grad(chunk.mapped_CV, chunk.logits_CV, gradient_CV, retain_graph=True)
    return p_CV.to(work.matmul_dtype)


class Gradients:
    """Sums of the chunks' gradients: hidden states in their own precision, weight and bias in float32 at
    least."""

    def __init__(self, work: Work, inputs: tuple[Tensor, Tensor, Tensor | None], wanted: tuple[bool, ...]) -> None:
        hidden_ND, weight_VD, bias_V = inputs
        self.dtype = work.exact_dtype
        self.hidden_ND = torch.zeros_like(hidden_ND) if wanted[0] else None
        self.weight_VD = torch.zeros_like(weight_VD, dtype=self.dtype) if wanted[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=self.dtype) if bias_V is not None and wanted[2] else None

    def add(self, chunk: Chunk, gradient_CV: Tensor, weight_VD: Tensor) -> None:
        if self.hidden_ND is not None:
            rows_CD = (gradient_CV @ weight_VD).to(self.hidden_ND.dtype)
            self.hidden_ND.index_copy_(0, chunk.position_C, rows_CD)
        if self.weight_VD is not None:
            self._add_product(gradient_CV, chunk.hidden_CD)
        if self.bias_V is not None:
            self.bias_V += gradient_CV.sum(0, dtype=self.dtype)

    def _add_product(self, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
        assert self.weight_VD is not None
        if gradient_CV.dtype == self.dtype or not gradient_CV.is_cuda:
            self.weight_VD.addmm_(gradient_CV.to(self.dtype).t(), hidden_CD.to(self.dtype))
            return
        # bfloat16 factors, float32 sums; in slabs, so that the products before they are added stay small.
        slabs = zip(torch.split(self.weight_VD, SLAB_ROWS), torch.split(gradient_CV, SLAB_ROWS, 1), strict=True)
        for weight_SD, gradient_CS in slabs:
            weight_SD += torch.mm(gradient_CS.t(), hidden_CD, out_dtype=self.dtype)

    def like(self, inputs: tuple[Tensor, Tensor, Tensor | None]) -> list[Tensor | None]:
        """In the shapes and precisions of the inputs; the sums are handed over."""
        sums = (self.hidden_ND, self.weight_VD, self.bias_V)
        return [
            None if total is None or given is None else total.to(given.dtype).view(given.shape)
            for total, given in zip(sums, inputs, strict=True)
        ]
