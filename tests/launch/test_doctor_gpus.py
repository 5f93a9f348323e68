"""GPUs in the doctor's report: the real NVML binding over a scripted library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from energy_cases import DRIVER_NOT_LOADED, GPU_IS_LOST, NO_PERMISSION, NOT_SUPPORTED, Standin, compiled, standin

from launch.doctor import gpus, show

GIB = 2**30
HEALTHY: dict[str, Any] = {
    "memory_bytes": 80 * GIB,
    "memory_used_bytes": GIB,
    "major": 9,
    "mhz": (0, 1755, 2619, 0),
    "mhz_most": (0, 1980, 2619, 0),
    "default_watts": 700,
    "pcie": (5, 16),
    "pcie_most": (5, 16),
    "links": 18,
    "ecc": 1,
}
ANSWERED_BY = {
    "nvmlDeviceGetName": {"name"},
    "nvmlDeviceGetMemoryInfo": {"memory_bytes", "memory_used_bytes"},
    "nvmlDeviceGetCudaComputeCapability": {"capability"},
    "nvmlDeviceGetClockInfo": {"sm_mhz", "memory_mhz"},
    "nvmlDeviceGetMaxClockInfo": {"sm_mhz_most", "memory_mhz_most"},
    "nvmlDeviceGetCurrentClocksEventReasons": {"throttled_by"},
    "nvmlDeviceGetEccMode": {"ecc"},
    "nvmlDeviceGetTotalEccErrors": {"ecc_uncorrected"},
    "nvmlDeviceGetMigMode": {"mig"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_watts"},
    "nvmlDeviceGetPowerManagementDefaultLimit": {"power_default_watts"},
    "nvmlDeviceGetCurrPcieLinkGeneration": {"pcie_generation"},
    "nvmlDeviceGetCurrPcieLinkWidth": {"pcie_width"},
    "nvmlDeviceGetMaxPcieLinkGeneration": {"pcie_generation_most"},
    "nvmlDeviceGetMaxPcieLinkWidth": {"pcie_width_most"},
    "nvmlDeviceGetNvLinkState": {"nvlinks"},
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = compiled(tmp_path_factory.mktemp("nvml"))
    if found is None:
        pytest.skip("no C compiler here to build the stand-in with")
    return found


@pytest.fixture
def nvml(library: Path) -> Iterator[Standin]:
    with standin(library) as made:
        yield made


def shown(found: dict[str, Any]) -> str:
    machine = {"why": "not looked at"}
    nodes = [{"host": "a", "ranks": [0], "machine": machine, "gpus": found, "disk": machine}]
    return "\n".join(show.section("nodes", nodes))


def test_two_healthy_devices_are_told_in_full(nvml: Standin) -> None:
    for uuid in ("GPU-a", "GPU-b"):
        nvml.add(uuid, **HEALTHY)
    found = gpus.inventory()
    assert (found["driver"], found["cuda"], found["why"], found["unknown"]) == ("580.65.06", "13.1", None, {})
    assert found["devices"][1] == {
        "index": 1,
        "why": None,
        "name": "H100",
        "memory_bytes": 80 * GIB,
        "memory_used_bytes": GIB,
        "capability": "9.0",
        "sm_mhz": 1755,
        "sm_mhz_most": 1980,
        "memory_mhz": 2619,
        "memory_mhz_most": 2619,
        "throttled_by": [],
        "ecc": True,
        "ecc_uncorrected": 0,
        "mig": False,
        "power_limit_watts": 700.0,
        "power_default_watts": 700.0,
        "energy_counter": True,
        "pcie_generation": 5,
        "pcie_generation_most": 5,
        "pcie_width": 16,
        "pcie_width_most": 16,
        "nvlinks": [True] * 18,
        "unknown": {},
    }
    assert found["peers"] == [{"devices": [0, 1], "access": "ok", "why": None}]
    assert gpus.problems(found) == []
    assert "unknown" not in shown(found).split("gpus")[1].split("disk")[0]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ({"links_down": 0b101}, "NVLink 0, 2 of 18 down"),
        ({"reasons": 0x40 | 0x04}, "clocks are held down by HwThermalSlowdown:"),
        ({"mig": 1}, "MIG is on"),
        ({"ecc_errors": 3}, "3 uncorrected memory errors"),
        ({"pcie": (5, 8)}, "PCIe x8 of x16"),
        ({"limit_watts": 500.0}, "power limit 500 W of 700 W"),
        ({"handle_error": GPU_IS_LOST}, "it cannot be asked (NVML says: GPU is lost)"),
        ({"no_peers": 0b01}, "GPUs 0 and 1 do not read each other's memory (disabled by regkey)"),
        ({"reasons": 0x01 | 0x04}, None),  # idle, and a power cap as it should be
        ({"pcie": (1, 16)}, None),  # an idle link is slow
        ({"energy_error": NO_PERMISSION}, None),
    ],
)
def test_what_is_wrong_with_a_device_is_said_of_that_one(
    nvml: Standin, script: dict[str, Any], said: str | None
) -> None:
    nvml.add("GPU-a", **HEALTHY)
    nvml.add("GPU-b", **{**HEALTHY, **script})
    if "no_peers" in script:
        nvml.devices[0].no_peers = 0b10
    lines = gpus.problems(gpus.inventory())
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert said in line
        assert line.startswith("GPU 1: " if "GPUs" not in said else said)


def test_clocks_that_are_held_down_are_shown_with_their_reasons(nvml: Standin) -> None:
    nvml.add("GPU-a", **{**HEALTHY, "reasons": 0x02 | 0x08, "mhz": (0, 345, 405, 0)})
    found = gpus.inventory()
    assert found["devices"][0]["throttled_by"] == ["ApplicationsClocksSetting", "HwSlowdown"]
    assert "SM 345 of 1980 MHz, memory 405 of 2619 MHz, held down by ApplicationsClocksSetting, HwSlowdown" in shown(
        found
    )


@pytest.mark.parametrize("query", ANSWERED_BY)
def test_a_query_that_fails_is_null_with_its_reason_and_the_rest_is_known(nvml: Standin, query: str) -> None:
    nvml.add("GPU-a", **HEALTHY)
    (whole,) = gpus.inventory()["devices"]
    nvml.fail(query, NOT_SUPPORTED)
    found = gpus.inventory()
    (device,) = found["devices"]
    unknown = ANSWERED_BY[query]
    assert device["unknown"] == dict.fromkeys(unknown, "NVML says: Not Supported")
    assert {key: device[key] for key in unknown} == dict.fromkeys(unknown)
    assert {key: device[key] for key in whole if key not in {*unknown, "unknown"}} == {
        key: whole[key] for key in whole if key not in {*unknown, "unknown"}
    }
    assert gpus.problems(found) == []
    assert "(NVML says: Not Supported)" in shown(found)


@pytest.mark.parametrize(
    ("query", "key"),
    [("nvmlSystemGetDriverVersion", "driver"), ("nvmlSystemGetCudaDriverVersion_v2", "cuda")],
)
def test_a_driver_that_does_not_tell_its_version(nvml: Standin, query: str, key: str) -> None:
    nvml.fail(query, NO_PERMISSION)
    found = gpus.inventory()
    assert found[key] is None
    assert found["unknown"] == {key: "NVML says: Insufficient Permissions"}


def test_devices_that_cannot_be_counted_are_unknown_and_not_none(nvml: Standin) -> None:
    nvml.fail("nvmlDeviceGetCount_v2", NO_PERMISSION)
    found = gpus.inventory()
    assert found["devices"] is None
    assert "none that can be used: NVML says: Insufficient Permissions" in shown(found)


def test_peers_that_are_not_told(nvml: Standin) -> None:
    for uuid in ("GPU-a", "GPU-b"):
        nvml.add(uuid, **HEALTHY)
    nvml.fail("nvmlDeviceGetP2PStatus", NOT_SUPPORTED)
    found = gpus.inventory()
    assert found["peers"] == [{"devices": [0, 1], "access": None, "why": "NVML says: Not Supported"}]
    assert gpus.problems(found) == []


def test_a_counter_that_may_not_be_read_is_no_counter(nvml: Standin) -> None:
    nvml.add("GPU-a", **{**HEALTHY, "energy_error": NOT_SUPPORTED})
    assert gpus.inventory()["devices"][0]["energy_counter"] is False


def test_without_a_driver_nothing_is_known_and_why(nvml: Standin) -> None:
    nvml.init_error.value = DRIVER_NOT_LOADED
    found = gpus.inventory()
    assert found["why"] == "NVML says: Driver Not Loaded"
    assert found["devices"] is None
    assert gpus.problems(found) == []
    assert "none that can be used: NVML says: Driver Not Loaded" in shown(found)


def test_without_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    found = gpus.inventory()
    assert "pynvml" in found["why"]
