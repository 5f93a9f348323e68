"""What this machine has: cores, memory, and versions against the ranges that the installed distribution asks for."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from distrib.redaction import one_line
from launch.machine import host

OPTIONAL = ("triton", "tensorboard")
"""Of the extras' packages, what a run makes use of where it is there."""
Facts = dict[str, Any]


def look() -> Facts:
    packages, why = _packages()
    known = host()
    return {
        "os": _system(),
        **{key: known[key] for key in ("cpu", "cores", "memory_bytes", "platform")},
        "python": platform.python_version(),
        "packages": packages,
        "packages_why": why,
        "torch": _torch(),
    }


def _system() -> str | None:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system() or None


def _packages() -> tuple[list[Facts], str | None]:
    """Name, what is installed, what is asked for, whether it is in that range."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in requires("ebbtide") or ()]
    except (ImportError, PackageNotFoundError) as error:
        return [], f"ranges are not known: {type(error).__name__}: {error}"
    found = []
    for one in asked:
        needed = one.marker is None or one.marker.evaluate({"extra": ""})
        if needed or one.name in OPTIONAL:
            has = _version(one.name)
            fits = has is not None and one.specifier.contains(has, prereleases=True)
            found.append(
                {"name": one.name, "installed": has, "asked": str(one.specifier), "needed": needed, "fits": fits}
            )
    return found, None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch() -> Facts:
    """What torch itself was built with and sees."""
    nothing: Facts = dict.fromkeys(("cuda", "nccl", "devices"))
    try:
        import torch

        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        ask: Any = torch.cuda.nccl.version
        nccl = ".".join(map(str, ask())) if torch.distributed.is_nccl_available() else None
    except Exception as error:
        return nothing | {"why": f"torch cannot be imported: {type(error).__name__}: {one_line(error, 200)}"}
    return {"cuda": torch.version.cuda, "nccl": nccl, "devices": devices, "why": None}


def problems(found: Facts, gpus: Facts) -> list[str]:
    torch = found["torch"]
    said = [torch["why"] + ": pip install torch"] if torch["why"] else []
    for one in found["packages"]:
        if one["installed"] is None and one["needed"]:
            said.append(f"{one['name']} is not installed: pip install '{one['name']}{one['asked']}'")
        elif one["installed"] and not one["fits"]:
            said.append(f"{one['name']} {one['installed']} is out of range: pip install '{one['name']}{one['asked']}'")
    there = len(gpus["devices"] or ())
    if there and torch["devices"] == 0:
        built = (
            "sees none of them: see CUDA_VISIBLE_DEVICES and the driver's version" if torch["cuda"] else "is for CPUs"
        )
        said.append(f"{there} GPUs, but torch {built}")
    elif there and torch["devices"] is not None and torch["devices"] < there:
        said.append(f"torch sees {torch['devices']} of {there} GPUs: see CUDA_VISIBLE_DEVICES")
    return said
