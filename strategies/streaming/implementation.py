"""The attention that Transformers' layers call, switched for as long as chunks run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

NAME = "ebbtide"


def configs(module: nn.Module) -> list[Any]:
    """Every configuration that a part of the module reads its attention's name from."""
    found = {id(part.config): part.config for part in module.modules() if hasattr(vars(part).get("config"), "to_dict")}
    return list(found.values())


@contextmanager
def using_attention(module: nn.Module, name: str | None) -> Iterator[None]:
    """The attention by that name in every part of the module; None leaves them as they are.

    Only while this lasts: generation and everything else between steps runs with the model's own.
    """
    if name is None:
        yield
        return
    from strategies.streaming.attention import register

    register()
    before = [(config, config._attn_implementation) for config in configs(module)]
    for config, _ in before:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, attention in before:
            config._attn_implementation = attention
