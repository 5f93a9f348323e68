"""Files that are whole or not there, and what stops their writing in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from distrib.errors import NotWritten


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, and on the disk."""
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    sync(path.parent)


def write_all(file: FileIO, data: memoryview) -> None:
    """A disk that fills up takes a part, and refuses the next."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A disk that is full, read-only, gone or broken ends the run in one line."""
    try:
        yield
    except Exception as error:
        # What is written by Rust, as safetensors are, says it in words alone.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError):
            told = error
        elif number:
            told = OSError(int(number[1]), os.strerror(int(number[1])))
        else:
            raise
        raise NotWritten(why_not(folder, told)) from None


def why_not(folder: Path, error: OSError, wanted_bytes: int | None = None) -> str:
    said = f"cannot write to {folder}: {error.strerror or error}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return said
    with suppress(OSError):
        free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
        wanted = f"{size(wanted_bytes)} wanted, " if wanted_bytes else ""
        return f"{said} ({wanted}{size(free)} free)"
    return said


def size(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
