"""NVML's answers: whatever it says instead of one is an OSError with its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def ask(function: Callable[..., Any], *arguments: Any) -> Any:
    import pynvml

    try:
        return function(*arguments)
    except (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError) as error:
        raise OSError(f"NVML says: {error}") from None


def answers(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        ask(function, *arguments)
    except OSError:
        return False
    return True
