"""Numbers and names as text. What is not known is said as unknown; secrets are left out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

UNKNOWN = "unknown"
HIDDEN = "(hidden)"
_SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
# Numbers of a model's configuration that share a word with secrets: num_key_value_heads, pad_token_id.
_SHAPE = re.compile(r"(_heads|_dim|_size|_ids?)$")
_ASSIGNED = re.compile(r"([\w.-]+)(\s*=\s*)('[^']*'|\"[^\"]*\"|\S+)|(--[\w.-]+)(\s+)(\S+)")
_PREFIXES = {12: "T", 9: "G", 6: "M", 3: "k", 0: "", -3: "m", -6: "µ", -9: "n"}


def clean(value: Any) -> Any:
    """`value` without the values of keys that look like secrets, in mappings and in texts such as `hub_token=abc`."""
    if isinstance(value, Mapping):
        return {key: HIDDEN if _is_secret(str(key), item) else clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else clean_texts(value)


def clean_texts(value: Any) -> Any:
    """As `clean`, for our own figures, whose keys (`tokens_per_s`) are no secrets."""
    if isinstance(value, Mapping):
        return {key: clean_texts(item) for key, item in value.items()}
    if isinstance(value, str):
        return _ASSIGNED.sub(_hide, value)
    return [clean_texts(item) for item in value] if isinstance(value, list) else value


def _is_secret(key: str, value: Any) -> bool:
    is_shape = _SHAPE.search(key) and re.fullmatch(r"\d+", str(value))
    return value is not None and bool(_SECRET.search(key)) and not is_shape


def _hide(found: re.Match[str]) -> str:
    key, between, value = found.group(1, 2, 3) if found.group(1) else found.group(4, 5, 6)
    return key + between + (HIDDEN if _is_secret(key, value) else value)


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


def one_line(text: str) -> str:
    """Without line breaks and control characters, which could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
