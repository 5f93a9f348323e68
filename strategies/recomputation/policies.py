"""Which operators of a layer are run again, by what they are: rules that hold for any model of Transformers.

A rule can only be wrong about cost: whatever it picks comes out the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from strategies.core.edits import original_class
from strategies.recomputation.tape import Operation, Policy

aten = torch.ops.aten
ACTIVATIONS = {
    *(aten.silu, aten.gelu, aten.relu, aten.sigmoid, aten.tanh, aten.elu, aten.leaky_relu, aten.mish),
    *(aten.hardtanh, aten.hardswish, aten.hardsigmoid, aten.softplus, aten.log_sigmoid_forward),
}
PRODUCTS = {aten.bmm, aten.baddbmm, aten.mm, aten.addmm, aten.matmul}
ROUNDS = "_ebbtide_lowbit"
"""An attribute of linears that round their input."""
_MIXES = {"attention_mask", "past_key_values", "position_embeddings", "cache_params", "position_ids"}


@cache
def _is_norm(kind: type) -> bool:
    return "norm" in kind.__name__.lower()


@cache
def _is_activation(kind: type) -> bool:
    if kind.__module__.startswith("transformers.activations"):
        return True
    return kind.__module__ == "torch.nn.modules.activation" and kind is not nn.MultiheadAttention


@cache
def mixes_tokens(kind: Any) -> bool:
    """Whether tokens see each other in it."""
    return not _MIXES.isdisjoint(inspect.signature(kind.forward).parameters)


def _attends(operation: Operation) -> bool:
    return any(mixes_tokens(original_class(module)) for module in operation.modules[1:])


def _norms(operation: Operation) -> bool:
    return any(_is_norm(original_class(module)) for module in operation.modules[1:]) or _rounds(operation, "norms")


def _rounds(operation: Operation, policy: str) -> bool:
    """What a linear does to round its input, where that is had again: codes are as well, then."""
    product = operation.func.overloadpacket in PRODUCTS or "product" in str(operation.func)
    return ROUNDS in vars(operation.modules[-1]) and not product and operation.is_made_of(policy)


def _activations(operation: Operation) -> bool:
    """The function, and what is done element by element with its value before the next product."""
    if any(_is_activation(original_class(module)) for module in operation.modules[1:]):
        return True
    if _rounds(operation, "activations"):
        return True
    if _attends(operation) or _norms(operation):
        return False
    follows = torch.Tag.pointwise in operation.func.tags and operation.follows("activations")
    return operation.func.overloadpacket in ACTIVATIONS or (follows and len(operation.modules) > 1)


def _attention(operation: Operation) -> bool:
    """Scores, softmax and dropout, between the product of queries and keys and the one with values. An attention that
    is a single operator keeps none of them."""
    if not (_attends(operation) and mixes_tokens(original_class(operation.modules[-1]))):
        return False
    follows = operation.follows("attention")
    return not follows if operation.func.overloadpacket in PRODUCTS else follows


def _mlp(operation: Operation) -> bool:
    return len(operation.modules) > 1 and not _attends(operation) and not _is_norm(original_class(operation.modules[1]))


RULES: dict[str, Callable[[Operation], bool]] = {
    "none": lambda operation: False,
    "attention": _attention,
    "norms": _norms,
    "activations": _activations,
    "mlp": _mlp,
    "full": lambda operation: True,
}


Rules = Mapping[str, Sequence[str]]
"""Names of policies, by the pattern of the modules' names in which they hold."""
EVERYWHERE = "*"


def policy_of(rules: Rules, names: Mapping[int, set[str]]) -> Policy:
    """`names`: the patterns that each module's name fits."""

    def policy(operation: Operation) -> frozenset[str]:
        return frozenset(
            name
            for pattern, chosen in rules.items()
            if pattern == EVERYWHERE or any(pattern in names.get(id(module), ()) for module in operation.modules)
            for name in chosen
            if RULES[name](operation)
        )

    return policy
