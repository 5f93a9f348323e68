"""Exact attention of a chunk of queries over all keys so far, in parts that are merged by log-sum-exp.

`register` gives it to Transformers under the name "ebbtide". No T x T mask exists, no key is repeated for grouped
heads, and earlier keys and values are read where they are recorded and receive their gradients there: neither
they nor their gradients are ever concatenated.

Shapes: B rows, H query heads, Hk key/value heads, C queries, K keys so far, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from distrib.errors import Refused
from strategies.streaming.kernels import Scores, choose, unseen
from strategies.streaming.store import Chunk, handed_over
from strategies.streaming.unshared import not_shared
from strategies.streaming.visibility import Rows, causal_rows, stripes, visible_rows

NAME = "ebbtide"
_NOT_CARRIED = ("position_bias", "indices", "block_indices", "sinks")
"""Arguments of some models' attention that change its result, and that are not among what is done here."""


def register() -> None:
    """Make the attention and its masks known to Transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, visible_rows)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Rows | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What Transformers calls: query [B, H, C, D], key and value [B, Hk, K, D] -> ([B, C, H, Dv], None)."""
    for name in _NOT_CARRIED:
        if others.get(name) is not None:
            raise Refused(f"{type(module).__name__} passes {name} to its attention: not supported in chunks")
    chunk, shared = handed_over(key, value), stripes()
    if chunk is None:
        _refuse_unshared(module, query, key, attention_mask, shared.ranks)
        key, value = shared.keys(key), shared.keys(value)
    query, s_aux = shared.queries(query), None if s_aux is None else shared.own_heads(s_aux)
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    mask = _causal(module, query, key, is_causal) if attention_mask is None else attention_mask
    if isinstance(mask, Tensor) or (dropout and module.training):
        drop = dropout if module.training else 0.0
        return shared.outputs(weighted(query, key, value, mask, scores, s_aux, drop)), None
    if (mask.stop - mask.start, mask.stop) != (query.shape[2], key.shape[2]):
        raise Refused(
            f"{type(module).__name__}: {query.shape[2]} queries and {key.shape[2]} keys under a mask of positions "
            f"{mask.start}..{mask.stop - 1}: not supported in chunks"
        )
    return shared.outputs(attend(query, key, value, mask, scores, s_aux, chunk)), None


def _refuse_unshared(module: nn.Module, query: Tensor, key: Tensor, mask: object, ranks: int) -> None:
    """Keys that come from a cache have been exchanged, whatever else was done to them; a mask of the model's own has
    this rank's positions alone."""
    if ranks > 1 and (key.shape[2] != query.shape[2] or isinstance(mask, Tensor)):
        raise not_shared(module, ranks)


def _causal(module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None) -> Rows:
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise Refused(f"{type(module).__name__} is not causal: a sequence is run in chunks only under causal attention")
    return causal_rows(key.shape[2] - query.shape[2], key.shape[2], query.shape[0], query.device)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    scores: Scores,
    sinks: Tensor | None = None,
    chunk: Chunk | None = None,
) -> Tensor:
    """[B, C, H, Dv]. With `chunk`, earlier keys and values are read from its store, and their gradients left there.

    Rows that see nothing are 0, and give no gradient. `sinks` [H] are scores of one more column without a value.
    """
    dtype = _common_dtype(query, key, value)
    if chunk is not None:
        key, value = chunk.key_BHCD, chunk.value_BHCD
        assert (chunk.start, chunk.stop) == (rows.start, rows.stop)
    call = _Call(rows, scores, chunk)
    out: Tensor = _Attend.apply(query.to(dtype), key.to(dtype), value.to(dtype), sinks, call)  # type: ignore[no-untyped-call]
    return out


def _common_dtype(query: Tensor, key: Tensor, value: Tensor) -> torch.dtype:
    """Norms of queries and keys leave them in float32 under autocast, where matrix products take them in half."""
    widest = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and widest != torch.float64:
        return torch.get_autocast_dtype(kind)
    return widest


