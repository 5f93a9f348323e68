"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distrib.topology import Topology

PACKAGES = ("ebbtide", "torch", "transformers", "peft", "deepspeed")


def host() -> dict[str, Any]:
    """What is known without a process on the device; what cannot be known is None."""
    return {
        "cpu": _from("/proc/cpuinfo", "model name") or platform.processor() or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def device(topology: Topology) -> dict[str, Any]:
    """The accelerator of this process, which must be on it already: a look takes some of its memory."""
    if topology.device_type == "cpu":
        return {"device": "cpu", "devices": 0, "device_memory_bytes": None}
    import torch

    properties = torch.cuda.get_device_properties(topology.device)
    return {
        "device": properties.name,
        "devices": torch.cuda.device_count(),
        "device_memory_bytes": properties.total_memory,
    }


def _memory_bytes() -> int | None:
    total = _from("/proc/meminfo", "MemTotal")
    return int(total.split()[0]) * 1024 if total else None


def _from(path: str, key: str) -> str | None:
    if not Path(path).exists():
        return None
    lines = Path(path).read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
