"""Energy of GPUs: the real NVML binding over a scripted library. What is said must hold what is true."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
from energy import against_power, compare, overhead, real, stand_in
from energy_cases import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    START,
    Device,
    Standin,
    compiled,
    standin,
    truth,
)
from ranks import Ranks

from distrib.energy import Account, Meter, summed
from distrib.energy.nvml import Device as Listed
from distrib.energy.nvml import Unknown, visible
from distrib.topology import Topology

ROOT = Path(__file__).resolve().parents[2]
SQUARE = {"low_watts": 80.0, "high_watts": 650.0, "wave_s": 1.0, "duty": 0.3}
WAVES: list[dict[str, float]] = [
    {},
    SQUARE,
    {**SQUARE, "wave_s": 0.013, "duty": 0.5},
    {**SQUARE, "wave_s": 7.0, "duty": 0.9},
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = compiled(tmp_path_factory.mktemp("nvml"))
    if found is None:
        pytest.skip("no C compiler here to build the stand-in with")
    return found


@pytest.fixture
def nvml(library: Path) -> Iterator[Standin]:
    with standin(library) as made:
        yield made


def holds(account: Account, device: Device, start: float, end: float) -> None:
    """What is said is true: within the bound, or at most the bound when no value is given."""
    true = truth(device, start, end)
    if all(part.source is None for part in account.parts):
        assert account.joules is account.bound_joules is account.source is None
        assert account.coverage == 0
        return
    assert account.bound_joules is not None
    if account.joules is None:
        assert true <= account.bound_joules * (1 + 1e-9)
        assert account.source is account.watts is account.net_joules is None
        assert account.coverage == 0
    else:
        assert account.joules > 0
        assert abs(account.joules - true) <= account.bound_joules * (1 + 1e-9)


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("period_s", [0.02, 0.05, 0.1, 0.25])
@pytest.mark.parametrize("latency_s", [0.0, 0.003])
def test_counters_are_right_within_the_bound_in_every_window(
    nvml: Standin, wave: dict[str, float], period_s: float, latency_s: float
) -> None:
    device = nvml.add(**wave, period_s=period_s)
    nvml.latency_s.value = latency_s
    lengths = random.Random(int(period_s * 100) + len(wave))
    with nvml.meter() as meter:
        known = 0
        for _ in range(60):
            account, start, end = nvml.window(meter, 10 ** lengths.uniform(-3, 1.5))
            holds(account, device, start, end)
            known += account.joules is not None
            assert account.resets == 0
        assert known > 15
        account, start, end = nvml.window(meter, 300.0)
        holds(account, device, start, end)
        assert account.source == "counter"
        assert account.coverage == 1
        # Twice the mean or the limit, for a period and what it takes to look.
        assert account.bound_joules
        assert account.watts
        bound_s = account.bound_joules / max(700, 2 * account.watts)
        assert period_s <= bound_s < period_s + 0.005 + 6 * latency_s


def test_the_minute_of_the_textbook(nvml: Standin) -> None:
    nvml.add(high_watts=300.0, period_s=0.1, limit_watts=300.0)
    with nvml.meter() as meter:
        account, _, _ = nvml.window(meter, 60.0)
    assert account.joules == pytest.approx(18000, abs=60)
    assert account.bound_joules == pytest.approx(60, rel=0.05)
    assert account.watts == pytest.approx(300, rel=0.004)


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.01, 0.05, 0.09, 0.11])
def test_a_window_shorter_than_the_counters_period_is_unknown_never_zero(nvml: Standin, seconds: float) -> None:
    device = nvml.add()
    with nvml.meter() as meter:
        for _ in range(40):
            account, start, end = nvml.window(meter, seconds)
            assert account.joules is None
            holds(account, device, start, end)
            assert account.parts[0].joules is None
            assert "too short" in " ".join(account.notes)


def test_short_windows_add_up_to_what_one_long_window_says(nvml: Standin) -> None:
    nvml.add()
    with nvml.meter() as meter:
        first = meter.read()
        for _ in range(600):
            last = nvml.window(meter, 0.05)[0]
        account = meter.between(first, meter.read(), tokens=6000, steps=600)
    assert last.joules is None
    assert account.joules == pytest.approx(300 * 30, rel=0.01)
    assert account.joules_per_token == pytest.approx(1.5, rel=0.01)
    assert account.joules_per_step == pytest.approx(15, rel=0.01)


@pytest.mark.parametrize("wave", WAVES)
@pytest.mark.parametrize("moment_s", [0.04, 7.77, 59.95])
def test_a_reset_costs_about_a_second_and_is_said(nvml: Standin, wave: dict[str, float], moment_s: float) -> None:
    device = nvml.add(**wave)
    with nvml.meter() as meter:
        before = meter.read()
        device.resets_at = before.time + moment_s
        nvml.clock.sleep(60.0)
        after = meter.read()
        account = meter.between(before, after, tokens=1)
        later, start, end = nvml.window(meter, 60.0)
    holds(account, device, before.time, after.time)
    assert account.joules is not None
    assert account.resets == 1
    assert 0.97 < account.coverage < 1
    assert any("began again at 0" in note for note in account.notes)
    assert any("lower bound" in note for note in account.notes)
    holds(later, device, start, end)
    assert later.coverage == 1


def test_a_reset_in_every_short_window_is_never_negative(nvml: Standin) -> None:
    device = nvml.add()
    with nvml.meter() as meter:
        for _ in range(30):
            device.resets_at = nvml.now.value + 0.5
            account, start, end = nvml.window(meter, 3.0)
            holds(account, device, start, end)
            assert account.resets == 1


def test_a_lost_device_leaves_a_lower_bound_or_nothing(nvml: Standin) -> None:
    device = nvml.add()
    with nvml.meter() as meter:
        device.lost_at = nvml.now.value + 45.0
        account, start, end = nvml.window(meter, 60.0)
        holds(account, device, start, end)
        assert account.joules == pytest.approx(300 * 45, rel=0.03)
        assert 0.7 < account.coverage < 0.76
        assert any("GPU is lost" in note for note in account.notes)
        gone, start, end = nvml.window(meter, 60.0)
        holds(gone, device, start, end)
        assert gone.joules is None
        device.found_at = nvml.now.value + 10.0
        account, start, end = nvml.window(meter, 100.0)
        holds(account, device, start, end)
        assert account.coverage == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("missing_s", "known"), [(2.0, True), (12.0, False)])
def test_a_device_that_comes_and_goes_is_within_the_bound(nvml: Standin, missing_s: float, known: bool) -> None:
    device = nvml.add(period_s=0.4, limit_watts=300.0)
    draw = random.Random(3)
    with nvml.meter() as meter:
        for _ in range(200):
            device.lost_at = nvml.now.value + draw.uniform(2.0, 3.0)
            device.found_at = device.lost_at + missing_s + draw.uniform(-0.5, 0.5)
            account, start, end = nvml.window(meter, draw.uniform(19.0, 20.0))
            holds(account, device, start, end)
            assert (account.joules is not None) == known
            assert account.coverage < 1


def test_slow_reads_are_in_the_bound(nvml: Standin) -> None:
    device = nvml.add(**{**SQUARE, "wave_s": 7.0}, period_s=0.02)
    lengths = random.Random(5)
    with nvml.meter() as meter:
        nvml.latency_s.value = 0.3
        for _ in range(60):
            account, start, end = nvml.window(meter, lengths.uniform(3.0, 9.0))
            holds(account, device, start, end)


def test_a_counter_that_jumps_is_not_believed(nvml: Standin) -> None:
    device = nvml.add()
    with nvml.meter() as meter:
        before = meter.read()
        nvml.clock.sleep(20.0)
        # A gigajoule too much for a moment: up, and down again to what is not 0.
        for high_watts in (1e6, 300.0):
            device.high_watts = high_watts
            meter.read()
        nvml.clock.sleep(20.0)
        after = meter.read()
        account = meter.between(before, after)
    assert account.resets == 2
    holds(account, device, before.time, after.time)
    assert account.joules == pytest.approx(300 * 40, rel=0.05)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ({"energy_error": NO_PERMISSION}, "Insufficient Permissions"),
        ({"energy_error": NOT_SUPPORTED}, "Not Supported"),
        ({"period_s": 5.0}, "stands still"),
        ({"high_watts": 300.0, "period_s": 1e9}, "stands still"),
    ],
)
def test_power_is_sampled_where_there_is_no_counter(nvml: Standin, script: dict[str, Any], said: str) -> None:
    device = nvml.add(**script)
    with nvml.meter() as meter:
        account, start, end = nvml.window(meter, 20.0)
    holds(account, device, start, end)
    assert account.joules == pytest.approx(6000, rel=1e-6)
    assert account.source == "power"
    assert any(said in note and "power is sampled" in note for note in account.notes)


@pytest.mark.parametrize("mean_s", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("wave", [*WAVES, {**SQUARE, "wave_s": 0.05}, {**SQUARE, "wave_s": 0.11, "duty": 0.1}])
def test_sampled_power_is_right_within_the_bound(nvml: Standin, wave: dict[str, float], mean_s: float) -> None:
    device = nvml.add(**wave, mean_s=mean_s, energy_error=NOT_SUPPORTED)
    lengths = random.Random(7)
    with nvml.meter() as meter:
        for _ in range(12):
            account, start, end = nvml.window(meter, 10 ** lengths.uniform(-1, 2))
            holds(account, device, start, end)
        account, start, end = nvml.window(meter, 200.0)
        holds(account, device, start, end)
        assert account.coverage == 1
        assert account.joules == pytest.approx(truth(device, start, end), rel=0.05)


def test_power_that_nobody_sampled_for_long_is_missing(nvml: Standin) -> None:
    device = nvml.add(energy_error=NOT_SUPPORTED, **SQUARE)
    with nvml.meter() as meter:
        before = meter.read()
        nvml.clock.sleep(30.0)
        nvml.now.value += 10.0
        nvml.clock.sleep(30.0)
        after = meter.read()
        account = meter.between(before, after)
    holds(account, device, before.time, after.time)
    assert account.coverage == pytest.approx(60 / 70, abs=0.001)


@pytest.mark.parametrize(
    ("script", "name", "said"),
    [
        (
            {"energy_error": NO_PERMISSION, "power_error": NO_PERMISSION},
            "GPU-a",
            "no power (NVML says: Insufficient Permissions)",
        ),
        ({"lost_at": 0.0}, "GPU-a", "GPU is lost"),
        ({"handle_error": GPU_IS_LOST}, "cuda:0", "CUDA sees 0 devices"),
        ({"mig": 1}, "GPU-a", "MIG instance"),
    ],
)
def test_what_cannot_be_read_is_unknown_and_said(nvml: Standin, script: dict[str, Any], name: str, said: str) -> None:
    device = nvml.add(**script)
    with nvml.meter(CUDA_VISIBLE_DEVICES="GPU-a") as meter:
        assert meter.measure_idle(1.0) is None
        account, start, end = nvml.window(meter, 20.0)
    assert account.joules is None
    holds(account, device, start, end)
    assert [(part.name, part.source, part.joules) for part in account.parts if part.counted] == [(name, None, None)]
    assert any(said in note and "unknown" in note for note in account.notes), account.notes


@pytest.mark.parametrize("shown", ["MIG-1", "MIG-GPU-a/1/0"])
def test_a_mig_instance_is_not_taken_for_its_device(nvml: Standin, shown: str) -> None:
    nvml.add(mig=1)
    nvml.add("MIG-1", listed=False)
    with nvml.meter(CUDA_VISIBLE_DEVICES=shown) as meter:
        account, _, _ = nvml.window(meter, 20.0)
    assert account.joules is None
    assert account.parts[0].name == shown
    assert any("MIG instance" in note for note in account.notes)


def test_a_machine_without_nvml_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", no_library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    meter = Meter(Topology(device_type="cuda"), Path("/nowhere"))
    account = meter.between(meter.read(), meter.read(), tokens=5, steps=1)
    assert account.joules is account.source is account.joules_per_token is account.watts is None
    assert account.coverage == 0
    assert any("NVML Shared Library Not Found" in note for note in account.notes)
    meter.close()


def test_a_driver_that_is_not_loaded_says_so(nvml: Standin) -> None:
    nvml.add()
    nvml.init_error.value = DRIVER_NOT_LOADED
    with nvml.meter() as meter:
        account, _, _ = nvml.window(meter, 20.0)
    assert account.joules is None
    assert any("Driver Not Loaded" in note for note in account.notes)


def test_a_run_on_a_cpu_does_not_ask_for_gpus(nvml: Standin) -> None:
    nvml.add()
    with nvml.meter(device_type="cpu") as meter:
        account, _, _ = nvml.window(meter, 20.0)
    assert [part.kind for part in account.parts] == ["package"]
    assert account.joules is None


def test_a_module_stands_apart_and_is_not_added(nvml: Standin) -> None:
    nvml.add(module_watts=500.0)
    with nvml.meter() as meter:
        account, _, _ = nvml.window(meter, 20.0)
    assert account.joules == pytest.approx(6000, rel=0.02)
    (module,) = [part for part in account.parts if part.kind == "module"]
    assert module.joules == pytest.approx(10000, rel=0.02)
    assert not module.counted
    assert module.source == "power"


def test_idle_is_measured_at_the_counters_edges_and_taken_off(nvml: Standin) -> None:
    device = nvml.add(high_watts=70.0)
    with nvml.meter() as meter:
        assert meter.measure_idle(1.0)["GPU-a"] == pytest.approx(70, rel=0.005)
        device.resets_at = 0.0  # as before, for another power
        device.high_watts = 400.0
        nvml.clock.sleep(5.0)
        account, _, _ = nvml.window(meter, 60.0)
        assert account.idle_watts == pytest.approx(70, rel=0.005)
        assert account.net_joules == pytest.approx(330 * 60, rel=0.01)
        device.high_watts = 40.0
        nvml.clock.sleep(5.0)
        account, _, _ = nvml.window(meter, 60.0)
    assert account.joules == pytest.approx(40 * 60, rel=0.03)
    assert account.net_joules is None
    assert any("less than in the idle baseline" in note for note in account.notes)


DEVICES = [Listed(uuid, "H100") for uuid in ("GPU-aa1", "GPU-ab2", "GPU-b3", "GPU-c4")]
ENTRIES = [
    "0",
    "1",
    "3",
    "4",
    "-1",
    "",
    "x",
    " 2",
    "+1",
    "2x",
    "GPU-aa",
    "GPU-a",
    "GPU-b",
    "GPU-aa1",
    "GPU-zz",
    "gpu-b",
]


def by_torch(given: str | None) -> list[str]:
    """What torch makes of it, without CUDA."""
    shown = torch.cuda._parse_visible_devices()
    uuids = [device.uuid for device in DEVICES]
    if shown and isinstance(shown[0], str):
        return [uuids[index] for index in torch.cuda._transform_uuid_to_ordinals(shown, uuids)]
    inside = [index < len(uuids) for index in shown]
    return [uuids[index] for index in shown[: inside.index(False) if False in inside else None]]


def test_visible_devices_are_read_as_torch_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    given = [",".join(draw.choices(ENTRIES, k=draw.randint(1, 4))) for _ in range(500)]
    seen = set()
    for text in given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert visible(os.environ, DEVICES) == by_torch(text), text
        seen.add(tuple(by_torch(text)))
    assert len(seen) > 12
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible(os.environ, DEVICES) == by_torch(None) == [device.uuid for device in DEVICES]


def test_numbers_mean_nothing_where_models_differ_and_cuda_orders_by_speed() -> None:
    mixed = [*DEVICES, Listed("GPU-d5", "A100")]
    for env in ({}, {"CUDA_VISIBLE_DEVICES": "4"}):
        with pytest.raises(Unknown, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
            visible(env, mixed)
    assert visible({"CUDA_VISIBLE_DEVICES": "4", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, mixed) == ["GPU-d5"]
    assert visible({"CUDA_VISIBLE_DEVICES": "GPU-d"}, mixed) == ["GPU-d5"]


@pytest.mark.parametrize(
    ("shown", "name"), [("1", "GPU-y"), ("2,0", "GPU-z"), ("GPU-x", "GPU-x"), ("GPU-y,0", "GPU-y"), (None, "GPU-x")]
)
def test_the_rank_reads_the_device_that_it_computes_on(nvml: Standin, shown: str | None, name: str) -> None:
    for uuid, high_watts in (("GPU-x", 100.0), ("GPU-y", 200.0), ("GPU-z", 400.0)):
        nvml.add(uuid, high_watts=high_watts)
    with nvml.meter(**({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown})) as meter:
        account, _, _ = nvml.window(meter, 60.0)
    watts = {"GPU-x": 100.0, "GPU-y": 200.0, "GPU-z": 400.0}[name]
    assert account.parts[0].name == name
    assert account.watts == pytest.approx(watts, rel=0.005)


@pytest.mark.parametrize("shown", ["", "-1", "7", "nonsense"])
def test_a_rank_without_a_visible_device_is_unknown(nvml: Standin, shown: str) -> None:
    nvml.add()
    with nvml.meter(CUDA_VISIBLE_DEVICES=shown) as meter:
        account, _, _ = nvml.window(meter, 20.0)
    assert account.joules is None
    assert any(f"CUDA sees 0 devices with CUDA_VISIBLE_DEVICES='{shown}'" in note for note in account.notes)


def test_two_ranks_on_one_device_count_it_once(two_ranks: Ranks, library: Path) -> None:
    scripts = [{"uuid": "GPU-a"}, {"uuid": "GPU-b"}]
    first, second = two_ranks("energy_cases:shared_window", str(library), scripts, "1 GPU-b")
    assert first == second
    gpus = [part for part in first["parts"] if part["kind"] == "gpu"]
    assert [(part["name"], part["ranks"]) for part in gpus] == [("GPU-b", (0, 1))]
    assert first["joules"] == pytest.approx(9000, rel=0.01)
    assert first["joules_per_token"] == pytest.approx(90, rel=0.01)
    assert len([part for part in first["parts"] if part["kind"] == "package"]) == 1


def test_two_ranks_add_up_and_a_lost_device_shows(two_ranks: Ranks, library: Path) -> None:
    scripts: list[dict[str, Any]] = [{"uuid": "GPU-a"}, {"uuid": "GPU-b", "high_watts": 100.0, "limit_watts": 150.0}]
    account, _ = two_ranks("energy_cases:shared_window", str(library), scripts, "0 1")
    assert account["joules"] == pytest.approx(12000, rel=0.01)
    assert account["coverage"] == 1
    scripts[1]["lost_at"] = START + 20.0
    account, _ = two_ranks("energy_cases:shared_window", str(library), scripts, "0 1")
    assert account["joules"] == pytest.approx(9000 + 2000, rel=0.05)
    assert account["coverage"] == pytest.approx(5 / 6, abs=0.03)
    assert abs(account["joules"] - 12000) <= account["bound_joules"]
    scripts[1] |= {"lost_at": 0.0}
    account, _ = two_ranks("energy_cases:shared_window", str(library), scripts, "0 1")
    assert account["joules"] == pytest.approx(9000, rel=0.01)
    assert account["coverage"] == 0.5
    assert account["bound_joules"] is None
    assert any("GPU-b" in note and "unknown" in note for note in account["notes"])


def test_accounts_add_up_over_resumed_runs(nvml: Standin) -> None:
    nvml.add()
    records = []
    for seconds in (10.0, 20.0, 0.01):
        with nvml.meter() as meter:
            meter.measure_idle(1.0)
            before = meter.read()
            nvml.clock.sleep(seconds)
            records.append(meter.between(before, meter.read(), tokens=100, steps=5).as_dict())
    total = summed(records)
    assert total.joules == pytest.approx(9000, rel=0.01)
    assert (total.tokens, total.steps) == (300, 15)
    assert total.seconds == pytest.approx(30.01)
    assert total.joules_per_token == pytest.approx(30, rel=0.01)
    # The window that was too short for a value is missing, and in the bound.
    assert 0.999 < total.coverage < 1
    assert total.bound_joules == pytest.approx(sum(record["bound_joules"] for record in records))
    assert len([part for part in total.parts if part.kind == "gpu"]) == 1
    assert total.idle_watts == pytest.approx(300, rel=0.01)
    assert summed([]).joules is None


REAL = """
import ctypes, json, time, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, "tests")
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))  # saves seconds
from energy_cases import Standin, SONAME
nvml = Standin(ctypes.CDLL(SONAME))
nvml.now.value = -1.0
nvml.add("GPU-counter", period_s=0.02)
nvml.add("GPU-power", energy_error=3)
from distrib.energy import Meter
from distrib.topology import Topology
accounts = []
for name in ("GPU-counter", "GPU-power"):
    meter = Meter(Topology(device_type="cuda"), Path("/nowhere"), env={"CUDA_VISIBLE_DEVICES": name})
    before = meter.read()
    time.sleep(1.2)
    accounts.append(meter.between(before, meter.read()).as_dict())
    meter.close()