@dataclass(frozen=True)
class _Call:
    """What an attention is told beside its differentiable inputs."""

    rows: Rows
    scores: Scores
    chunk: Chunk | None

    def queries(self, block: Rows) -> slice:
        return slice(block.start - self.rows.start, block.stop - self.rows.start)

    def stretches(self, key: Tensor, value: Tensor) -> list[_Stretch]:
        """What is read from the store, then what this call was given."""
        if self.chunk is None or self.chunk.start == 0:
            return [_Stretch(0, key, value)]
        start = self.chunk.start
        return [_Stretch(0, *self.chunk.store.read(0, start)), _Stretch(start, key, value)]


@dataclass(frozen=True)
class _Stretch:
    """Keys and values from position `start` on."""

    start: int
    key: Tensor
    value: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.key.shape[2]

    def part(self, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        here = slice(start - self.start, stop - self.start)
        return self.key[:, :, here].to(dtype), self.value[:, :, here].to(dtype)


class _Attend(torch.autograd.Function):
    """Keeps queries, own keys and values, output and log-sum-exp; the backward runs the parts again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, call: _Call) -> Tensor:
        query = _laid_out(query, key)
        with torch.autocast(query.device.type, enabled=False):
            stretches = call.stretches(key, value)
            blocks = [
                _block_forward(query[:, :, call.queries(block)], stretches, block, call.scores, sinks)
                for block in call.rows.blocks()
            ]
        outs, logsumexps = zip(*blocks, strict=True)
        out_BCHD = _join(outs).to(query.dtype).transpose(1, 2).contiguous()
        ctx.save_for_backward(query, key, value, sinks, out_BCHD, _join(logsumexps))
        ctx.call = call
        return out_BCHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out_BCHD, logsumexp = ctx.saved_tensors
        call: _Call = ctx.call
        grad, out = (_laid_out(x.contiguous().transpose(1, 2), key) for x in (grad_BCHD, out_BCHD))
        own = _Own(0 if call.chunk is None else call.chunk.start, key, value)
        by_query = []
        with torch.autocast(query.device.type, enabled=False):
            stretches = call.stretches(key, value)
            for block in call.rows.blocks():
                here = call.queries(block)
                whole = (grad[:, :, here], query[:, :, here], out[:, :, here], logsumexp[:, :, here])
                by_query.append(_block_backward(*whole, stretches, block, call, own))
            by_sinks = None if sinks is None else _by_sinks(grad, out, logsumexp, sinks)
        by_key, by_value = own.gradients(call.chunk)
        return _join(by_query).to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype), by_sinks, None


def _laid_out(tensor_BHCD: Tensor, key: Tensor) -> Tensor:
    """Where heads share a key, their queries are folded into one; that is a view of a contiguous tensor only."""
    return tensor_BHCD if tensor_BHCD.shape[1] == key.shape[1] else tensor_BHCD.contiguous()


def _join(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=2)


def _block_forward(
    query: Tensor, stretches: list[_Stretch], block: Rows, scores: Scores, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [B, H, C, Dv] and log-sum-exp [B, H, C] of one block over all parts, in float32 at least."""
    out = logsumexp = None
    for stretch in stretches:
        for part in block.parts(stretch.start, min(stretch.stop, block.stop)):
            key, value = stretch.part(part.start, part.stop, query.dtype)
            one, its = choose(query, part.mask, scores).forward(query, key, value, part.mask, scores)
            if out is None or logsumexp is None:
                out, logsumexp = one.to(its.dtype), its
            else:
                out, logsumexp = _merged(out, logsumexp, one, its)
    low = unseen(query.dtype)
    if out is None or logsumexp is None:
        wide = torch.promote_types(query.dtype, torch.float32)
        logsumexp = torch.full(query.shape[:3], low, dtype=wide, device=query.device)
        out = logsumexp.new_zeros(*query.shape[:3], stretches[0].value.shape[-1])
    if not block.visibility.causal:
        blind = logsumexp < low / 2
        out = out.masked_fill_(blind.unsqueeze(-1), 0)
        # In the backward exp(score - logsumexp) must be 0 for them.
        logsumexp = logsumexp.masked_fill(blind, low if sinks is not None else -low)
    if sinks is not None:
        own, logsumexp = logsumexp, torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype)[:, None])
        out = out.mul_((own - logsumexp).exp_().unsqueeze(-1))
    return out, logsumexp


