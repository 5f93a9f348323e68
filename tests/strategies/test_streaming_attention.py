"""Attention in chunks against a softmax over the whole T x T scores, written here in plain float64 autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, MistralConfig
from transformers import masking_utils as hf
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_eager
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_eager
from transformers.models.llama.modeling_llama import eager_attention_forward as llama_eager

from distrib.errors import Refused
from strategies.streaming import attention as streaming
from strategies.streaming import kernels, visibility
from strategies.streaming.kernels import CpuFlash, Math, Scores, choose
from strategies.streaming.store import Store, StreamCache
from strategies.streaming.visibility import Rows, Spread, Visibility, causal_rows, visible_rows, within

T = 61
BOUNDS = [(0, 13), (13, 30), (30, 31), (31, 55), (55, T)]
MODULE = SimpleNamespace(training=True, num_key_value_groups=1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 61 positions have many tiles, blocks and parts, none of them a multiple of a chunk."""
    monkeypatch.setattr(visibility, "TILE_KEYS", 6)
    monkeypatch.setattr(visibility, "BLOCK_QUERIES", 10)
    monkeypatch.setattr(visibility, "PART_KEYS", 16)
    monkeypatch.setattr(visibility, "_SCAN_KEYS", 18)
    monkeypatch.setattr(kernels, "_MATH_SCORES", 700)


@dataclass
class Problem:
    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    sinks: Tensor | None = None
    softcap: float | None = None
    scale: float = 0.37

    def leaves(self) -> Problem:
        made = {n: getattr(self, n) for n in ("query", "key", "value", "sinks")}
        return replace(self, **{n: x if x is None else x.detach().clone().requires_grad_() for n, x in made.items()})

    def to(self, *args: Any) -> Problem:
        made = {n: getattr(self, n) for n in ("query", "key", "value", "grad", "sinks")}
        return replace(self, **{n: x if x is None else x.to(*args) for n, x in made.items()})


def problem(
    batch: int = 2, heads: int = 4, key_heads: int = 4, size: int = 8, value_size: int = 8, length: int = T, **more: Any
) -> Problem:
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    more["sinks"] = normal(heads) if more.get("sinks") else None
    return Problem(
        # The layout that models use: heads are cut from the last dimension.
        normal(batch, length, heads, size).transpose(1, 2) * 2,
        normal(batch, length, key_heads, size).transpose(1, 2),
        normal(batch, length, key_heads, value_size).transpose(1, 2),
        normal(batch, length, heads, value_size),
        **more,
    )


Outcome = dict[str, Tensor]


def reference(given: Problem, seen: Tensor) -> Outcome:
    """Output and gradients by the definition; `seen` is [B or 1, T, T]."""
    p = given.leaves()
    groups = p.query.shape[1] // p.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (p.key, p.value))
    score = torch.einsum("bhqd,bhkd->bhqk", p.query, key) * p.scale
    if p.softcap is not None:
        score = p.softcap * torch.tanh(score / p.softcap)
    seen = seen[:, None]
    weight = torch.where(seen, (score - score.amax(-1, keepdim=True).detach()).exp(), 0.0)
    total = weight.sum(-1, keepdim=True)
    if p.sinks is not None:
        total = total + (p.sinks.view(1, -1, 1, 1) - score.amax(-1, keepdim=True).detach()).exp()
    weight = weight / torch.where(total == 0, 1.0, total)
    out = torch.einsum("bhqk,bhkd->bqhd", weight, value)
    out.backward(p.grad)
    return outcome(out, p)


def outcome(out: Tensor, p: Problem) -> Outcome:
    made = {"out": out.detach(), "query": p.query.grad, "key": p.key.grad, "value": p.value.grad}
    return made | ({} if p.sinks is None else {"sinks": p.sinks.grad})


