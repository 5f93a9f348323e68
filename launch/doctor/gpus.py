"""NVIDIA's driver and devices as NVML knows them. What a device does not tell is null, with NVML's words for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from distrib.nvml import answers, ask

LINKS = 18
"""NVLinks that a device has at most."""
SLOWED = ("HwSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown", "SwThermalSlowdown")
"""Reasons for lower clocks that are a fault of the machine; a power cap and idling are not."""
NO_REASON = ("None", "All", "GpuIdle", "UserDefinedClocks")
"""Of those names in the binding; the last is another's old one."""
READ = 0
"""The binding's NVML_P2P_CAPS_INDEX_READ is a tuple."""
Facts = dict[str, Any]


def inventory() -> Facts:
    """`why`: the reason for which nothing is known, where nothing is."""
    try:
        import pynvml

        ask(pynvml.nvmlInit)
    except (ImportError, OSError) as error:
        return {"driver": None, "cuda": None, "devices": None, "peers": None, "why": str(error)}
    unknown: dict[str, str] = {}
    found: Facts = {
        "driver": _told(unknown, "driver", lambda: ask(pynvml.nvmlSystemGetDriverVersion)),
        "cuda": _told(unknown, "cuda", lambda: _dotted(ask(pynvml.nvmlSystemGetCudaDriverVersion_v2))),
    }
    count = _told(unknown, "devices", lambda: ask(pynvml.nvmlDeviceGetCount))
    if count is None:
        return found | {"devices": None, "peers": None, "why": unknown["devices"]}
    handles = [_handle(index) for index in range(count)]
    devices = [_device(index, handle) for index, handle in enumerate(handles)]
    return found | {"devices": devices, "peers": _peers(handles), "why": None, "unknown": unknown}


def _handle(index: int) -> Any:
    import pynvml

    try:
        return ask(pynvml.nvmlDeviceGetHandleByIndex, index)
    except OSError as error:
        return error


def _told(unknown: dict[str, str], name: str, question: Callable[[], Any]) -> Any:
    """The answer, or None and in `unknown` why: the driver's words, or those of a binding that is older than the
    question."""
    try:
        return question()
    except Exception as error:
        unknown[name] = str(error)
        return None


def _device(index: int, handle: Any) -> Facts:
    if isinstance(handle, OSError):
        return {"index": index, "why": str(handle)}
    unknown: dict[str, str] = {}
    told = {name: _told(unknown, name, question) for name, question in _questions(handle)}
    return {"index": index, "why": None, **told, "unknown": unknown}


def _questions(device: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    import pynvml as nvml

    def plain(name: str, *arguments: Any) -> Callable[[], Any]:
        return lambda: ask(getattr(nvml, name), device, *arguments)

    def memory(field: str) -> Callable[[], Any]:
        return lambda: getattr(ask(nvml.nvmlDeviceGetMemoryInfo, device), field)

    def switch(name: str) -> Callable[[], Any]:
        return lambda: bool(ask(getattr(nvml, name), device)[0])

    yield "name", plain("nvmlDeviceGetName")
    yield "memory_bytes", memory("total")
    yield "memory_used_bytes", memory("used")
    yield "capability", lambda: "{}.{}".format(*ask(nvml.nvmlDeviceGetCudaComputeCapability, device))
    for clock, kind in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
        yield f"{clock}_mhz", plain("nvmlDeviceGetClockInfo", kind)
        yield f"{clock}_mhz_most", plain("nvmlDeviceGetMaxClockInfo", kind)
    yield "throttled_by", lambda: _reasons(device)
    yield "ecc", switch("nvmlDeviceGetEccMode")
    kinds = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    yield "ecc_uncorrected", plain("nvmlDeviceGetTotalEccErrors", *kinds)
    yield "mig", switch("nvmlDeviceGetMigMode")
    yield "power_limit_watts", lambda: ask(nvml.nvmlDeviceGetEnforcedPowerLimit, device) / 1000
    yield "power_default_watts", lambda: ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit, device) / 1000
    yield "energy_counter", lambda: answers(nvml.nvmlDeviceGetTotalEnergyConsumption, device)
    for what in ("Generation", "Width"):
        yield f"pcie_{what.lower()}", plain(f"nvmlDeviceGetCurrPcieLink{what}")
        yield f"pcie_{what.lower()}_most", plain(f"nvmlDeviceGetMaxPcieLink{what}")
    yield "nvlinks", lambda: _nvlinks(device)


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _reasons(device: Any) -> list[str]:
    """Why the clocks are lower than they could be; drivers before 530 know the question by its old name."""
    import pynvml

    old, new = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, pynvml.nvmlDeviceGetCurrentClocksEventReasons
    bits = ask(old if answers(old, device) else new, device)
    prefix = "nvmlClocksEventReason"
    known = {name.removeprefix(prefix): bit for name, bit in vars(pynvml).items() if name.startswith(prefix)}
    return sorted(name for name, bit in known.items() if name not in NO_REASON and bits & bit)


