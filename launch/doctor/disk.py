"""The file system that a run would write to: what it is, what is free, how fast it takes and gives."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distrib.errors import UserError
from launch.run_folder import refuse_unusable

MOUNTS = Path("/proc/self/mountinfo")
NETWORK = set("nfs nfs4 lustre gpfs beegfs ceph cifs smb3 smbfs 9p virtiofs glusterfs afs".split())  # noqa: SIM905
MEMORY = {"tmpfs", "ramfs"}
BYTES, PIECE = 64 * 2**20, 4 * 2**20
LONGEST_S = 3.0
LITTLE = 10 * 2**30
Facts = dict[str, Any]


def look(folder: Path) -> Facts:
    """Of the folder itself or, before it is made, of where it would be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(path))
    kind = _kind(there)
    found: Facts = {
        "file_system": kind,
        "on": _on(kind),
        "why": f"{MOUNTS} does not tell" if kind is None else None,
        "free_bytes": _free(there),
    }
    try:
        refuse_unusable(folder)
        return found | _rates(there) | {"unusable": None}
    except UserError as error:
        why = str(error)
    except OSError as error:
        why = f"cannot be written: {error.strerror or error}"
    return found | dict.fromkeys(("bytes", "write_bytes_per_s", "read_bytes_per_s")) | {"unusable": why}


def _kind(folder: Path) -> str | None:
    """The type of what is mounted nearest above."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return None
    mounts = list(_mounted(lines))
    above = {str(path) for path in (folder.resolve(), *folder.resolve().parents)}
    inside = [(len(point), index, kind) for index, (point, kind) in enumerate(mounts) if point in above]
    return max(inside)[2] if inside else None


def _mounted(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(point, type) of lines such as `36 35 98:0 / /mnt rw,noatime shared:1 - ext3 /dev/root rw`."""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        yield point, after.split()[0]


def _on(kind: str | None) -> str | None:
    if kind is None:
        return None
    if kind in NETWORK or (kind.startswith("fuse.") and kind != "fuse.overlayfs"):
        return "network"
    return "memory" if kind in MEMORY else "this machine"


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _rates(folder: Path) -> Facts:
    """Of a file without a name, gone with this process however it ends; numbers at random, so that nothing is saved by
    packing them."""
    piece = os.urandom(PIECE)
    with tempfile.TemporaryFile(dir=folder, prefix="ebbtide-") as file:
        descriptor = file.fileno()
        start, written = time.perf_counter(), 0
        while written < BYTES and time.perf_counter() - start < LONGEST_S:
            written += os.write(descriptor, piece)
        os.fsync(descriptor)
        write_s = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        start, read = time.perf_counter(), 0
        while time.perf_counter() - start < LONGEST_S and (got := len(os.read(descriptor, PIECE))):
            read += got
        read_s = time.perf_counter() - start
    return {"bytes": written, "write_bytes_per_s": written / write_s, "read_bytes_per_s": read / read_s}


def problems(found: Facts) -> list[str]:
    said = []
    if found["unusable"]:
        said.append(found["unusable"])
    elif found["on"] == "memory":
        said.append("the output folder is in memory: checkpoints take it from the run and are gone after a restart")
    if found["free_bytes"] is not None and found["free_bytes"] < LITTLE:
        said.append(f"{found['free_bytes'] / 2**30:.1f} GiB are free where checkpoints go: see save_total_limit")
    return said