print(json.dumps(accounts))
"""


def test_the_binding_finds_the_library_and_the_thread_samples(library: Path) -> None:
    """In real time, where only what the bound says is asked for."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", REAL], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    for account, source in zip(json.loads(done.stdout), ("counter", "power"), strict=True):
        assert account["parts"][0]["source"] == source
        if account["joules"] is not None:
            assert abs(account["joules"] - 300 * account["seconds"]) <= account["bound_joules"]


def test_the_benchmark_of_metering_runs_without_a_gpu(library: Path) -> None:
    with stand_in() as make:
        found = overhead(make, lambda: sum(range(10000)), Namespace(steps=2, repeats=3))
    assert found["share"]["read_and_account"] == pytest.approx(found["read_and_account_s"] / found["step_s"])
    assert found["metered_over_bare"]["median"] > 0


@pytest.mark.gpu
@pytest.mark.slow
def test_the_counter_of_a_gpu_agrees_with_its_power() -> None:
    with real() as make:
        found = compare(make)
    uuid = next(name for name in found["idle_watts"] if name.startswith("GPU-"))
    assert found["idle_watts"][uuid] > 1
    assert 0.005 < found["counter_period_s"][uuid] < 0.3
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        for _ in range(20):
            a @ a
        torch.cuda.synchronize()

    assert against_power(step)["counter_over_power"] == pytest.approx(1, abs=0.03)