def chunked(given: Problem, rows: Rows | Callable[[int, int], Any], bounds: list[tuple[int, int]] = BOUNDS) -> Outcome:
    """Recorded forwards, then walked back in reverse, as a strategy does it."""
    rows_of = rows.narrow if isinstance(rows, Rows) else rows
    cache = StreamCache(bounds[-1][1])
    sinks = None if given.sinks is None else given.sinks.detach().clone().requires_grad_()

    def run(start: int, stop: int, p: Problem) -> Tensor:
        key, value = cache.update(p.key, p.value, 0)
        out, weights = streaming.attention(
            MODULE, p.query, key, value, rows_of(start, stop), scaling=p.scale, softcap=p.softcap, s_aux=sinks
        )
        assert weights is None
        return out

    def part(start: int, stop: int) -> Problem:
        cut = {n: getattr(given, n)[:, :, start:stop] for n in ("query", "key", "value")}
        return replace(given, **cut, sinks=None).leaves()

    outs = []
    for start, stop in bounds:
        cache.position.move(start, stop)
        with torch.no_grad():
            outs.append(run(start, stop, part(start, stop)))
    found: list[Outcome] = []
    for (start, stop), first in reversed(list(zip(bounds, outs, strict=True))):
        cache.position.move(start, stop, writes=False)
        p = part(start, stop)
        out = run(start, stop, p)
        assert torch.equal(out, first)
        out.backward(given.grad[:, start:stop])
        found.insert(0, outcome(out, p))
    made = {n: torch.cat([f[n] for f in found], dim=1 if n == "out" else 2) for n in found[0]}
    return made | ({} if sinks is None else {"sinks": sinks.grad})


def whole(given: Problem, rows: Rows) -> Outcome:
    """Without recorded keys: all keys are differentiable inputs of each chunk."""
    p = given.leaves()
    outs = []
    for start, stop in BOUNDS:
        keys = (p.key[:, :, :stop], p.value[:, :, :stop])
        here = rows.narrow(start, stop)
        outs.append(streaming.attend(p.query[:, :, start:stop], *keys, here, Scores(p.scale, p.softcap), p.sinks))
    out = torch.cat(outs, dim=1)
    out.backward(p.grad)
    return outcome(out, p)


def error(got: Outcome, want: Outcome) -> float:
    assert got.keys() == want.keys()
    return max(((got[n] - want[n]).abs().max() / want[n].abs().max()).item() for n in want)


index = torch.arange(T)
CAUSAL = (index[None, :] <= index[:, None])[None]


def window(width: int) -> Tensor:
    return CAUSAL & (index[None, :] > index[:, None] - width)[None]


def sight(name: str, device: str = "cpu") -> tuple[Rows, Tensor]:
    """What Transformers would ask the mask function for, and the T x T mask that this means."""
    padding = torch.ones(2, T, dtype=torch.bool)
    if name == "causal":
        return visible_rows(2, T, T, device=device), CAUSAL
    if name.startswith("window"):
        width = int(name[6:])
        return visible_rows(
            2, T, T, device=device, mask_function=hf.sliding_window_causal_mask_function(width)
        ), window(width)
    if name == "right":
        padding[0, 40:] = padding[1, 58:] = False
        return visible_rows(2, T, T, device=device, attention_mask=padding.to(device)), CAUSAL & padding[:, None]
    if name == "left":
        padding[0, :23] = padding[1, :2] = False
        return visible_rows(2, T, T, device=device, attention_mask=padding.to(device)), CAUSAL & padding[:, None]
    if name == "packed":
        ids = documents_of([7, 20, 1, 33], [50, 11])
        with within(Spread(documents_BT=ids.to(device))):
            return visible_rows(2, T, T, device=device), CAUSAL & (ids[:, :, None] == ids[:, None])
    assert name == "chunks"
    padding[0, :9] = False
    pads = torch.tensor([9, 0])
    block = (index - pads[:, None]).div(14, rounding_mode="floor")
    rows = visible_rows(
        2,
        T,
        T,
        device=device,
        mask_function=hf.chunked_causal_mask_function(14, pads.to(device)),
        attention_mask=padding.to(device),
    )
    return rows, CAUSAL & (block[:, :, None] == block[:, None]) & padding[:, None]


def documents_of(*lengths: list[int]) -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])


SIGHTS = ["causal", "window2", "window11", "window40", "right", "left", "packed", "chunks"]
SHAPES = {
    "mha": {},
    "gqa": {"key_heads": 2},
    "mqa": {"key_heads": 1},
    "wide values": {"key_heads": 2, "value_size": 12},
    "narrow values": {"value_size": 5},
    "softcap": {"key_heads": 2, "softcap": 3.0},
    "sinks": {"key_heads": 2, "sinks": True},
    "softcap and sinks": {"softcap": 2.0, "sinks": True, "value_size": 3},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SIGHTS)
def test_exact_in_chunks(name: str, shape: str) -> None:
    rows, seen = sight(name)
    given = problem(**SHAPES[shape])
    want = reference(given, seen)
    assert error(chunked(given, rows), want) < 1e-12
    assert error(whole(given, rows), want) < 1e-12


@pytest.mark.parametrize("name", SIGHTS)
def test_plain_operations_are_exact_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "choose", lambda *_: Math())
    rows, seen = sight(name)
    for shape in ("gqa", "wide values", "sinks"):
        given = problem(**SHAPES[shape])
        assert error(chunked(given, rows), reference(given, seen)) < 1e-12


