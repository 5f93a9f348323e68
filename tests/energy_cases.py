"""A compiled stand-in for NVML below the real binding, a clock that only moves when told, and what is true."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from distrib.energy import Account, Meter
from distrib.energy.clock import Clock
from distrib.topology import Topology

SOURCE = Path(__file__).parent / "distrib" / "nvml_standin.c"
SONAME = "libnvidia-ml.so.1"
NO_PERMISSION, NOT_SUPPORTED, DRIVER_NOT_LOADED, GPU_IS_LOST = 4, 3, 9, 15
NEVER = -1.0
START = 1000.0
RANGE_J = 262143.328850  # of RAPL, before it wraps


class Device(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_char * 96) for name in ("uuid", "name")],
        *[(name, ctypes.c_double) for name in ("low_watts", "high_watts", "wave_s", "duty", "period_s")],
        *[(name, ctypes.c_double) for name in ("resets_at", "lost_at", "found_at", "mean_s")],
        *[(name, ctypes.c_double) for name in ("limit_watts", "module_watts")],
        *[(name, ctypes.c_int) for name in ("energy_error", "power_error", "handle_error", "mig")],
        *[(name, ctypes.c_ulonglong) for name in ("memory_bytes", "memory_used_bytes", "reasons", "ecc_errors")],
        *[("major", ctypes.c_uint), ("minor", ctypes.c_uint)],
        *[("mhz", ctypes.c_uint * 4), ("mhz_most", ctypes.c_uint * 4), ("default_watts", ctypes.c_uint)],
        *[("pcie", ctypes.c_uint * 2), ("pcie_most", ctypes.c_uint * 2)],
        *[(name, ctypes.c_uint) for name in ("links", "links_down", "no_peers")],
        ("ecc", ctypes.c_int),
    ]


def compiled(folder: Path) -> Path | None:
    """The stand-in, built with the system's compiler; None without one."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / SONAME
    options = ["-shared", "-fPIC", "-O1", f"-Wl,-soname,{SONAME}"]
    subprocess.run([compiler, *options, "-o", library, SOURCE, "-lm"], check=True, capture_output=True)
    return library


