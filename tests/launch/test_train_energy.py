"""What a run says about its energy, over resumes too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from energy_cases import Tree
from train_cases import lines, recipe

import launch.train
from distrib.energy import Meter, Reading
from distrib.topology import Topology

WATTS, WINDOW_S = 100.0, 10.0


class Slow(Meter):
    """Ten seconds pass before every reading."""

    def read(self) -> Reading:
        self._clock.sleep(WINDOW_S)
        return super().read()


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    tree = Tree(tmp_path / "powercap")
    tree.add("intel-rapl:0", "package-0", WATTS)
    monkeypatch.setattr(launch.train, "Meter", lambda topology: Slow(topology, tree.root, tree.clock))
    return tree


def report(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "report.json").read_text()))


def test_a_run_and_its_continuation_have_one_account(tmp_path: Path, dataset: str, measured: Tree) -> None:
    run = tmp_path / "run"
    common: dict[str, Any] = {"logging_steps": 2, "save_steps": 2}
    said = launch.train.train(recipe(run, dataset, max_steps=4, **common), Topology())
    joules = WATTS * WINDOW_S
    assert [line["joules"] for line in lines(run)] == pytest.approx([joules, 2 * joules], rel=1e-6)
    assert {line["energy_source"] for line in lines(run)} == {"rapl"}
    assert said["joules"] == said["energy"]["joules"] == pytest.approx(4 * joules, rel=1e-6)
    measured.watts["intel-rapl:0"] *= 2
    co2 = {"idle_s": 0.0, "grams_co2_per_kwh": 400.0, "intensity_source": "grid operator, 2025"}
    launch.train.train(recipe(run, dataset, max_steps=6, energy=co2, **common), Topology())
    energy = report(run)["energy"]
    assert energy["joules"] == report(run)["joules"] == pytest.approx(8 * joules, rel=1e-6)
    assert energy["steps"] == 6
    assert energy["seconds"] == pytest.approx(6 * WINDOW_S)
    assert energy["watts"] == pytest.approx(8 * joules / (6 * WINDOW_S))
    assert energy["joules_per_token"] == pytest.approx(8 * joules / report(run)["tokens"])
    assert energy["joules_per_step"] == pytest.approx(8 * joules / 6)
    assert (energy["source"], energy["coverage"], energy["resets"]) == ("rapl", 1, 0)
    # The second part measured no baseline.
    assert energy["idle_watts"] is energy["net_joules"] is None
    assert energy["grams_co2"] == pytest.approx(8 * joules / 3.6e6 * 400)
    assert energy["intensity_source"] == "grid operator, 2025"


def test_idle_power_is_measured_before_and_taken_off(tmp_path: Path, dataset: str, measured: Tree) -> None:
    said = launch.train.train(recipe(tmp_path / "run", dataset, max_steps=2), Topology())
    assert said["energy"]["idle_watts"] == pytest.approx(WATTS, rel=0.005)
    # It computed at idle power: what is left is nothing, up to what the baseline is off by.
    assert abs(said["energy"]["net_joules"] or 0.0) < 0.01 * said["joules"]


def test_nothing_is_said_of_what_was_not_measured(
    tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.train, "Meter", lambda topology: Meter(topology, tmp_path / "powercap"))
    co2 = {"grams_co2_per_kwh": 400.0, "intensity_source": "a guess"}
    said = launch.train.train(recipe(tmp_path / "run", dataset, max_steps=1, energy=co2), Topology())
    for key in ("joules", "net_joules", "watts", "joules_per_token", "joules_per_step", "source", "grams_co2"):
        assert said["energy"][key] is None, key
    assert said["joules"] is None
    assert said["energy"]["coverage"] == 0
    assert any("shows no package" in note for note in said["energy"]["notes"])


def test_steps_from_before_there_was_an_account_are_said(tmp_path: Path, dataset: str, measured: Tree) -> None:
    run = tmp_path / "run"
    launch.train.train(recipe(run, dataset, max_steps=2), Topology())
    (run / "energy.jsonl").unlink()
    said = launch.train.train(recipe(run, dataset, max_steps=3), Topology())
    assert "of 3 steps, 1 were measured" in said["energy"]["notes"]