@pytest.mark.parametrize("bounds", [[(0, T)], [(i, i + 1) for i in range(T)]])
def test_one_chunk_and_chunks_of_one(bounds: list[tuple[int, int]]) -> None:
    for name in ("causal", "left", "window11"):
        rows, seen = sight(name)
        given = problem(key_heads=2)
        assert error(chunked(given, rows, bounds), reference(given, seen)) < 1e-12


@pytest.mark.parametrize(
    ("asked", "meant"), [("window11", "window12"), ("causal", "window60"), ("left", "causal"), ("chunks", "packed")]
)
def test_another_mask_would_be_noticed(asked: str, meant: str) -> None:
    given = problem(key_heads=2)
    seen = window(int(meant[6:])) if meant.startswith("window") else sight(meant)[1]
    assert error(chunked(given, sight(asked)[0]), reference(given, seen)) > 1e-4


def test_the_usual_sizes_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    length, width = 2700, 1300
    at = torch.arange(length)
    seen = ((at <= at[:, None]) & (at > at[:, None] - width))[None]
    rows = visible_rows(1, length, length, mask_function=hf.sliding_window_causal_mask_function(width))
    given = problem(batch=1, heads=2, key_heads=1, length=length)
    bounds = [(0, 1100), (1100, 2500), (2500, length)]
    assert error(chunked(given, rows, bounds), reference(given, seen)) < 1e-12


def test_gradients_of_keys_come_in_bounded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    leave = Store.leave

    def counted(self: Any, start: int, by_keys: Tensor, by_values: Tensor) -> None:
        widths.append(by_keys.shape[2])
        leave(self, start, by_keys, by_values)

    monkeypatch.setattr(Store, "leave", counted)
    chunked(problem(), sight("causal")[0])
    assert sum(widths) == sum(start for start, _ in BOUNDS)
    assert max(widths) == visibility.PART_KEYS


def test_blind_rows_are_zero() -> None:
    rows, _ = sight("left")
    got = chunked(problem(key_heads=2), rows)
    assert not got["out"][0, :23].any()
    assert not got["query"][0, :, :23].any()
    assert all(x.isfinite().all() for x in got.values())


# What Transformers asks for


def test_causal_masks_are_never_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluated(*_: Any) -> Tensor:
        raise AssertionError("a tile of a plain causal mask")

    monkeypatch.setattr(Visibility, "tile", evaluated)
    ones = torch.ones(2, T, dtype=torch.bool)
    with within(Spread(documents_BT=torch.zeros(2, T, dtype=torch.long))):
        for rows in (visible_rows(2, T, T), visible_rows(2, T, T, attention_mask=ones)):
            assert [tuple(p) for p in rows.narrow(30, 50).parts(0, 50)] == [
                (0, 16, None),
                (16, 30, None),
                (30, 50, "causal"),
            ]


def test_parts_leave_out_what_is_not_seen() -> None:
    parts = [*sight("window11")[0].narrow(40, 50).parts(0, 50)]
    assert [(p.start, p.stop) for p in parts] == [(30, 36), (36, 40), (40, 50)]
    assert [p.mask if not isinstance(p.mask, Tensor) else "tile" for p in parts] == ["tile", "tile", "causal"]


@pytest.fixture
def registered() -> None:
    streaming.register()
    streaming.register()
    assert AttentionInterface()[streaming.NAME] is streaming.attention


def configured(kind: type, **more: Any) -> Any:
    config = kind(**more)
    config._attn_implementation = streaming.NAME
    return config


@pytest.mark.usefixtures("registered")
def test_masks_as_transformers_builds_them() -> None:
    embeds = torch.zeros(2, T, 4)
    ids = documents_of([7, 20, 1, 33], [50, 11])
    positions = torch.cat([torch.arange(n) for n in (7, 20, 1, 33, 50, 11)]).view(2, T)
    apart = ids[:, :, None] == ids[:, None]
    common = {"inputs_embeds": embeds, "attention_mask": None, "past_key_values": None, "position_ids": positions}
    packed = hf.create_causal_mask(configured(LlamaConfig), **common)
    assert torch.equal(packed.seen()[:, 0], CAUSAL & apart)
    slid = hf.create_sliding_window_causal_mask(configured(MistralConfig, sliding_window=9), **common)
    assert torch.equal(slid.seen()[:, 0], window(9) & apart)
    seen = chunked(problem(), slid), reference(problem(), window(9) & apart)
    assert error(*seen) < 1e-12


