"""The report's sections as lines for people. What is not known is said so, with the reason."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.network import NOTED

GIB = 2**30
Facts = Mapping[str, Any]


def section(name: str, facts: Any) -> list[str]:
    """A title, and its lines set in."""
    if isinstance(facts, dict) and set(facts) == {"why"}:
        return [name, f"  unknown: {facts['why']}"]
    return [name, *(f"  {line}" for line in SECTIONS[name](facts))] if name != "nodes" else list(_nodes(facts))


def _nodes(nodes: Sequence[Facts]) -> Iterator[str]:
    for node in nodes:
        ranks = node["ranks"]
        where = f" {node['host']}, ranks {ranks[0]} to {ranks[-1]}" if len(nodes) > 1 else ""
        for name, lines in (("machine", _machine), ("gpus", _gpus), ("disk", _disk)):
            facts = node[name]
            yield f"{name}{where}"
            unknown = set(facts) == {"why"}
            yield from (f"  {line}" for line in ([f"unknown: {facts['why']}"] if unknown else lines(facts)))


def _machine(facts: Facts) -> Iterator[str]:
    memory = _gib(facts["memory_bytes"])
    yield f"{_or(facts['os'])}, {_or(facts['cpu'])}, {_or(facts['cores'])} cores, {memory} of memory"
    torch = facts["torch"]
    built = torch["why"] or f"torch is built with CUDA {_or(torch['cuda'], 'none')}, NCCL {_or(torch['nccl'], 'none')}"
    seen = "" if torch["devices"] is None else f"; it sees {torch['devices']} GPUs"
    yield f"Python {facts['python']}; {built}{seen}"
    if facts["packages_why"]:
        yield facts["packages_why"]
    else:
        shown = [f"{one['name']} {_or(one['installed'], 'absent')}" for one in facts["packages"]]
        yield from textwrap.wrap(", ".join(shown), 110)
        out = [f"{one['name']} ({one['asked']})" for one in facts["packages"] if one["needed"] and not one["fits"]]
        yield f"out of range: {', '.join(out)}" if out else "all in the ranges that are asked for"


def _gpus(facts: Facts) -> Iterator[str]:
    if facts["why"]:
        yield f"none that can be used: {facts['why']}"
        return
    yield f"driver {_or(facts['driver'])}, for CUDA up to {_or(facts['cuda'])}; {len(facts['devices'])} devices"
    for device in facts["devices"]:
        if device["why"]:
            yield f"{device['index']}: {device['why']}"
        else:
            yield from _device(device)
    pairs = [f"{pair['devices'][0]}-{pair['devices'][1]} {_or(pair['access'])}" for pair in facts["peers"]]
    if pairs:
        yield f"read each other's memory: {', '.join(pairs)}"


def _device(d: Facts) -> Iterator[str]:
    used = _gib(d["memory_used_bytes"])
    yield f"{d['index']}: {_or(d['name'])}, {_gib(d['memory_bytes'])}, {used} in use, capability {_or(d['capability'])}"
    clocks = [
        f"{name} {_or(d[key])} of {_or(d[key + '_most'])} MHz"
        for name, key in (("SM", "sm_mhz"), ("memory", "memory_mhz"))
    ]
    throttled = "unknown" if d["throttled_by"] is None else ", ".join(d["throttled_by"]) or "nothing"
    yield f"   {', '.join(clocks)}, held down by {throttled}"
    limit, default = _or(d["power_limit_watts"]), _or(d["power_default_watts"])
    yield f"   power limit {limit} W of {default} W, energy counter {_switch(d['energy_counter'], 'yes', 'no')}"
    pcie = "gen {} of {} x{} of x{}".format(
        *(_or(d[f"pcie_{key}"]) for key in ("generation", "generation_most", "width", "width_most"))
    )
    links = d["nvlinks"]
    nvlink = "unknown" if links is None else f"{links.count(True)} of {len(links)} up"
    yield f"   PCIe {pcie}, NVLink {nvlink}"
    errors = _or(d["ecc_uncorrected"])
    yield f"   ECC {_switch(d['ecc'])}, uncorrected errors {errors}, MIG {_switch(d['mig'])}"
    if d["unknown"]:
        why = list(dict.fromkeys(d["unknown"].values()))
        yield f"   unknown: {', '.join(d['unknown'])} ({'; '.join(why)})"


def _disk(facts: Facts) -> Iterator[str]:
    where = f"{facts['file_system']}, on {facts['on']}" if facts["file_system"] else f"unknown ({facts['why']})"
    yield f"file system of the output folder: {where}; {_gib(facts['free_bytes'])} free"
    if facts["unusable"]:
        yield f"cannot be written: {facts['unusable']}"
    else:
        written = facts["bytes"] / 2**20
        rates = f"write and fsync {_rate(facts['write_bytes_per_s'])}, read {_rate(facts['read_bytes_per_s'])}"
        yield f"{rates} ({written:.0f} MiB)"


def _network(facts: Facts) -> Iterator[str]:
    if not facts["variables"] and not facts["findings"]:
        yield "nothing set"
    yield from (f"{name}={value}" for name, value in facts["variables"].items())
    for one in facts["findings"]:
        kind = one["kind"] if one["effect"] or one["kind"] == NOTED else f"{one['kind']}, but without effect on CPUs"
        yield f"{kind}: {one['said']}"


def _strategies(facts: Facts) -> Iterator[str]:
    rows = [*facts["strategies"], *facts["engines"]]
    plain = [row["name"] for row in rows if not row["missing"] and not row.get("note")]
    yield f"nothing missing: {', '.join(plain) or 'none'}"
    for row in rows:
        if row["missing"]:
            yield f"{row['name']}: {row['missing']}"
        elif row.get("note"):
            yield f"{row['name']}: {row['note']}"
    if facts["compile"]:
        yield f"compile: {facts['compile']['missing'] or 'has its compiler'}"
    if facts["offload"]:
        yield f"offload: {facts['offload']['missing'] or 'to ' + facts['offload']['to']}"
    sources = [f"{one['device']}: {_or(one['how'], 'none')}" for one in facts["energy"]["sources"]]
    yield f"energy: {', '.join(sources)}"
    yield from (f"  {note}" for note in facts["energy"]["notes"])
    if recipe := facts.get("recipe"):
        verdict = "can start" if recipe["starts"] else f"cannot start: {recipe['missing'][0]}"
        yield f"this recipe, on {recipe['ranks']} ranks, {verdict} (its data were not looked at)"


def _links(facts: Facts) -> Iterator[str]:
    yield f"{facts['backend']}, {facts['ranks']} ranks; medians, with quartiles"
    for one in facts["all_reduce"]:
        rates = f"{_rate(one['bytes_per_s'])}, bus {_rate(one['bus_bytes_per_s'])}"
        yield f"all-reduce {_size(one['bytes'])}: {_span(one)}, {rates}, {one['runs']} runs"
    for pair in sorted(facts["neighbours"], key=lambda pair: pair["bytes_per_s"])[:SLOWEST]:
        latency = _time(pair["latency_s"])
        rate = f"{_rate(pair['bytes_per_s'])} ({_size(pair['bytes'])})"
        yield f"rank {pair['from']} to {pair['to']}: {latency} one way, {rate}"
    if len(facts["neighbours"]) > SLOWEST:
        yield f"these are the slowest of {len(facts['neighbours'])} pairs"


def _clocks(facts: Facts) -> Iterator[str]:
    step = facts["smallest_step_s"]
    seen = "unknown" if step is None else _time(step)
    yield f"monotonic: resolution {_time(facts['resolution_s'])}, smallest step seen {seen}"
    if facts["differences"] is None:
        yield "differences between ranks: unknown"
    else:
        far = sorted(facts["differences"], key=lambda one: -abs(one["ahead_s"]))[:SLOWEST]
        for one in far:
            apart = f"{_time(abs(one['ahead_s']))} {'ahead of' if one['ahead_s'] > 0 else 'behind'} rank 0"
            yield f"rank {one['rank']} is {apart}, give or take {_time(one['give_or_take_s'])}"


def _todo(lines: Sequence[str]) -> Iterator[str]:
    yield from lines or ["nothing: all that was looked at is in order"]


SLOWEST = 4
"""Lines about ranks that are shown."""
SECTIONS: dict[str, Callable[[Any], Iterator[str]]] = {
    "nodes": _nodes,
    "network": _network,
    "strategies": _strategies,
    "links": _links,
    "clocks": _clocks,
    "todo": _todo,
}


def _or(value: Any, none: str = "unknown") -> str:
    return none if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _switch(value: bool | None, on: str = "on", off: str = "off") -> str:
    return "unknown" if value is None else on if value else off


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / GIB:.1f} GiB"


def _rate(rate: float | None) -> str:
    return "unknown" if rate is None else f"{rate / 1e9:.3g} GB/s" if rate >= 1e8 else f"{rate / 1e6:.3g} MB/s"


def _size(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _span(one: Facts) -> str:
    low, high = one["seconds_iqr"]
    return f"{_time(one['seconds'])} ({_time(low)} to {_time(high)})"
