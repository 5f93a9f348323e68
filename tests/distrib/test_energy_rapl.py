"""Energy of CPUs and memory, from a stand-in of Linux's powercap tree."""

from __future__ import annotations

import ctypes
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from energy_cases import RANGE_J, START, Tree, VirtualClock

from distrib.energy import Meter
from distrib.topology import Topology


def two_sockets(root: Path, **how: float) -> Tree:
    tree = Tree(root, **how)
    for zone, name, watts in (
        ("intel-rapl:0", "package-0", 120.0),
        ("intel-rapl:0:0", "core", 90.0),
        ("intel-rapl:0:1", "dram", 15.0),
        ("intel-rapl:1", "package-1", 80.0),
        ("intel-rapl:1:0", "dram", 5.0),
        ("intel-rapl:2", "psys", 300.0),
        ("intel-rapl-mmio:0", "package-0", 120.0),
    ):
        tree.add(zone, name, watts)
    return tree


def one_socket(root: Path, watts: float, **how: float) -> Tree:
    tree = Tree(root, **how)
    tree.add("intel-rapl:0", "package-0", watts)
    return tree


def test_packages_and_memory_are_added_and_nothing_twice(tmp_path: Path) -> None:
    tree = two_sockets(tmp_path / "powercap")
    with tree.meter() as meter:
        account = tree.window(meter, 60)
    assert account.joules == pytest.approx(220 * 60, abs=account.bound_joules)
    assert account.bound_joules == pytest.approx(4, rel=0.01)  # a millisecond of four domains at 1 kW
    assert account.source == "rapl"
    assert account.coverage == 1
    assert {part.name: part.counted for part in account.parts} == {
        "package-0": True, "package-0/dram": True, "package-1": True, "package-1/dram": True, "psys": False,
    }  # fmt: skip


@pytest.mark.parametrize("offset", [0.0, RANGE_J - 1000, RANGE_J - 0.5])
def test_a_wrap_is_seen(tmp_path: Path, offset: float) -> None:
    tree = one_socket(tmp_path / "powercap", 220.0, offset_joules=offset)
    with tree.meter() as meter:
        account = tree.window(meter, 100)
    assert account.joules == pytest.approx(220 * 100, abs=0.01)
    assert account.resets == 0


def test_many_wraps_between_two_readings_are_seen_by_the_thread(tmp_path: Path) -> None:
    tree = one_socket(tmp_path / "powercap", 220.0, range_joules=8000.0)
    with tree.meter() as meter:
        account = tree.window(meter, 300)
    assert account.joules == pytest.approx(220 * 300, abs=0.01)


def test_a_gap_in_which_it_may_have_wrapped_is_missing(tmp_path: Path) -> None:
    tree = one_socket(tmp_path / "powercap", 900.0)
    with tree.meter() as meter:
        before = meter.read()
        tree.window(meter, 150)
        tree.clock.move_to(tree.clock.now() + 140)  # the process was stopped
        tree.window(meter, 60)
        account = meter.between(before, meter.read())
    assert account.joules == pytest.approx(900 * 210, rel=0.01)
    assert account.coverage == pytest.approx(0.6, abs=0.01)
    assert abs(account.joules - 900 * 350) <= (account.bound_joules or 0)


def test_idle_is_taken_off(tmp_path: Path) -> None:
    tree = two_sockets(tmp_path / "powercap")
    with tree.meter() as meter:
        idle = meter.measure_idle(1.0)
        assert idle["package-0"] == pytest.approx(120, rel=0.005)
        tree.watts["intel-rapl:0"] = 200.0
        account = tree.window(meter, 60)
    assert account.idle_watts == pytest.approx(220, rel=0.005)
    assert account.net_joules == pytest.approx(80 * 60, rel=0.02)


def test_what_cannot_be_read_keeps_its_place(tmp_path: Path) -> None:
    tree = two_sockets(tmp_path / "powercap")
    energy = tmp_path / "powercap" / "intel-rapl:1" / "energy_uj"
    energy.unlink()
    energy.mkdir()
    with tree.meter() as meter:
        account = tree.window(meter, 60)
    assert account.coverage == 0.75
    assert [part.name for part in account.parts if part.counted and part.joules is None] == ["package-1"]
    assert any("energy of package-1 is unknown" in note for note in account.notes)


def test_a_tree_that_only_root_reads_says_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = two_sockets(tmp_path / "powercap")
    read = Path.read_text

    def as_user(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", as_user)
    with tree.meter() as meter:
        assert meter.measure_idle(1.0) is None
        account = tree.window(meter, 60)
    assert account.joules is account.source is None
    assert any("chmod a+r" in note for note in account.notes)


def test_a_machine_without_the_tree_says_so(tmp_path: Path) -> None:
    with closing(Meter(Topology(), tmp_path, VirtualClock(ctypes.c_double(START)))) as meter:
        account = meter.between(meter.read(), meter.read())
    assert account.joules is None
    assert account.coverage == 0
    assert account.notes == (f"the energy of the CPU is unknown: {tmp_path} shows no package of RAPL",)