def _nvlinks(device: Any) -> list[bool | None]:
    """Whether each link is up; None for one that is not told among others that are."""
    import pynvml

    states: list[bool | None] = []
    why: OSError | None = None
    for link in range(LINKS):
        try:
            states.append(bool(ask(pynvml.nvmlDeviceGetNvLinkState, device, link)))
        except OSError as error:
            states.append(None)
            why = error
    while states and states[-1] is None:
        states.pop()
    if not states and why:
        raise why
    return states


def _peers(handles: list[Any]) -> list[Facts]:
    """Which pairs of devices read each other's memory."""
    import pynvml

    prefix = "NVML_P2P_STATUS_"
    names = {value: name.removeprefix(prefix) for name, value in vars(pynvml).items() if name.startswith(prefix)}

    def access(one: Any, other: Any) -> str:
        for handle in (one, other):
            if isinstance(handle, OSError):
                raise handle
        status = ask(pynvml.nvmlDeviceGetP2PStatus, one, other, READ)
        return str(names.get(status, status)).lower().replace("_", " ")

    found = []
    for (a, one), (b, other) in combinations(enumerate(handles), 2):
        unknown: dict[str, str] = {}
        said = _told(unknown, "access", lambda one=one, other=other: access(one, other))  # type: ignore[misc]
        found.append({"devices": [a, b], "access": said, "why": unknown.get("access")})
    return found


def problems(found: Facts) -> list[str]:
    said: list[str] = []
    for device in found["devices"] or ():
        said += [f"GPU {device['index']}: {line}" for line in _problems(device)]
    blocked = [pair for pair in found["peers"] or [] if pair["access"] not in (None, "ok")]
    if blocked:
        (a, b), why = blocked[0]["devices"], blocked[0]["access"]
        many = f" and {len(blocked) - 1} more pairs" if len(blocked) > 1 else ""
        said.append(f"GPUs {a} and {b}{many} do not read each other's memory ({why}): see IOMMU and ACS, or the VM's")
    return said


def _problems(device: Facts) -> Iterator[str]:
    if device["why"]:
        yield f"it cannot be asked ({device['why']}); restart the driver, or leave it out of CUDA_VISIBLE_DEVICES"
        return
    links = device["nvlinks"] or []
    if down := [str(link) for link, up in enumerate(links) if up is False]:
        yield f"NVLink {', '.join(down)} of {len(links)} down: see nvidia-smi nvlink -s, and the fabric manager"
    if slowed := [reason for reason in device["throttled_by"] or [] if reason in SLOWED]:
        yield f"clocks are held down by {', '.join(slowed)}: see to its cooling and power"
    if device["mig"]:
        yield "MIG is on: a rank gets a share of it, without peer access or energy; nvidia-smi -mig 0 turns it off"
    if device["ecc_uncorrected"]:
        yield f"{device['ecc_uncorrected']} uncorrected memory errors since the driver was loaded: drain and reset it"
    width, most = device["pcie_width"], device["pcie_width_most"]
    if width and most and width < most:
        yield f"PCIe x{width} of x{most}: reseat it, or look at the slot"
    limit, default = device["power_limit_watts"], device["power_default_watts"]
    if limit and default and limit < default:
        yield f"power limit {limit:.0f} W of {default:.0f} W: nvidia-smi -pl {default:.0f} undoes it"