@pytest.mark.usefixtures("registered")
def test_masks_built_with_a_cache_are_chunks() -> None:
    cache = StreamCache(T)
    cache.position.move(13, 30)
    padding = torch.ones(2, 30, dtype=torch.long)
    padding[0, :4] = 0
    asked = {"inputs_embeds": torch.zeros(2, 17, 4), "past_key_values": cache}
    rows = hf.create_causal_mask(configured(LlamaConfig), attention_mask=padding, **asked)
    assert (rows.start, rows.stop) == (13, 30)
    assert torch.equal(rows.seen()[:, 0], CAUSAL[:, 13:30, :30] & padding.bool()[:, None])
    ids = documents_of([7, 20, 1, 33], [50, 11])
    config = configured(LlamaConfig, attention_chunk_size=5)
    with within(Spread(documents_BT=ids)):
        rows = hf.create_chunked_causal_mask(config, attention_mask=None, **asked)
    inside = torch.cat([torch.arange(n) for n in (7, 20, 1, 33, 50, 11)]).view(2, T) // 5
    seen = CAUSAL & (ids[:, :, None] == ids[:, None]) & (inside[:, :, None] == inside[:, None])
    assert torch.equal(rows.seen()[:, 0], seen[:, 13:30, :30])


def test_dense_is_what_eager_attention_takes() -> None:
    padding = torch.ones(2, T, dtype=torch.bool)
    padding[0, :5] = False
    want = hf.eager_mask(2, 17, 30, q_offset=13, attention_mask=padding, dtype=torch.bfloat16)
    got = visible_rows(2, T, T, attention_mask=padding).narrow(13, 30).dense(torch.bfloat16)
    assert torch.equal(got, want)


# Other ways into it


def test_without_a_mask_it_is_lower_right_causal() -> None:
    given = problem(key_heads=2)
    assert error(chunked(given, lambda start, stop: None), reference(given, CAUSAL)) < 1e-12


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_that_a_model_made_itself(kind: str) -> None:
    _, seen = sight("window11")

    def made(start: int, stop: int) -> Tensor:
        mask = seen[:, None, start:stop, :stop].expand(2, 1, -1, -1)
        return mask if kind == "bool" else torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e300)

    given = problem(key_heads=2, softcap=3.0, sinks=True)
    assert error(chunked(given, made), reference(given, seen)) < 1e-12


@pytest.mark.parametrize(
    ("eager", "more"), [(llama_eager, {}), (gemma2_eager, {"softcap": 3.0}), (gpt_oss_eager, {"sinks": True})]
)
def test_dropout_draws_what_eager_attention_draws(eager: Any, more: dict[str, Any]) -> None:
    given = problem(key_heads=2, **more).to(torch.float32)
    rows = sight("window11")[0].narrow(13, 30)
    results = []
    for function, mask in ((eager, rows.dense(torch.float32)), (streaming.attention, rows)):
        p = given.leaves()
        module = SimpleNamespace(training=True, num_key_value_groups=2, sinks=p.sinks, head_dim=8)
        torch.manual_seed(3)
        out, _ = function(
            module,
            p.query[:, :, 13:30],
            p.key[:, :, :30],
            p.value[:, :, :30],
            mask,
            dropout=0.3,
            scaling=p.scale,
            softcap=p.softcap,
            s_aux=p.sinks,
        )
        out.backward(p.grad[:, 13:30])
        results.append(outcome(out, p) | {"random": torch.rand(3)})
    assert error(results[1], results[0]) < 1e-6
    assert torch.equal(results[0]["random"], results[1]["random"])


def test_dropout_reaches_recorded_keys() -> None:
    """A chunk's dropout is replayed, and its prefix gets the gradient that a whole graph gives it."""
    given, bounds = problem(key_heads=2), [(0, 30), (30, T)]
    rows = sight("causal")[0]
    module = SimpleNamespace(training=True)

    def attended(p: Problem, key: Tensor, value: Tensor, start: int, stop: int) -> Tensor:
        torch.manual_seed(start)
        here = rows.narrow(start, stop)
        return streaming.attention(module, p.query, key, value, here, dropout=0.3, scaling=p.scale)[0]

    p = given.leaves()
    for start, stop in bounds:
        cut = replace(p, query=p.query[:, :, start:stop])
        attended(cut, p.key[:, :, :stop], p.value[:, :, :stop], start, stop).backward(p.grad[:, start:stop])
    cache = StreamCache(T)
    by_key = []
    for writes in (True, False):
        for start, stop in bounds if writes else reversed(bounds):
            cache.position.move(start, stop, writes)
            cut = replace(given, **{n: getattr(given, n)[:, :, start:stop] for n in ("query", "key", "value")}).leaves()
            with torch.set_grad_enabled(not writes):
                out = attended(cut, *cache.update(cut.key, cut.value, 0), start, stop)
            if not writes:
                out.backward(given.grad[:, start:stop])
                by_key.insert(0, cut.key.grad)
    assert p.key.grad is not None
    assert (torch.cat(by_key, dim=2) - p.key.grad).abs().max() < 1e-12


