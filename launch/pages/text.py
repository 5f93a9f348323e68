"""Numbers and names as text. What is not known is said as unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

UNKNOWN = "unknown"
_PREFIXES = {12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "µ", -9: "n"}


def known(value: Any, show: Callable[[Any], str] = str) -> str:
    return UNKNOWN if value is None else show(value)


def is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def figure(value: float) -> str:
    """Four digits; whole numbers from a thousand on."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.4g}"


def si(value: float, unit: str) -> str:
    """1.23 mJ, 45.6 TFLOP/s."""
    if not math.isfinite(value):
        return figure(value)
    exponent = 3 * math.floor(math.log10(abs(value)) / 3) if value else 0
    exponent = max(min(exponent, 12), -9)
    return f"{value / 10**exponent:.4g} {_PREFIXES[exponent]}{unit}"


def joules(value: float) -> str:
    return si(value, "J")


def watts(value: float) -> str:
    return f"{figure(value)} W"


def percent(value: float) -> str:
    return f"{figure(100 * value)} %"


def byte_unit(value: float) -> tuple[int, str]:
    return (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")


def byte_count(value: float) -> str:
    size, name = byte_unit(value)
    return f"{figure(round(value / size, 2))} {name}"
