"""Attention of queries over one part of their keys, and its gradients given the softmax of all parts.

A part's forward returns its own output and log-sum-exp. Its backward takes output and log-sum-exp *merged* over all
parts: the weights exp(score - logsumexp) are then those of the whole softmax, so each part's gradients are exact by
themselves. Flash kernels that take the two as arguments do this unchanged; they are private operators of PyTorch,
so each one is compared with plain operations before its first use and replaced by them where it differs.

Shapes: B rows, H query heads, G query heads for each of Hk key/value heads, C queries, K keys, D head size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Mask = Tensor | Literal["causal"] | None
Gradients = tuple[Tensor, Tensor, Tensor]

_MATH_SCORES = 1 << 20
"""Scores that plain operations hold at a time, so that a CPU's cache does; a few buffers of this size exist at once."""
_MATH_SCORES_DEVICE = 1 << 25
"""The same where starting an operation costs more."""


@dataclass(frozen=True)
class Scores:
    """How a query and a key become a score: scale * q.k, then softcap * tanh(score / softcap) if there is one."""

    scale: float
    softcap: float | None = None


def unseen(dtype: torch.dtype) -> float:
    """The score of a key that is not seen: finite, so that rows that see nothing yet stay free of NaN."""
    return max(torch.finfo(dtype).min / 2, -1e30)


class Kernel(Protocol):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scores: Scores) -> tuple[Tensor, Tensor]:
        """Output [B, H, C, Dv] and log-sum-exp [B, H, C] of this part alone; the latter in float32 at least."""
        ...

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        mask: Mask,
        scores: Scores,
    ) -> Gradients:
        """This part's share of the gradients of query, key and value; `out` and `logsumexp` are of all parts."""
        ...


def choose(query: Tensor, mask: Mask, scores: Scores) -> Kernel:
    """The fastest kernel that can do it."""
    if scores.softcap is None:
        for kernel in _candidates(query, mask):
            if _agrees(kernel, query.device, query.dtype):
                return kernel
    return Math()


def _candidates(query: Tensor, mask: Mask) -> Iterator[Fused]:
    if query.device.type == "cpu":
        yield CpuFlash()
    elif query.device.type == "cuda" and query.dtype != torch.float64:
        if query.dtype != torch.float32 and not isinstance(mask, Tensor) and query.shape[-1] <= 256:
            yield CudaFlash()
        yield CudaEfficient()


