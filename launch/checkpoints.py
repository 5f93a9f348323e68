"""`ebbtide checkpoint`: what a run has, whether it is whole, and putting aside what is not. It loads nothing."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distrib import checkpoint
from distrib.errors import UserError
from distrib.files import size, writing


def verify(run: Path) -> dict[str, Any]:
    """Every file of every checkpoint is read."""
    verdicts = {path: checkpoint.inspect(path) for path in _all(run)}
    # A run that goes on may have removed some meanwhile.
    rows = [{"checkpoint": str(path), **asdict(verdict)} for path, verdict in verdicts.items() if path.exists()]
    return {"run": str(run), "checkpoints": rows, "newest": rows[-1]["state"]}


def listed(run: Path) -> dict[str, Any]:
    """As far as names and sizes tell."""
    found = _all(run)
    best = checkpoint.best(found)
    rows = []
    for path in found:
        verdict = checkpoint.inspect(path, hashes=False)
        known = verdict.state != "damaged"
        manifest = checkpoint.read_manifest(path) if known else None
        rows.append(
            {
                "step": checkpoint.step_of(path),
                "state": verdict.state,
                "bytes": sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir()),
                "time": manifest and manifest.time,
                "eval_loss": manifest and manifest.eval_loss,
                "best": path == best,
                "why": verdict.why,
            }
        )
    return {"run": str(run), "checkpoints": rows}


def repair(run: Path) -> dict[str, Any]:
    """Nothing is deleted but what was never finished."""
    with writing(run):
        drafts = checkpoint.remove_drafts(run)
        moved = [
            str(checkpoint.put_aside(path, checkpoint.DAMAGED))
            for path in checkpoint.checkpoints(run)
            if checkpoint.inspect(path).state == "damaged"
        ]
    return {"run": str(run), "moved": moved, "drafts_removed": [str(path) for path in drafts]}


def _all(run: Path) -> list[Path]:
    if not (found := checkpoint.checkpoints(run)):
        raise UserError(f"{run} has no checkpoint: give the output_dir of a recipe that was trained")
    return found


def said(action: str, result: dict[str, Any]) -> str:
    match action:
        case "verify":
            lines = [f"{row['checkpoint']}: {_state(row)}" for row in result["checkpoints"]]
        case "list":
            lines = [_line(row) for row in result["checkpoints"]]
        case _:
            lines = [f"put aside: {path}" for path in result["moved"]]
            lines += [f"removed, never finished: {path}" for path in result["drafts_removed"]]
    return "\n".join(lines or ["nothing to repair"])


def _state(row: dict[str, Any]) -> str:
    return row["state"] if row["why"] is None else f"{row['state']}: {row['why']}"


def _line(row: dict[str, Any]) -> str:
    when = "unknown" if row["time"] is None else f"{datetime.fromtimestamp(row['time'], UTC):%Y-%m-%d %H:%M:%S UTC}"
    loss = "unknown" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
    best = "  best" if row["best"] else ""
    state = "" if row["state"] == "whole" else f"  {_state(row)}"
    return f"step {row['step']}  {size(row['bytes'])}  {when}  held-out loss {loss}{best}{state}"