def _merged(out: Tensor, logsumexp: Tensor, one: Tensor, its: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp(logsumexp, its)
    out = out.mul_((logsumexp - both).exp_().unsqueeze(-1))
    return out.addcmul_(one.to(out.dtype), (its - both).exp_().unsqueeze(-1)), both


def _block_backward(
    grad: Tensor,
    query: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    stretches: list[_Stretch],
    block: Rows,
    call: _Call,
    own: _Own,
) -> Tensor:
    """The gradient of one block's queries; those of keys and values go, part by part, to where they belong."""
    by_query = None
    for stretch in stretches:
        for part in block.parts(stretch.start, min(stretch.stop, block.stop)):
            key, value = stretch.part(part.start, part.stop, query.dtype)
            kernel = choose(query, part.mask, call.scores)
            ours, by_key, by_value = kernel.backward(grad, query, key, value, out, logsumexp, part.mask, call.scores)
            by_query = ours.to(logsumexp.dtype) if by_query is None else by_query.add_(ours)
            if call.chunk is not None and part.start < call.chunk.start:
                call.chunk.store.leave(part.start, by_key, by_value)
            else:
                own.add(part.start, by_key, by_value)
    return torch.zeros_like(query) if by_query is None else by_query


def _by_sinks(grad: Tensor, out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """A sink takes weight from all values: its gradient is minus its weight times grad.out, over all rows."""
    weight_BHC = (sinks.to(logsumexp.dtype)[:, None] - logsumexp).exp_()
    return -(weight_BHC * (grad.to(logsumexp.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)


class _Own:
    """Sums the gradients of a call's own keys and values; buffers are made only where there is something to sum."""

    def __init__(self, start: int, key: Tensor, value: Tensor) -> None:
        self.start, self.key, self.value = start, key, value
        self.sums: tuple[Tensor, Tensor] | None = None

    def add(self, start: int, by_key: Tensor, by_value: Tensor) -> None:
        if self.sums is None:
            if by_key.shape[2] == self.key.shape[2]:
                self.sums = by_key, by_value
                return
            self.sums = self._zeros()
        for total, part in zip(self.sums, (by_key, by_value), strict=True):
            total[:, :, start - self.start : start - self.start + part.shape[2]] += part

    def _zeros(self) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(self.key.dtype, torch.float32)
        return torch.zeros_like(self.key, dtype=wide), torch.zeros_like(self.value, dtype=wide)

    def gradients(self, chunk: Chunk | None) -> tuple[Tensor, Tensor]:
        """With what later chunks have left."""
        by_key, by_value = self.sums or self._zeros()
        return (by_key, by_value) if chunk is None else chunk.store.collect(chunk.start, by_key, by_value)


def weighted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Rows | Tensor,
    scores: Scores,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """[B, C, H, Dv] by the plain formula, for dropout and for masks that a model made itself.

    Dropout is drawn for weights [B, H, C, K] of the queries' type, as Transformers' own attention does, so that the
    random numbers are the same. It costs the memory of these weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    score = query @ key.mT * scores.scale
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    seen = mask.seen() if isinstance(mask, Rows) else mask
    if seen.dtype == torch.bool:
        score = score.masked_fill(~seen, torch.finfo(score.dtype).min)
    else:
        score = score + seen
    if sinks is not None:
        column = sinks.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        score = torch.cat([score, column], dim=-1)
    wide = torch.promote_types(score.dtype, torch.float32)
    weight = score.softmax(-1, dtype=wide)[..., : key.shape[2]].to(query.dtype)
    if seen.dtype == torch.bool:
        weight = weight.masked_fill(~seen.any(-1, keepdim=True), 0)
    weight = nn.functional.dropout(weight, p=dropout)
    out: Tensor = weight @ value
    return out.transpose(1, 2).contiguous()
