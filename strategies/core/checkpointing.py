"""Layers that recompute by themselves, whoever switches checkpointing on around them."""

from __future__ import annotations


class RecomputesItself:
    """Mixed into a layer: Transformers' own checkpointing finds itself switched off."""

    @property
    def gradient_checkpointing(self) -> bool:
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        vars(self)["gradient_checkpointing"] = value
