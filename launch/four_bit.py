"""A frozen base in 4 bits: which layers of a model are, and how a folder of bitsandbytes says what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrib.errors import Refused, UserError
from distrib.redaction import one_line
from distrib.units import blocks
from strategies.core.edits import base_name
from strategies.lowbit.frozen import BLOCK, SCALES_BLOCK, Linear4bit, Packed, code_table, joined

if TYPE_CHECKING:
    from launch.recipe import Recipe

SETTINGS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
STATE = "quant_state.bitsandbytes__"


def check_stored(recipe: Recipe, stored: dict[str, Any]) -> None:
    """Refuse a folder of quantized weights unless the recipe asks for just those."""
    said = f"model_name_or_path={recipe.model_name_or_path!r} holds"
    if not stored.get("load_in_4bit"):
        raise Refused(
            f"{said} quantized weights that are not 4-bit ones of bitsandbytes: training starts from the original "
            "ones; name the model that it was made from"
        )
    if not recipe.load_in_4bit:
        raise Refused(
            f"{said} 4-bit weights, which are trained with an adapter only: set load_in_4bit=true and lora_r, or name "
            "the model that it was made from"
        )
    for key in SETTINGS:
        if getattr(recipe, key) != (value := stored.get(key, getattr(recipe, key))):
            given = json.dumps(getattr(recipe, key)).strip('"')
            raise UserError(f"{said} weights with {key}={json.dumps(value)}, not {given}: set it to that")


def stored_in(config: Any) -> dict[str, Any] | None:
    return getattr(config, "quantization_config", None)


def hold_base(recipe: Recipe, config: Any, model: nn.Module) -> None:
    """In the place of every frozen `nn.Linear` inside the layers an empty one for 4 bits."""
    kept = (stored_in(config) or {}).get("llm_int8_skip_modules") or ()
    found = [
        (f"{prefix}.{name}", module)
        for prefix, block in blocks(model)
        for name, module in block.named_modules()
        if type(module) is nn.Linear and not any(p.requires_grad for p in module.parameters())
    ]
    found = [(name, module) for name, module in found if not _is_kept(base_name(name), kept)]
    if not found:
        raise Refused(f"load_in_4bit=true: {type(config).__name__} has no nn.Linear in its layers; set it to false")
    for name, module in found:
        model.set_submodule(name, Linear4bit(module, recipe.bnb_4bit_quant_type, recipe.bnb_4bit_use_double_quant))


def _is_kept(name: str, patterns: Iterable[str]) -> bool:
    """As Transformers reads them: from the start up to a dot, or the end of the name."""
    return any(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(pattern) for pattern in patterns)


class Stored:
    """The 4-bit matrices of a folder, by their weights' names. `read` gives a tensor of it."""

    def __init__(self, names: Container[str], read: Callable[[str], Tensor], source: str) -> None:
        self._names = names
        self._read = read
        self._source = source

    def __contains__(self, name: str) -> bool:
        return f"{name}.absmax" in self._names

    def layer(self, name: str) -> Linear4bit:
        """As it is there, codes and scales untouched."""
        kind = next((kind for kind in ("nf4", "fp4") if f"{name}.{STATE}{kind}" in self._names), None)
        if kind is None:
            raise UserError(f"{self._source}: {name} has neither {STATE}nf4 nor {STATE}fp4 beside it")
        try:
            state = json.loads(bytes(self._read(f"{name}.{STATE}{kind}").tolist()))
            sizes = state["blocksize"], state.get("nested_blocksize", SCALES_BLOCK)
            rows, columns = state["shape"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._source}: {name}.{STATE}{kind} cannot be read: {one_line(error, 100)}") from None
        double = "nested_blocksize" in state
        table = self._read(f"{name}.quant_map")
        if sizes != (BLOCK, SCALES_BLOCK) or not torch.equal(table, code_table(kind, table.device)):
            raise Refused(
                f"{self._source}: {name} is in blocks of {sizes[0]} and {sizes[1]} or has a table of its own; only "
                f"blocks of {BLOCK} and {SCALES_BLOCK} with the usual table are read"
            )
        held = Linear4bit(nn.Linear(columns, rows, bias=False, device="meta"), kind, double)
        # Some keep the bytes as numbers of another type, for an engine that wants one type for all.
        codes = self._read(name).view(torch.uint8).reshape(-1, 1)
        held.hold(Packed(codes, self._scales(name, state) if double else self._bytes(f"{name}.absmax")))
        return held

    def _bytes(self, name: str) -> Tensor:
        return self._read(name).float().view(torch.uint8)

    def _scales(self, name: str, state: dict[str, Any]) -> Tensor:
        mean = torch.tensor(state["nested_offset"], dtype=torch.float32)
        table, scales = self._read(f"{name}.nested_quant_map"), self._read(f"{name}.nested_absmax")
        return joined(mean, table, scales, self._read(f"{name}.absmax"))
