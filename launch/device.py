"""The device that is planned for: as the command line's `device.` words describe it, else the one of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distrib.errors import UserError, choose
from distrib.meters import free_bytes
from launch.recipe_file import pairs

WORDS = {
    "memory": "device.memory=80GiB",
    "count": "device.count=8",
    "flops": "device.flops=400T",
    "type": "device.type=cuda",
    "link": "device.link=25GB",
    "latency": "device.latency=5us",
    "node_link": "device.node_link=50GB",
    "node_latency": "device.node_latency=15us",
    "power": "device.power=700W",
}
TYPES = ("cuda", "cpu")
SIZES = {"": 1, **{f"{x}B": 10 ** (3 * n) for n, x in enumerate(["", "K", "M", "G", "T"])}}
SIZES |= {f"{x}iB": 2 ** (10 * n) for n, x in enumerate("KMGT", start=1)}
RATES = {x: 10 ** (3 * n) for n, x in enumerate(["", "K", "M", "G", "T", "P"])}
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
POWERS = {"W": 1, "kW": 1000}
RESERVED_SHARE = {"cuda": 0.05, "cpu": 0.0}
RESERVED_BYTES = {"cuda": 2**30, "cpu": 2**29}
"""What a plan leaves free: an allocator's unused pieces; the driver's context and its libraries, or the interpreter."""


@dataclass(frozen=True)
class Device:
    """`count` of them train together. `here`: it is this machine's, so that it can be timed."""

    type: str
    memory_bytes: int
    count: int
    flops: float | None
    """What products reach on it."""
    here: bool
    link: float | None = None
    """Bytes a second from one device to the next."""
    latency: float | None = None
    """Seconds that a message takes to it beside."""
    node_link: float | None = None
    """Bytes a second that a node sends to others."""
    node_latency: float | None = None
    power: float | None = None
    """Watts of one device while it trains."""

    def as_dict(self) -> dict[str, Any]:
        """For a plan's reader."""
        names = ("type", "memory_bytes", "usable_bytes", "count")
        return {name: getattr(self, name) for name in names}

    @property
    def usable_bytes(self) -> int:
        return max(0, int(self.memory_bytes * (1 - RESERVED_SHARE[self.type])) - RESERVED_BYTES[self.type])


def split_words(overrides: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The device's words by their keys, and the overrides that are the recipe's."""
    given: dict[str, str] = {}
    rest = []
    for keys, text in pairs(overrides):
        if keys[0] != "device":
            rest.append(f"{'.'.join(keys)}={text}")
        elif len(keys) != 2 or keys[1] not in WORDS:
            raise choose("device's key", ".".join(keys[1:]), WORDS)
        else:
            given[keys[1]] = text
    return given, rest


def device_of(given: Mapping[str, str], ranks: int) -> Device:
    """`ranks` are as many devices where none are given; they share a host's memory, not a GPU's."""
    count = _count(given["count"]) if "count" in given else ranks
    flops = _number("device.flops", given["flops"], RATES, WORDS["flops"]) if "flops" in given else None
    if "type" in given and given["type"] not in TYPES:
        raise choose("device.type", given["type"], TYPES)
    units = {"link": SIZES, "latency": TIMES, "node_link": SIZES, "node_latency": TIMES, "power": POWERS}
    others: dict[str, Any] = {
        key: _number(f"device.{key}", given[key], known, WORDS[key]) for key, known in units.items() if key in given
    }
    if "memory" in given:
        kind = given.get("type", "cuda")
        return Device(kind, size_bytes("device.memory", given["memory"]), count, flops, False, **others)
    return replace(_of_this_machine(given.get("type"), count, flops), **others)


def _of_this_machine(kind: str | None, count: int, flops: float | None) -> Device:
    import torch

    has_gpu = torch.cuda.is_available()
    if kind == "cuda" and not has_gpu:
        raise UserError("device.type=cuda without a GPU here: give its memory too, as device.memory=80GiB")
    if has_gpu and kind != "cpu":
        return Device("cuda", torch.cuda.get_device_properties(0).total_memory, count, flops, here=True)
    return Device("cpu", _free_bytes() // count, count, flops, here=not has_gpu)


def _free_bytes() -> int:
    free = free_bytes()
    if free is None:
        raise UserError("this machine's free memory is not known: give device.memory=16GiB device.type=cpu")
    return free


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UserError(f"device.count={text!r}: a number of devices, as device.count=8")
    return int(text)


def size_bytes(name: str, text: str) -> int:
    """An amount of memory, as 47.5GiB."""
    return int(_number(name, text, SIZES, "47.5GiB"))


def _number(name: str, text: str, units: Mapping[str, float], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in units or float(match[1]) == 0:
        known = ", ".join(unit for unit in units if unit)
        raise UserError(f"{name}={text!r}: a number above 0 with one of {known}, as {example}")
    return float(match[1]) * units[match[2]]
