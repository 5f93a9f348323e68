"""`ebbtide doctor`: what this machine, or all ranks of a launcher, have and lack. Whatever is absent is said, never
raised: a section that finds nothing has a `why`.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.redaction import clean, one_line
from launch import network
from launch.doctor import advice, clocks, disk, gpus, machine, needs, ranks, show
from launch.spawn import launched, say

if TYPE_CHECKING:
    from distrib.topology import Topology
    from launch.recipe import Recipe

Facts = dict[str, Any]


def doctor(recipe: Recipe | None, as_json: bool) -> Facts:
    """Every rank of a launcher calls it; rank 0 says what was found."""
    env = network.variables(os.environ)
    report = Report(as_json)
    if not launched(os.environ):
        _examine(recipe, report, env, *_alone())
        return report.finish()
    topology, store, why = ranks.connected()
    report.speaks = os.environ.get("RANK", "0") == "0"
    if topology.world == 1 and why is None:
        why = "the launcher started one rank: start several, or call this without it"

    def end(line: str | None) -> None:
        if line:
            say(line)
        report.finish(line or "a rank hangs, and another one says which")

    def examine() -> Facts:
        _examine(recipe, report, env, topology, why)
        return report.found

    try:
        ranks.watched(topology, store, examine, end)
    except Exception as error:
        report.finish(f"{type(error).__name__}: {one_line(error, 300)}")
    return report.finish()


def _alone() -> tuple[Topology, str | None]:
    from distrib.topology import Topology, read_environment

    try:
        return Topology(device_type=read_environment().device_type), None
    except Exception as error:
        return Topology(), f"{type(error).__name__}: {one_line(error, 200)}"


class Report:
    """What was found so far, said as it comes: lines for people, or one object at the end. `speaks`: on rank 0 only."""

    def __init__(self, as_json: bool) -> None:
        self.found: Facts = {}
        self.speaks = True
        self._as_json = as_json

    def progress(self, text: str) -> None:
        if self.speaks:
            say(text)

    def add(self, name: str, facts: Any) -> None:
        self.found[name] = facts
        if self.speaks and not self._as_json:
            print("\n".join(show.section(name, facts)), flush=True)

    def finish(self, why: str | None = None) -> Facts:
        """What was not reached, for the reason of `why`, and what there is to do."""
        if self.speaks and "todo" not in self.found:
            for name in show.SECTIONS:
                if name not in self.found and name != "todo":
                    self.add(name, {"why": why})
            self.add("todo", advice.todo(self.found))
            if self._as_json:
                print(json.dumps(self.found, default=str), flush=True)
        return self.found


def _examine(
    recipe: Recipe | None, report: Report, env: Mapping[str, str], topology: Topology, apart: str | None
) -> None:
    report.progress("looking at the machine")
    mine = (_node(recipe, topology), env, network.check(env))
    everyone: list[Any] = [mine]
    if topology.world > 1:
        import torch.distributed as dist

        everyone = [None] * topology.world
        dist.all_gather_object(everyone, mine)
    report.add("nodes", _nodes([node for node, _, _ in everyone]))
    report.add("network", _network([(env, found) for _, env, found in everyone], topology))
    if topology.main:
        report.progress("looking at strategies and engines")
        report.add(
            "strategies", _guarded(lambda: needs.of_recipe(recipe, topology) if recipe else needs.look(topology))
        )
    measured = _measured(report, topology, apart)
    report.add("links", measured.get("links", measured))
    report.add("clocks", {**clocks.resolution(), "differences": measured.get("clocks")})


def _measured(report: Report, topology: Topology, apart: str | None) -> Facts:
    if apart:
        return {"why": apart}
    if topology.world > 1:
        report.progress(f"measuring links between {topology.world} ranks")
        return ranks.measure(topology)
    devices = report.found["nodes"][0]["machine"].get("torch", {}).get("devices") or 0
    report.progress(f"measuring links between {max(2, devices)} ranks, which have to start")
    return _guarded(lambda: ranks.started_here(devices))


def _node(recipe: Recipe | None, topology: Topology) -> Facts:
    """Of the machine that this rank is on, by one of its ranks."""
    host = socket.gethostname()
    # containers and network namespaces may share a name
    node = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or host
    found: Facts = {"host": host, "node": node, "machine": None, "gpus": None, "disk": None}
    if topology.local_rank == 0:
        folder = Path(recipe.output_dir if recipe else ".")
        found |= {"machine": _guarded(machine.look), "gpus": _guarded(gpus.inventory)}
        found["disk"] = _guarded(lambda: disk.look(folder))
    return found


def _nodes(nodes: Sequence[Facts]) -> list[Facts]:
    """One a machine, with the ranks on it."""
    return [
        {**node, "ranks": [rank for rank, other in enumerate(nodes) if other["node"] == node["node"]]}
        for node in nodes
        if node["machine"]
    ]


def _network(everyone: Sequence[tuple[Mapping[str, str], Sequence[network.Finding]]], topology: Topology) -> Facts:
    """Rank 0's variables, and what is to be said of everyone's."""
    found = network.check_all(everyone)
    return {
        "variables": clean(dict(everyone[0][0])),
        "findings": [
            {**asdict(one), "said": str(one), "effect": network.has_effect(one.name, topology.device_type)}
            for one in found
        ],
    }


def _guarded(look: Callable[[], Facts]) -> Facts:
    try:
        # what libraries print is no part of the report
        with redirect_stdout(sys.stderr):
            return look()
    except Exception as error:
        return {"why": f"{type(error).__name__}: {one_line(error, 300)}"}
