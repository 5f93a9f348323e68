"""On a rank: parts of the doctor among ranks that are there already."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from distrib.topology import Topology
from launch import doctor, network
from launch.doctor import links, ranks

SMALL = {"LARGE": 2**21, "MOST": 6, "BUDGET_S": 0.01}


def without_network() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(network.PREFIXES)}


def said_at_the_start(topology: Topology, device_type: str, env: list[dict[str, str]]) -> str:
    """What it says of this environment."""
    known = without_network() | env[topology.rank]
    with patch.dict(os.environ, known, clear=True), redirect_stderr(io.StringIO()) as said:
        network.say_once(replace(topology, device_type=device_type))
    return said.getvalue()


def measured(topology: Topology) -> dict[str, Any]:
    with patch.multiple(links, **SMALL):
        return ranks.measure(topology)


def examined(topology: Topology, env: list[dict[str, str]], torch: list[str]) -> tuple[str, Any]:
    """What each prints, as ranks of two machines with other versions of torch."""
    own = {"RANK": str(topology.rank), "GROUP_RANK": str(topology.rank)}
    known = without_network() | env[topology.rank] | own
    here = replace(topology, local_rank=0, local_world=1)
    from launch.doctor import machine

    version = machine._version
    with (
        patch.dict(os.environ, known, clear=True),
        patch.multiple(links, **SMALL),
        patch.object(ranks, "connected", lambda: (here, None, None)),
        patch.object(machine, "_version", lambda name: torch[topology.rank] if name == "torch" else version(name)),
        redirect_stderr(io.StringIO()),
        redirect_stdout(io.StringIO()) as printed,
    ):
        doctor.doctor(None, as_json=True)
    text = printed.getvalue()
    return text, json.loads(text) if text else None
