"""The store of weight gradients: what it keeps, and under autocast its copies."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from distrib.tracker import Tracker
from strategies.pipelining.store import Store


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=False))


def run(made: nn.Module, x: Tensor, store: Store | None) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        if store is None:
            made(x).float().square().sum().backward()
        else:
            with store:
                loss = made(x).float().square().sum()
            with store, store.deferring(0):
                loss.backward()
            store.run(0)
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


@pytest.mark.parametrize("forgets", [True, False])
def test_weights_that_change_between_steps_are_copied_again(forgets: bool) -> None:
    mine, truth, store = model(), model(), Store()
    for _ in range(3):
        x = torch.randn(5, 8)
        for one in (mine, truth):
            one.zero_grad()
        torch.testing.assert_close(run(mine, x, store), run(truth, x, None), rtol=1e-6, atol=1e-6)
        for one in (mine, truth):
            with torch.no_grad():
                for parameter in one.parameters():
                    parameter.mul_(-1.5)
        if forgets:
            store.forget()


def test_an_input_that_changes_in_place_is_copied_again() -> None:
    first, second, store = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False), Store()
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16), store:
        first(x)
        x.mul_(2)
        found = second(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found, second(x))


def held_bytes(step: int, bf16: bool) -> int:
    """Of what two products of one input leave of a micro-batch, weights and their copies aside; 0 after the forward, 1
    after the gradient of the input."""
    first, second, store = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False), Store()
    tracker, x = Tracker(fake=False), torch.randn(1000, 64)
    with tracker, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for _ in range(2):
            came = x.clone().requires_grad_()
            gc.collect()
            before = tracker.live_bytes
            with store:
                # Not a leaf, as in a layer.
                inner = came * 1.0
                outputs = [first(inner), second(inner)]
                del inner
                if step == 1:
                    with store.deferring(0):
                        torch.autograd.backward(outputs, [torch.ones_like(one) for one in outputs])
                    del outputs, came
            gc.collect()
            after = tracker.live_bytes
            store.run(0)
            outputs = came = None  # type: ignore[assignment]
    return after - before


@pytest.mark.parametrize("bf16", [False, True])
def test_a_shared_input_is_held_once_and_nothing_else_waits(bf16: bool) -> None:
    size = 2 if bf16 else 4
    factors = 1000 * (64 + 2 * 32) * size
    assert held_bytes(0, bf16) == factors
    # What came is gone, and its gradient.
    assert held_bytes(1, bf16) == factors - 1000 * 64 * 4