def test_what_is_not_carried_is_refused() -> None:
    p = problem()
    inputs = (p.query, p.key, p.value)
    with pytest.raises(Refused, match="position_bias"):
        streaming.attention(MODULE, *inputs, None, position_bias=torch.zeros(1))
    with pytest.raises(Refused, match="not causal"):
        streaming.attention(MODULE, *inputs, None, is_causal=False)
    with pytest.raises(Refused, match="not causal"):
        streaming.attention(SimpleNamespace(training=True, is_causal=False), *inputs, None)
    with pytest.raises(Refused, match=r"61 queries and 61 keys under a mask of positions 0\.\.59"):
        streaming.attention(MODULE, *inputs, causal_rows(0, 60, 2, p.query.device))
    later = visible_rows(2, T, T, mask_function=hf.bidirectional_mask_function)
    with pytest.raises(Refused, match=r"positions 0\.\.9 see later ones"):
        streaming.attend(*(x[:, :, :13] for x in inputs), later.narrow(0, 13), Scores(1.0))


def test_nothing_is_saved_without_a_graph() -> None:
    p = problem().leaves()
    with torch.no_grad():
        out, _ = streaming.attention(MODULE, p.query, p.key, p.value, None)
    assert out.grad_fn is None
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        streaming.attention(MODULE, p.query, p.key, p.value, None)
    assert sum(x.numel() for x in saved) == 4 * p.query.numel() + 2 * 4 * T


# Precision and kernels


def test_the_fused_kernel_is_used() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert isinstance(choose(torch.zeros(1, 1, 1, 8, dtype=dtype), None, Scores(1.0)), CpuFlash)
    assert isinstance(choose(torch.zeros(1, 1, 1, 8), None, Scores(1.0, softcap=2.0)), Math)


def test_a_kernel_that_differs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(CpuFlash):
        def run_backward(self, grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
            return super().run_backward(grad * 1.01, *args)

    monkeypatch.setattr(kernels, "CpuFlash", Wrong)
    with pytest.warns(UserWarning, match="Wrong on cpu in torch.float32 is not usable here"):
        kernel = choose(torch.zeros(1, 1, 1, 8), None, Scores(1.0))
    assert isinstance(kernel, Math)


@pytest.mark.parametrize("name", ["causal", "left", "window11"])
def test_bf16_is_as_good_as_pytorch_attention(name: str) -> None:
    rows, seen = sight(name)
    given = problem(key_heads=2).to(torch.bfloat16)
    want = reference(given.to(torch.float64), seen)
    p = given.leaves()
    key, value = (x.repeat_interleave(2, dim=1) for x in (p.key, p.value))
    mask = seen[:, None].expand(2, -1, -1, -1)
    out = F.scaled_dot_product_attention(p.query, key, value, mask, scale=p.scale).transpose(1, 2)
    out.backward(p.grad)
    got = chunked(given, rows)
    assert all(x.dtype == torch.bfloat16 for x in got.values())
    assert error(got, want) < max(1.5 * error(outcome(out, p), want), 0.01)


def test_autocast_with_queries_left_in_float32() -> None:
    given = problem(key_heads=2).to(torch.float32)
    given = replace(given, value=given.value.bfloat16(), grad=given.grad.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = chunked(given, sight("causal")[0])
    assert {n: x.dtype for n, x in got.items()} == {
        "out": torch.bfloat16,
        "query": torch.float32,
        "key": torch.float32,
        "value": torch.bfloat16,
    }
    assert error(got, reference(given.to(torch.float64), CAUSAL)) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(shape: str, dtype: torch.dtype) -> None:
    given = problem(**SHAPES[shape]).to(dtype)
    for name in SIGHTS:
        _, seen = sight(name)
        got = chunked(given.to("cuda"), sight(name, "cuda")[0])
        want = reference(given.to(torch.float64), seen)
        assert error({n: x.cpu() for n, x in got.items()}, want) < (1e-4 if dtype == torch.float32 else 0.03)
    assert not isinstance(choose(given.query.to("cuda"), None, Scores(1.0)), Math)
