"""What to do about what was found, the worst first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from launch.doctor import disk, gpus, machine
from launch.network import NOTED

APART_S = 1.0
"""Clocks further apart make logs and file times of different machines misleading."""
Facts = dict[str, Any]


def todo(found: Facts) -> list[str]:
    nodes = found["nodes"] if isinstance(found["nodes"], list) else []
    said = [*_of_recipe(found["strategies"]), *_of_nodes(nodes), *_differences(nodes), *_of_network(found["network"])]
    said += [*_of_links(found["links"]), *_of_clocks(found["clocks"]), *_of_needs(found["strategies"])]
    if not any(_has_gpus(node) for node in nodes):
        said.append("no GPU for torch here: runs train on the CPU, which is for small models and for trying things out")
    return list(dict.fromkeys(said))


def _of_recipe(needs: Facts) -> list[str]:
    return list((needs.get("recipe") or {}).get("missing", ()))


def _of_nodes(nodes: list[Facts]) -> Iterator[str]:
    for node in nodes:
        where = f"{node['host']}: " if len(nodes) > 1 else ""
        known = {name: node[name] for name in ("machine", "gpus", "disk") if not _is_unknown(node[name])}
        said = []
        if "machine" in known:
            said += machine.problems(known["machine"], known.get("gpus", {"devices": None}))
        if "gpus" in known:
            said += gpus.problems(known["gpus"])
        if "disk" in known:
            said += disk.problems(known["disk"])
        yield from (where + line for line in said)


def _has_gpus(node: Facts) -> bool:
    return bool((node["machine"].get("torch") or {}).get("devices"))


def _differences(nodes: list[Facts]) -> Iterator[str]:
    """Versions have to be the same on all machines."""
    versions = [_versions(node) for node in nodes]
    for name in sorted({name for known in versions for name in known}):
        for node, known in zip(nodes[1:], versions[1:], strict=True):
            if known.get(name) != versions[0].get(name):
                first = f"{nodes[0]['host']} has {name} {versions[0].get(name)}"
                yield f"{first}, {node['host']} {known.get(name)}: install the same"


def _versions(node: Facts) -> dict[str, str | None]:
    if _is_unknown(node["machine"]):
        return {}
    of_torch = node["machine"]["torch"]
    packages = {one["name"]: one["installed"] for one in node["machine"]["packages"]}
    driver = {} if _is_unknown(node["gpus"]) else {"driver": node["gpus"]["driver"]}
    return packages | driver | {"CUDA": of_torch["cuda"], "NCCL": of_torch["nccl"]}


def _of_network(network: Facts) -> Iterator[str]:
    for one in network.get("findings", ()):
        if one["effect"] and one["kind"] != NOTED:
            yield one["said"]


def _of_links(links: Facts) -> Iterator[str]:
    if links.get("why"):
        yield f"ranks do not talk: {links['why']}"


def _of_clocks(clocks: Facts) -> Iterator[str]:
    for one in clocks.get("differences") or ():
        if abs(one["ahead_s"]) - one["give_or_take_s"] > APART_S:
            yield f"the clock of rank {one['rank']} is {one['ahead_s']:+.1f} s off rank 0's: see chrony or NTP"


def _of_needs(needs: Facts) -> Iterator[str]:
    """Not of a recipe, whose own list has it."""
    if "why" in needs:
        yield f"strategies cannot be looked at: {needs['why']}"
    elif "recipe" not in needs:
        for kind in ("strategies", "engines"):
            yield from (f"{one['name']}: {one['missing']}" for one in needs[kind] if one["missing"])
        yield from (f"{name}: {needs[name]['missing']}" for name in ("compile", "offload") if needs[name]["missing"])


def _is_unknown(facts: Facts) -> bool:
    return set(facts) == {"why"}