@cache
def _agrees(kernel: Fused, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a private operator is there and does what it is used for, merged arguments included."""
    try:
        # A tensor without values, as some memory estimates use, would have nothing to compare.
        with _disable_current_modes():
            _compare(kernel, device, dtype)
    except (AttributeError, TypeError, RuntimeError, AssertionError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"{type(kernel).__name__} on {device} in {dtype} is not usable here, attention will be slower: {why}",
            stacklevel=2,
        )
        return False
    return True


def _compare(kernel: Fused, device: torch.device, dtype: torch.dtype) -> None:
    wave = torch.arange(3 * 4 * 16 * 8, device=device).double().sin().to(dtype).view(3, 1, 4, 16, 8)
    query, (key, value) = wave[0], wave[1:, :, :2]
    scores = Scores(scale=0.4)
    bound = 1e-10 if dtype == torch.float64 else 1e-4 if dtype == torch.float32 else 0.05
    tile = torch.arange(16, device=device) % 3 != 0
    for mask in ("causal", None, tile.expand(1, 1, 16, 16)):
        if kernel.masks or not isinstance(mask, Tensor):
            out, logsumexp = kernel.forward(query, key, value, mask, scores)
            # As merged with other parts.
            whole = (out.to(dtype) / 2, logsumexp + 0.7)
            got = [out, logsumexp, *kernel.backward(query, query, key, value, *whole, mask, scores)]
            want = [*Math().forward(query, key, value, mask, scores)]
            want += Math().backward(query, query, key, value, *whole, mask, scores)
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one.to(other.dtype), other, rtol=bound, atol=bound)


@dataclass(frozen=True)
class Math:
    """Plain operations in float32 at least, some queries at a time: softcap, and whatever no fused kernel takes."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scores: Scores) -> tuple[Tensor, Tensor]:
        query, key, value = (_wide(x) for x in (query, key, value))
        outs, logsumexps = [], []
        for block in _query_blocks(query, key):
            score, _ = _score(query[:, :, block], key, mask, block, scores)
            logsumexp = score.logsumexp(-1)
            weight = score.sub_(logsumexp.unsqueeze(-1)).exp_()
            outs.append(_heads(_fold(weight, key) @ value, weight))
            logsumexps.append(logsumexp)
        return torch.cat(outs, dim=2), torch.cat(logsumexps, dim=2)

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        mask: Mask,
        scores: Scores,
    ) -> Gradients:
        grad, query, key, value = (_wide(x) for x in (grad, query, key, value))
        delta_BHC = (grad * _wide(out)).sum(-1)
        by_query, by_key, by_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for block in _query_blocks(query, key):
            score, slope = _score(query[:, :, block], key, mask, block, scores)
            weight = score.sub_(logsumexp[:, :, block].unsqueeze(-1)).exp_()
            folded_grad = _fold(grad[:, :, block], key)
            by_value += _fold(weight, key).mT @ folded_grad
            by_score = _heads(folded_grad @ value.mT, weight).sub_(delta_BHC[:, :, block].unsqueeze(-1)).mul_(weight)
            by_score = _fold(by_score if slope is None else by_score.mul_(slope), key).mul_(scores.scale)
            by_query.append(_heads(by_score @ key, weight))
            by_key += by_score.mT @ _fold(query[:, :, block], key)
        return torch.cat(by_query, dim=2), by_key, by_value


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _query_blocks(query: Tensor, key: Tensor) -> Iterator[slice]:
    rows, heads, queries, _ = query.shape
    limit = _MATH_SCORES if query.device.type == "cpu" else _MATH_SCORES_DEVICE
    step = max(1, limit // (rows * heads * key.shape[2]))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


def _score(query: Tensor, key: Tensor, mask: Mask, block: slice, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """[B, H, C, K], and the slope of the softcap, taken before anything is masked."""
    score = _heads(_fold(query, key) @ key.mT, query).mul_(scores.scale)
    slope = None
    if scores.softcap is not None:
        score = score.div_(scores.softcap).tanh_()
        slope = 1 - score**2
        score = score.mul_(scores.softcap)
    if mask is not None:
        index = torch.arange(key.shape[2], device=key.device)
        seen = index <= index[block].unsqueeze(-1) if isinstance(mask, str) else mask[:, :, block]
        score = score.masked_fill_(~seen, unseen(score.dtype))
    return score, slope


def _fold(tensor_BHCx: Tensor, key: Tensor) -> Tensor:
    """[B, Hk, G * C, x]: the queries of a group of heads as queries of their one key head, so no key is repeated."""
    rows, heads, queries, size = tensor_BHCx.shape
    return tensor_BHCx.reshape(rows, key.shape[1], heads // key.shape[1] * queries, size)


def _heads(folded: Tensor, like_BHCx: Tensor) -> Tensor:
    return folded.reshape(*like_BHCx.shape[:3], folded.shape[-1])


@dataclass(frozen=True)
class Fused:
    """A flash kernel and what it wants: one size for all heads, groups folded or repeated, masks as a bias."""

    multiple: int = 1
    """Head sizes are padded with zeros to a multiple of this."""
    groups: bool = False
    """It takes fewer key heads than query heads."""
    masks: bool = True
    """It takes tiles, not the triangle alone."""

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def run_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        raise NotImplementedError

    def bias(self, seen: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, unseen(dtype))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scores: Scores) -> tuple[Tensor, Tensor]:
        grouped = self._grouped(query, key, mask)
        q, k, v = self._fit(query, key, value, grouped)
        bias = self.bias(mask, q.dtype, q.shape[1]) if isinstance(mask, Tensor) else None
        out, logsumexp = self.run(q, k, v, mask == "causal" if bias is None else False, bias, scores.scale)
        out = out[..., : value.shape[-1]]
        return _heads(out, query), logsumexp.reshape(query.shape[:3])

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        mask: Mask,
        scores: Scores,
    ) -> Gradients:
        grouped = self._grouped(query, key, mask)
        q, k, v = self._fit(query, key, value, grouped)
        if grouped == "folded":
            grad, out = _fold(grad, key), _fold(out, key)
        grad, out = (self._padded(x, q.shape[-1]) for x in (grad, out))
        bias = self.bias(mask, q.dtype, q.shape[1]) if isinstance(mask, Tensor) else None
        causal = mask == "causal" if bias is None else False
        logsumexp = logsumexp.reshape(q.shape[:3])
        by_q, by_k, by_v = self.run_backward(grad, q, k, v, out, logsumexp, causal, bias, scores.scale)
        by_query = _heads(by_q[..., : query.shape[-1]], query)
        by_key, by_value = by_k[..., : key.shape[-1]], by_v[..., : value.shape[-1]]
        if grouped == "repeated":
            groups = (key.shape[0], key.shape[1], -1, key.shape[2])
            by_key, by_value = (x.reshape(*groups, x.shape[-1]).sum(2) for x in (by_key, by_value))
        return by_query, by_key, by_value

    def _grouped(self, query: Tensor, key: Tensor, mask: Mask) -> Literal["folded", "repeated"] | None:
        if self.groups or query.shape[1] == key.shape[1]:
            return None
        return "folded" if mask is None else "repeated"

    def _fit(self, query: Tensor, key: Tensor, value: Tensor, grouped: str | None) -> Gradients:
        size = max(query.shape[-1], value.shape[-1])
        size += -size % self.multiple
        if grouped == "folded":
            query = _fold(query, key)
        elif grouped == "repeated":
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        query, key, value = (self._padded(x, size) for x in (query, key, value))
        return query, key, value

    def _padded(self, tensor: Tensor, size: int) -> Tensor:
        if tensor.shape[-1] != size:
            return F.pad(tensor, (0, size - tensor.shape[-1]))
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(frozen=True)
class CpuFlash(Fused):
    """PyTorch's flash attention for CPUs."""

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = flash(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        return out, logsumexp

    def run_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        by_query, by_key, by_value = flash(
            grad, query, key, value, out, logsumexp, 0.0, causal, attn_mask=bias, scale=scale
        )
        return by_query, by_key, by_value


@dataclass(frozen=True)
class CudaFlash(Fused):
    """Flash attention on CUDA: half precision, no mask but the triangle, groups of heads as they are."""

    multiple: int = 8
    groups: bool = True
    masks: bool = False

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return out, logsumexp[..., : query.shape[2]]

    def run_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        # Shapes and types as the forward returns them; nothing reads them without dropout.
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        offset = torch.zeros((), dtype=torch.uint64, device=query.device)
        lengths = (query.shape[2], key.shape[2])
        by_query, by_key, by_value = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, out, logsumexp.contiguous(), None, None, *lengths, 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip
        return by_query, by_key, by_value


@dataclass(frozen=True)
class CudaEfficient(Fused):
    """Memory-efficient attention on CUDA: float32, and masked tiles."""

    multiple: int = 8

    def bias(self, seen: Tensor, dtype: torch.dtype, heads: int) -> Tensor:
        """Rows of a tile start at aligned addresses, as the kernel demands."""
        rows, _, queries, keys = seen.shape
        wide = torch.zeros(rows, 1, queries, keys + -keys % 16, dtype=dtype, device=seen.device)
        return wide[..., :keys].masked_fill_(~seen, unseen(dtype))

    def run(
        self, query: Tensor, key: Tensor, value: Tensor, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        if bias is not None:
            bias = bias.expand(*query.shape[:3], -1)
        out, logsumexp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, causal, scale=scale
        )
        return out, logsumexp[..., : query.shape[2]]

    def run_backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> Gradients:
        if bias is not None:
            bias = bias.expand(*query.shape[:3], -1)
        # The kernel reads whole groups of 32 queries; infinity gives those that are not there no weight.
        logsumexp = F.pad(logsumexp, (0, -logsumexp.shape[-1] % 32), value=float("inf"))
        none = torch.zeros((), dtype=torch.int64, device=query.device)
        by_query, by_key, by_value, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, bias, out, logsumexp, none, none, 0.0, [True, True, True, False], causal,
            scale=scale,
        )  # fmt: skip
        return by_query, by_key, by_value
