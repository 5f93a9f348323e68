"""A plan as a table, and as a recipe that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distrib.errors import UserError
from distrib.files import write_text
from distrib.trace import CLASSES
from launch.plan_pipeline import CLASSES as PIPELINE_CLASSES
from launch.recipe import Recipe
from launch.recipe_file import dump_recipe

GIB = 2**30


def show(result: dict[str, Any]) -> None:
    if "pipeline" in result:
        _show_pipeline(result)
        return
    device, speed = result["device"], result["flops_per_s"]
    print(
        f"{result['model']}, {result['max_length']} tokens, on {device['count']} x {device['type']} with "
        f"{device['memory_bytes'] / GIB:.1f} GiB, {device['usable_bytes'] / GIB:.1f} of it to use; GiB a device:"
    )
    head = ["strategy", "engine", *CLASSES, "total", "", "longest", "tokens/s"]
    lines = [head, *(_cells(row) for row in result["rows"] if "bytes" in row)]
    print_table(lines, left=2)
    for row in result["rows"]:
        if "why" in row:
            print(f"{row['strategy']} ({row['engine']}) is {row['status']}: {row['why']}")
    rate = f"{speed / 1e12:.3g} TFLOP/s, {result['flops_source']}; forward and backward alone" if speed else "not known"
    print(f"speed: {rate}" if speed else f"speed: {rate} of a device that is elsewhere; give device.flops, as 400T")
    advice = result["recommendation"]
    chosen = f"{advice['strategy']} ({advice['engine']}), {advice['max_length']} tokens: " if advice["strategy"] else ""
    print(f"recommended: {chosen}{advice['reason']}")


def print_table(lines: list[list[str]], left: int) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line[:left], widths[:left], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(line[left:], widths[left:], strict=True)]
        print("  ".join(cells).rstrip())


def _show_pipeline(result: dict[str, Any]) -> None:
    device, pipeline, advice = result["device"], result["pipeline"], result["recommendation"]
    print(
        f"{result['model']}, {result['max_length']} tokens, a pipeline of {pipeline['ranks']} x {device['type']} with "
        f"{device['memory_bytes'] / GIB:.1f} GiB, {device['usable_bytes'] / GIB:.1f} of it to use"
        + (f", {pipeline['replicas']} times" if pipeline["replicas"] > 1 else "")
    )
    rows = result["rows"] + result["more_micro_batches"]
    # Tiny models are tried first.
    size, unit = (GIB, "GiB") if max((row.get("peak_bytes", 0) for row in rows), default=0) >= GIB else (2**20, "MiB")
    print(f"global batch {pipeline['global_batch']}; {unit} of the rank that holds most")
    head = [
        "schedule",
        "micro-batches",
        *PIPELINE_CLASSES,
        "total",
        "",
        "step",
        "idle",
        "x 1f1b",
        "x 1 device",
        "tokens/s",
    ]
    print_table(
        [head, *(_pipeline_cells(row, pipeline["global_batch"], size) for row in rows if "ranks" in row)], left=2
    )
    for row in result["rows"]:
        if "why" in row:
            print(f"{row['schedule']} is {row['status']}: {row['why']}")
    link = pipeline["link_bytes_per_s"]
    transfer = f"{pipeline['transfer_bytes'] / 2**20:.1f} MiB between stages"
    transfer += f" at {link / 1e9:g} GB/s" if link else ", counted as no time; give device.link, as 25GB a second"
    costs = pipeline["costs"][0]
    if costs["layers"] is None:
        print(f"speed: not known of a device that is elsewhere; {transfer}")
    else:
        parts = [("first layer with the embedding", 0), ("last with the head", -1)]
        inner = costs["layers"][1:-1]
        parts += [(f"layer {index + 2}", index + 1) for index, one in enumerate(inner) if one not in inner[:index]]
        said = "; ".join(f"{name} {_triple(costs['layers'][index])}" for name, index in parts)
        print(f"timed here, ms of forward, p1, p2: {said}")
        print(f"steps are simulated from that: no optimizer, no exchange of gradients, no data; {transfer}")
    layers = f", layers {advice['layers']}, {_micro_batches(advice)}" if advice["schedule"] else ""
    print(f"recommended: {advice['schedule'] or 'none'}{layers}: {advice['reason']}")


def _triple(seconds: list[float]) -> str:
    return " + ".join(f"{1000 * one:.3g}" for one in seconds)


def _micro_batches(row: dict[str, Any]) -> str:
    return f"{row['micro_batches']} of {row['rows']}"


def _pipeline_cells(row: dict[str, Any], global_batch: int, size: int) -> list[str]:
    peak = max(row["ranks"], key=lambda one: sum(one.values()))
    memory = [f"{peak[name] / size:.2f}" for name in PIPELINE_CLASSES]
    speed = ["-"] * 5
    if row["seconds"] is not None:
        speed = [f"{row['seconds']:.3g} s", f"{100 * row['bubble']:.0f}%", f"{row['speedup_1f1b']:.2f}"]
        speed += [f"{row['speedup_device']:.2f}", f"{row['tokens_per_s']:.0f}"]
    other = "" if row["global_batch"] == global_batch else f" (batch {row['global_batch']})"
    return [
        row["schedule"],
        _micro_batches(row) + other,
        *memory,
        f"{row['peak_bytes'] / size:.2f}",
        row["status"],
        *speed,
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    speed = "-" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.0f}"
    memory = [f"{row['bytes'][name] / GIB:.2f}" for name in CLASSES]
    mark = "" if row["fidelity"] == "exact" else f" ({row['fidelity']})"
    longest = f"{row['max_length']}{'*' if row['limit'] == 'model' else ''}"
    total = f"{row['total_bytes'] / GIB:.2f}"
    return [row["strategy"] + mark, row["engine"], *memory, total, row["status"], longest, speed]


def check_fit(file: Path) -> None:
    """Before anything is counted."""
    if file.exists():
        raise UserError(f"--fit {file}: is there already; name another file")
    if _schedule_file(file).exists():
        raise UserError(f"--fit {file}: {_schedule_file(file)} is there already; name another file")
    if not file.parent.is_dir():
        raise UserError(f"--fit {file}: {file.parent} is not a folder")


def _schedule_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}.schedule")


def write_fit(file: Path, recipe: Recipe, result: dict[str, Any]) -> None:
    """The recipe with what is recommended; a schedule that has no name stands beside it."""
    changes = result["recommendation"]["recipe"]
    if changes is None:
        raise UserError(f"--fit {file}: {result['recommendation']['reason']}")
    if text := result["recommendation"].get("text"):
        path = _schedule_file(file).resolve()
        write_text(path, text)
        first, *others = changes["strategy"]
        changes = changes | {"strategy": [first | {"schedule": str(path)}, *others]}
    whole = recipe.model_dump(exclude_unset=True) | changes
    write_text(file, dump_recipe(Recipe.model_validate(whole)))
