"""NVIDIA's devices through NVML: which one this rank computes on, and its counter or else its power.

NVML counts the devices of the machine, CUDA those that CUDA_VISIBLE_DEVICES leaves, in an order of its own. So a device
is always looked up by its UUID.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distrib.energy.clock import Clock
from distrib.energy.source import Counter, Power, Source
from distrib.nvml import answers, ask
from distrib.topology import Topology

# Where the driver does not tell a device's limit.
CEILING_WATTS = 2000.0


class Unknown(Exception):
    """Which device a rank computes on cannot be told, and why."""


@dataclass(frozen=True)
class Device:
    uuid: str
    model: str


def open_device(topology: Topology, clock: Clock, env: Mapping[str, str]) -> tuple[list[Source], list[str]]:
    """The sources of this rank's device, and what is to be said about them."""
    import pynvml

    nameless = Source("gpu", f"cuda:{topology.local_rank}", clock, CEILING_WATTS)
    try:
        ask(pynvml.nvmlInit)
        uuid = _uuid(topology, env)
    except (OSError, Unknown) as why:
        return [nameless], [f"the energy of {nameless.name} is unknown: {why}"]
    try:
        handle = _handle(uuid)
    except OSError as why:
        return [Source("gpu", uuid, clock, CEILING_WATTS)], [f"the energy of {uuid} is unknown: {why}"]
    gpu, notes = _gpu(uuid, handle, clock)
    return [gpu, *_module(uuid, handle, clock)], notes


def _uuid(topology: Topology, env: Mapping[str, str]) -> str:
    """UUID of the device that this rank computes on. CUDA itself knows best."""
    import torch

    if torch.cuda.is_available():
        return f"GPU-{torch.cuda.get_device_properties(topology.device).uuid}"
    seen = visible(env, _devices())
    if topology.local_rank >= len(seen):
        given = env.get("CUDA_VISIBLE_DEVICES")
        shown = "" if given is None else f" with CUDA_VISIBLE_DEVICES={given!r}"
        raise Unknown(
            f"CUDA sees {len(seen)} devices{shown}, and rank {topology.rank} wants number {topology.local_rank}"
        )
    return seen[topology.local_rank]


def visible(env: Mapping[str, str], devices: list[Device]) -> list[str]:
    """UUIDs of the devices that CUDA shows, in its order, of the machine's devices in NVML's.

    CUDA_VISIBLE_DEVICES is read as CUDA does: up to the first entry that means no device, and nothing at all when one
    comes twice. A MIG instance is shown by its own name.
    """
    given = env.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        found = [device.uuid for device in devices]
    elif given.startswith("MIG-"):
        return [given.split(",")[0]]
    else:
        found = _listed(given, devices)
    by_number = given is None or not given.startswith("GPU-")
    if by_number and env.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID" and len({device.model for device in devices}) > 1:
        raise Unknown("CUDA numbers devices of several models by their speed; set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return found


def _listed(given: str, devices: list[Device]) -> list[str]:
    found: list[str] = []
    by_name = given.startswith("GPU-")
    for entry in given.split(","):
        if by_name:
            meant = [device.uuid for device in devices if entry.startswith("GPU-") and device.uuid.startswith(entry)]
        else:
            number = re.match(r"\s*\+?(\d+)", entry)
            meant = [device.uuid for device in devices[int(number[1]) :][:1]] if number else []
        if len(meant) != 1:
            break
        if meant[0] in found:
            return []
        found += meant
    return found


def _devices() -> list[Device]:
    """In NVML's order. One that cannot be asked keeps its place."""
    import pynvml

    def device(index: int) -> Device:
        try:
            handle = ask(pynvml.nvmlDeviceGetHandleByIndex, index)
            return Device(ask(pynvml.nvmlDeviceGetUUID, handle), ask(pynvml.nvmlDeviceGetName, handle))
        except OSError:
            return Device(f"number {index}", "")

    return [device(index) for index in range(ask(pynvml.nvmlDeviceGetCount))]


def _handle(uuid: str) -> Any:
    """NVML's handle of a whole device; the share of one, which MIG makes, has no energy of its own."""
    import pynvml

    shared = OSError("it is a MIG instance, and NVML counts the energy of whole devices only")
    if uuid.startswith("MIG-"):
        raise shared
    try:
        handle = ask(pynvml.nvmlDeviceGetHandleByUUID, uuid)
    except OSError:
        if answers(pynvml.nvmlDeviceGetHandleByUUID, uuid.replace("GPU-", "MIG-", 1)):
            raise shared from None
        raise
    if answers(pynvml.nvmlDeviceGetMigMode, handle) and ask(pynvml.nvmlDeviceGetMigMode, handle)[0]:
        raise shared
    return handle


def _gpu(uuid: str, handle: Any, clock: Clock) -> tuple[Source, list[str]]:
    """By its counter, else by its power, else not at all."""
    import pynvml

    limit = pynvml.nvmlDeviceGetEnforcedPowerLimit
    ceiling_watts = ask(limit, handle) / 1000 if answers(limit, handle) else CEILING_WATTS

    def joules() -> float:
        return float(ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) / 1000)

    def watts() -> float:
        return float(ask(pynvml.nvmlDeviceGetPowerUsage, handle) / 1000)

    counter = Counter("gpu", uuid, clock, ceiling_watts, joules)
    if counter.observe():
        return counter, []
    why = f"no energy counter of {uuid} ({counter.error or 'it stands still'})"
    power = Power("gpu", uuid, clock, ceiling_watts, watts)
    if power.error is None:
        return power, [f"{why}: its power is sampled"]
    return Source("gpu", uuid, clock, ceiling_watts), [f"{why} and no power ({power.error}): its energy is unknown"]


def _module(uuid: str, handle: Any, clock: Clock) -> list[Source]:
    """A device and the CPU that shares its board, where they are one module: power that holds both."""
    import pynvml

    field = (pynvml.NVML_FI_DEV_POWER_INSTANT, pynvml.NVML_POWER_SCOPE_MODULE)

    def watts() -> float:
        (value,) = ask(pynvml.nvmlDeviceGetFieldValues, handle, [field])
        if value.nvmlReturn:
            raise OSError(str(pynvml.NVMLError(value.nvmlReturn)))
        return float(value.value.uiVal / 1000)

    module = Power("module", f"{uuid}/module", clock, CEILING_WATTS, watts)
    return [module] if module.error is None else []
