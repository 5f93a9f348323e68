"""What a router's auxiliary loss means for a run in chunks."""

from __future__ import annotations

from typing import Any

from distrib.errors import Refused


def refuse_router_loss(name: str, config: Any) -> None:
    """It is a function of all the tokens of a batch, and chunks see only theirs."""
    if getattr(config, "output_router_logits", False):
        raise Refused(
            f"output_router_logits=true with strategy {name}: the router's loss is no sum over chunks; set it to false"
        )