class Standin:
    """The scripted library and the clock that it shares with the meter."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.devices = (Device * 8).in_dll(library, "devices")
        self._count = ctypes.c_uint.in_dll(library, "device_count")
        self._count.value = 0
        self.now = ctypes.c_double.in_dll(library, "now")
        self.now.value = START
        self.latency_s = ctypes.c_double.in_dll(library, "latency_s")
        self.latency_s.value = 0.0
        self.init_error = ctypes.c_int.in_dll(library, "init_error")
        self.init_error.value = 0
        self.fail("", 0)
        ctypes.memset(self.devices, 0, ctypes.sizeof(self.devices))
        self.clock = VirtualClock(self.now)

    def fail(self, query: str, code: int) -> None:
        """This query of the library, on every device from now on."""
        (ctypes.c_char * 64).in_dll(self._library, "failing").value = query.encode()
        ctypes.c_int.in_dll(self._library, "failing_code").value = code

    def add(self, uuid: str = "GPU-a", listed: bool = True, **script: Any) -> Device:
        """One more device; one that is not listed is found by its UUID only."""
        known = {"name": b"H100", "high_watts": 300.0, "period_s": 0.1, "limit_watts": 700.0}
        never = dict.fromkeys(("resets_at", "lost_at", "found_at"), NEVER)
        index = self._count.value if listed else 7
        self._count.value += listed
        device = self.devices[index]
        for field, value in {"uuid": uuid.encode(), **known, **never, **script}.items():
            setattr(device, field, value)
        return device

    def meter(self, powercap: Path = Path("/nowhere"), device_type: str = "cuda", **env: str) -> Any:
        return closing(Meter(Topology(device_type=device_type), powercap, self.clock, env))

    def window(self, meter: Meter, seconds: float) -> tuple[Account, float, float]:
        """The account of so long, and the times at which it began and ended."""
        before = meter.read()
        self.clock.sleep(seconds)
        after = meter.read()
        return meter.between(before, after), before.time, after.time


class VirtualClock(Clock):
    """Moves when somebody sleeps, and calls what is due on the way; `moved` is told."""

    def __init__(self, held: ctypes.c_double) -> None:
        self._held = held
        self._due: list[tuple[float, float, Callable[[], None]]] = []
        self._uneven = random.Random(0)
        self.moved: Callable[[], None] = lambda: None

    def now(self) -> float:
        return self._held.value

    def sleep(self, seconds: float) -> None:
        end = self.now() + seconds
        while self._due and (first := min(self._due, key=lambda due: due[0]))[0] <= end:
            at, interval, call = first
            self.move_to(at)
            self._due[self._due.index(first)] = (at + interval * self._uneven.uniform(0.5, 1.5), interval, call)
            call()
        self.move_to(end)

    def move_to(self, at: float) -> None:
        self._held.value = max(self.now(), at)
        self.moved()

    def every(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        self._due.append((self.now() + seconds, seconds, call))
        return lambda: None


class Tree:
    """Zones with a name and a power; the files hold what their counters show at the clock's time."""

    def __init__(self, root: Path, range_joules: float = RANGE_J, offset_joules: float = 0.0) -> None:
        self.root = root
        self.clock = VirtualClock(ctypes.c_double(START))
        self.clock.moved = self.show
        self.watts: dict[str, float] = {}
        self._joules: dict[str, float] = {}
        self._range = range_joules
        self._offset = offset_joules
        self._shown = START
        (root / "intel-rapl").mkdir(parents=True)

    def add(self, zone: str, name: str, watts: float) -> None:
        folder = self.root / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{self._range * 1e6:.0f}\n")
        self.watts[zone] = watts
        self._joules[zone] = self._offset
        self.show()

    def show(self) -> None:
        seconds, self._shown = self.clock.now() - self._shown, self.clock.now()
        for zone, watts in self.watts.items():
            self._joules[zone] = (self._joules[zone] + watts * seconds) % self._range
            if not (self.root / zone / "energy_uj").is_dir():
                (self.root / zone / "energy_uj").write_text(f"{self._joules[zone] * 1e6:.0f}\n")

    def window(self, meter: Meter, seconds: float) -> Account:
        before = meter.read()
        self.clock.sleep(seconds)
        return meter.between(before, meter.read())

    def meter(self) -> Any:
        return closing(Meter(Topology(), self.root, self.clock))


@contextmanager
def standin(library: Path) -> Iterator[Standin]:
    """The real binding with the stand-in as its library, and no CUDA."""
    import pynvml

    loaded = ctypes.CDLL(str(library))
    with (
        patch.object(pynvml, "nvmlLib", loaded),
        patch.object(pynvml, "_nvmlGetFunctionPointer_cache", {}),
        patch("torch.cuda.is_available", lambda: False),
    ):
        yield Standin(loaded)


def truth(device: Device, start: float, end: float) -> float:
    """Joules between two moments, added up from switch to switch."""
    if not device.wave_s:
        return float(device.high_watts * (end - start))
    total, here = 0.0, start
    while here < end:
        wave = int(here / device.wave_s + 1e-9)
        high = here - wave * device.wave_s < device.duty * device.wave_s - 1e-9
        switch = (wave + (device.duty if high else 1)) * device.wave_s
        total += (min(switch, end) - here) * (device.high_watts if high else device.low_watts)
        here = switch
    return total


def shared_window(topology: Topology, library: str, scripts: list[dict[str, Any]], chosen: str) -> dict[str, Any]:
    """On a rank: an account of 30 s by all ranks, of the device that CUDA_VISIBLE_DEVICES shows this one."""
    shown = Topology(topology.rank, topology.world, 0, 1, "cuda")
    with standin(Path(library)) as nvml:
        for script in scripts:
            nvml.add(**script)
        env = {"CUDA_VISIBLE_DEVICES": chosen.split()[topology.rank]}
        with closing(Meter(shown, Path("/nowhere"), nvml.clock, env)) as meter:
            before = meter.read()
            nvml.clock.sleep(30.0)
            return meter.between(before, meter.read(), tokens=100, steps=10).as_dict()
