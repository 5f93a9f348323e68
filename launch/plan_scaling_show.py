"""A plan over nodes as a table."""

from __future__ import annotations

from typing import Any

from launch.plan_show import GIB, print_table

HEAD = (
    *("strategy", "engine", "nodes", "devices", "batch", "GiB", "", "sent MB", "compute", "exposed", "hidden"),
    *("idle", "optimizer", "step", "tokens/s", "efficiency", "J/token"),
)


def show(result: dict[str, Any]) -> None:
    device, rows = result["device"], result["rows"]
    print(
        f"{result['model']}, {result['max_length']} tokens, on nodes of {device['count']} x {device['type']} with "
        f"{device['memory_bytes'] / GIB:.1f} GiB, {device['usable_bytes'] / GIB:.1f} of it to use; GiB and MB sent are "
        "a device's, times a step's"
    )
    if lines := [_cells(row) for row in rows if "bytes" in row]:
        print_table([list(HEAD), *lines], left=2)
    for row in rows:
        if "why" in row:
            print(f"{row['strategy']} ({row['engine']}) on {row['nodes']} is {row['status']}: {row['why']}")
    for line in _sources(result):
        print(line)


def _sources(result: dict[str, Any]) -> list[str]:
    """Where times come from, and what is missing for them."""
    links, device = result["links"], result["device"]
    within = [name for name in ("bytes_per_s", "latency_s") if links[name] is None]
    between = [name for name in ("node_bytes_per_s", "node_latency_s") if links[name] is None]
    lines = []
    if within and device["count"] > 1:
        lines.append("links within a node are not known: give device.link=450GB device.latency=5us")
    if between and any(row["nodes"] > 1 for row in result["rows"]):
        lines.append("links between nodes are not known: give device.node_link=50GB device.node_latency=15us")
    source = result["compute_source"]
    if source is None:
        lines.append("computing is not known of a device that is elsewhere: give device.flops, as 400T that it reaches")
    else:
        crowding = result["crowding"]
        shared = f", times {crowding:.2g} as the ranks of a node share its cores" if crowding and crowding > 1 else ""
        lines.append(f"computing: {'device.flops' if source == 'given' else 'layers timed here' + shared}")
    if any("step_s" in row and row["step_s"] and row["optimizer_s"] is None for row in result["rows"]):
        lines.append("the optimizer is timed on the device itself, and in no step here")
    if result["power_w"] is None:
        lines.append("energy is not known: give device.power=700W, what a device takes while it trains")
    lines.append("this is arithmetic on measured or stated rates: nothing of this size was run")
    return lines


def _cells(row: dict[str, Any]) -> list[str]:
    stages = row["stages"]
    place = f" ({stages['count']} stages{', across nodes' if stages['across_nodes'] else ''})" if stages else ""
    speed, efficiency, joules = row["tokens_per_s"], row["efficiency"], row["joules_per_token"]
    return [
        row["strategy"] + place,
        row["engine"],
        str(row["nodes"]),
        str(row["devices"]),
        str(row["global_batch"]),
        f"{row['total_bytes'] / GIB:.2f}",
        row["status"],
        f"{sum(row['sent_bytes'].values()) / 1e6:.1f}",
        *(_seconds(row[f"{name}_s"]) for name in ("compute", "exposed", "hidden", "idle", "optimizer", "step")),
        "-" if speed is None else f"{speed:.0f}",
        "-" if efficiency is None else f"{100 * efficiency:.0f}%",
        "-" if joules is None else f"{joules:.3g}",
    ]


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"
