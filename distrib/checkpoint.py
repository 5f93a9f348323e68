"""Checkpoints of a run: `checkpoints/step-N/`, which a reader believes only as far as it can verify them.

`manifest.json` names every file with its size and hash, and `COMMITTED` holds the hash of that manifest: a flipped bit,
a file cut short, missing, too many or of another step is found before anything is loaded. A reader walks back to the
newest one that is whole. The position in the data and all randomness follow from the step, so beside the engine's state
there is little to keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import xxhash

from distrib.errors import UserError

MANIFEST = "manifest.json"
COMMITTED = "COMMITTED"
DAMAGED = "damaged"
LEFT = "left"
"""Folders beside the checkpoints: those that are not whole, which nobody deletes, and those of a course that the run
has left, which go with the next one that is committed."""
CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Progress:
    """What is known of a run after `step` optimizer steps, over all ranks."""

    step: int = 0
    tokens: int = 0
    nonpad_tokens: int = 0
    loss_tokens: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Manifest:
    progress: Progress
    world: int
    engine: str
    global_batch: int
    step: dict[str, Any] = field(default_factory=dict)
    """What the step must know to go on as it would have."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What is known of steps that went wrong."""
    eval_loss: float | None = None
    """Held out, where this very step was evaluated."""
    time: float | None = None
    strategy: list[str] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of each file `bytes` and `xxh3_128`."""

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1)


@dataclass(frozen=True)
class Verdict:
    """`unverifiable` is one of before there were hashes: all that can be said of it is that it was finished."""

    state: Literal["whole", "unverifiable", "damaged"]
    why: str | None = None


def checkpoints(run: Path) -> list[Path]:
    """All that stand there as checkpoints, oldest first, whole or not."""
    found = (path for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    return sorted((path for path in found if re.fullmatch(r"step-\d+", path.name)), key=step_of)


def exists(run: Path, step: int) -> bool:
    return (run / "checkpoints" / f"step-{step}" / MANIFEST).exists()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def read_manifest(checkpoint: Path) -> Manifest:
    try:
        return _parse((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{checkpoint} is not a checkpoint that can be read: {error}") from None


def _parse(text: bytes) -> Manifest:
    try:
        fields = json.loads(text)
        return Manifest(**fields | {"progress": Progress(**fields["progress"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{MANIFEST} is no manifest: {error}") from None


def inspect(checkpoint: Path, hashes: bool = True) -> Verdict:
    """Whether all is there that was written, and nothing else; without `hashes`, as far as names and sizes tell."""
    try:
        return _inspect(checkpoint, hashes)
    except OSError as error:
        return Verdict("damaged", f"{Path(error.filename or checkpoint).name}: {error.strerror}")
    except ValueError as error:
        return Verdict("damaged", str(error))


def _inspect(checkpoint: Path, hashes: bool) -> Verdict:
    text = (checkpoint / MANIFEST).read_bytes()
    manifest = _parse(text)
    marker = checkpoint / COMMITTED
    if not manifest.files and not marker.exists():
        return Verdict("unverifiable", "it was written without hashes, by an older version")
    if marker.read_bytes() != digest(text).encode():
        raise ValueError(f"{MANIFEST} is not the one that was committed")
    step = manifest.progress.step
    if re.fullmatch(r"step-\d+", checkpoint.name) and step != step_of(checkpoint):
        raise ValueError(f"{MANIFEST} is that of step {step}")
    found = _files(checkpoint) - {MANIFEST, COMMITTED}
    if missing := sorted(manifest.files.keys() - found):
        raise ValueError(f"{missing[0]} is missing")
    if extra := sorted(found - manifest.files.keys()):
        raise ValueError(f"{extra[0]} is not one of its files")
    for name, entry in manifest.files.items():
        path = checkpoint / name
        if (size := path.stat().st_size) != entry["bytes"]:
            raise ValueError(f"{name} has {size} bytes, {entry['bytes']} were written")
        if hashes and _digest_of(path) != entry["xxh3_128"]:
            raise ValueError(f"{name} is not what was written")
    return Verdict("whole")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _digest_of(path: Path) -> str:
    seen = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            seen.update(chunk)
    return seen.hexdigest()


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what there is to say of those before it was reached; none in a run that
    has not saved."""
    notes: list[str] = []
    for path in reversed(checkpoints(run)):
        verdict = inspect(path)
        if verdict.state == "whole":
            return path, notes
        if verdict.state == "unverifiable":
            return path, [*notes, f"{path} cannot be verified: {verdict.why}"]
        notes.append(f"{path} is passed over: {verdict.why}")
    aside = run / "checkpoints" / DAMAGED
    if notes or (aside.is_dir() and any(aside.iterdir())):
        seen = notes[0] if notes else f"what was there is in {aside}"
        raise UserError(
            f"{run} has no checkpoint that is whole ({seen}): restore one, or name another output_dir to begin anew"
        )
    return None, []


def require(checkpoint: Path) -> list[str]:
    """What there is to say of a checkpoint that somebody chose; a damaged one is refused."""
    verdict = inspect(checkpoint)
    if verdict.state == "damaged":
        raise UserError(f"{checkpoint} is damaged: {verdict.why}; choose another checkpoint")
    return [f"{checkpoint} cannot be verified: {verdict.why}"] if verdict.state == "unverifiable" else []


def best(found: list[Path]) -> Path | None:
    """The one with the lowest held-out loss, the newest of equals."""
    losses: dict[Path, float] = {}
    for path in found:
        with suppress(UserError):
            if (loss := read_manifest(path).eval_loss) is not None:
                losses[path] = loss
    return min(reversed(losses), key=losses.__getitem__, default=None)


def drop_after(run: Path, step: int) -> None:
    """Put aside the checkpoints of steps that are about to be trained again, and remove what kills left half written.

    They belong to a course that the run has left; where they are, the next start would go on from them.
    """
    remove_drafts(run)
    for later in checkpoints(run):
        if step_of(later) > step:
            put_aside(later, DAMAGED if inspect(later).state == "damaged" else LEFT)


def remove_drafts(run: Path) -> list[Path]:
    drafts = list((run / "checkpoints").glob(".step-*.draft"))
    for draft in drafts:
        shutil.rmtree(draft)
    return drafts


def put_aside(checkpoint: Path, name: str) -> Path:
    folder = checkpoint.parent / name
    folder.mkdir(exist_ok=True)
    place = folder / checkpoint.name
    count = 1
    while place.exists():
        count += 1
        place = folder / f"{checkpoint.name}-{count}"
    checkpoint.rename(place)
    return place


def remove(checkpoint: Path) -> None:
    """At once under another name: half removed, it would look damaged. What is left of it goes with the next start."""
    gone = checkpoint.with_name(f".{checkpoint.name}.draft")
    os.rename(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)
