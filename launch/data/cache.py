"""Tokenised rows on disk, built once and reused until something that they depend on changes.

The rows of one data set lie in a folder named by the hash of all that they depend on, as flat arrays that are
memory-mapped: a run holds no data set in memory, and the ranks of one machine share the pages.

    tokens   int32    of all sequences, end to end
    learned  bool     one a token
    lines    int64    where each sequence begins in `tokens`, and the end
    rows     int64    where each row begins in `lines`, and the end
    rewards  float64  one a sequence
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distrib.errors import UserError
from launch.data.rows import Row, Sequence, Tally

FORMAT = 1
"""Part of the hash: a change to how rows are made or stored must raise it."""

ARRAYS = {"tokens": np.int32, "learned": np.bool_, "lines": np.int64, "rows": np.int64, "rewards": np.float64}


@dataclass(frozen=True)
class Stored:
    """The rows of one data set, read from disk as they are asked for."""

    folder: Path
    summary: dict[str, Any]

    def __len__(self) -> int:
        return len(self._arrays["rows"]) - 1

    def __getitem__(self, index: int) -> Row:
        arrays = self._arrays
        first, last = (int(arrays["rows"][i]) for i in (index, index + 1))
        return tuple(self._sequence(line) for line in range(first, last))

    def _sequence(self, line: int) -> Sequence:
        arrays = self._arrays
        span = slice(int(arrays["lines"][line]), int(arrays["lines"][line + 1]))
        return Sequence(
            np.array(arrays["tokens"][span]),
            np.array(arrays["learned"][span]),
            float(arrays["rewards"][line]),
        )

    @cached_property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: np.memmap(self.folder / name, kind, mode="r") for name, kind in ARRAYS.items()}

    def sizes(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of every row: its sequences, the tokens of the longest one, and of all of them."""
        lines, rows = self._arrays["lines"], self._arrays["rows"]
        longest = np.maximum.reduceat(np.diff(lines), rows[:-1])
        return np.diff(rows), longest, lines[rows[1:]] - lines[rows[:-1]]


def cache_root() -> Path:
    return Path(os.environ.get("EBBTIDE_CACHE") or Path.home() / ".cache" / "ebbtide").expanduser()


def stored_rows(name: str, depends_on: dict[str, Any], build: Callable[[Tally], Iterator[Row]]) -> Stored:
    """The rows that `build` makes, from the cache when it has them.

    Processes that want the same rows at the same time wait for the one that builds them; this takes a
    file lock and no process group. Rows are built under another name and renamed when complete, so a
    killed build is never read.
    """
    import filelock

    key = hashlib.sha256(json.dumps([FORMAT, depends_on], sort_keys=True).encode()).hexdigest()[:32]
    root = cache_root()
    try:
        found = _complete(root / key)
        if found is None:
            root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(root / f"{key}.lock"):
                found = _complete(root / key) or _build(name, root / key, build)
    except OSError as error:
        raise UserError(
            f"EBBTIDE_CACHE={str(root)!r} cannot be written ({error.strerror or error}); set EBBTIDE_CACHE "
            "to a folder with space"
        ) from None
    return found


def _complete(folder: Path) -> Stored | None:
    """The stored rows, if they are all there: the summary is written last and holds every array's size."""
    try:
        written = json.loads((folder / "summary.json").read_text())
        if all((folder / array).stat().st_size == size for array, size in written["bytes"].items()):
            return Stored(folder, written["summary"])
    except (OSError, ValueError, KeyError):
        return None
    return None


def _build(name: str, folder: Path, build: Callable[[Tally], Iterator[Row]]) -> Stored:
    partial = folder.with_suffix(".partial")
    for leftover in (partial, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    print(f"data: tokenising {name}", file=sys.stderr)
    try:
        tally = Tally()
        summary = {"name": name, **_write(partial, build(tally)), **vars(tally)}
        if not summary["rows"]:
            raise UserError(
                f"dataset={name!r} has no loss tokens: nothing is learned in its {tally.dropped} samples "
                f"({tally.truncated} were cut at max_length); add completions or texts, or raise max_length"
            )
        sizes = {array: (partial / array).stat().st_size for array in ARRAYS}
        (partial / "summary.json").write_text(json.dumps({"summary": summary, "bytes": sizes}))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Stored(folder, summary)


def _write(folder: Path, rows: Iterator[Row]) -> dict[str, int]:
    """Append every row to the arrays; how many rows, sequences, tokens and learned tokens there were."""
    from tqdm import tqdm

    counts = {"rows": 0, "sequences": 0, "tokens": 0, "learned": 0}
    with ExitStack() as stack:
        files = {array: stack.enter_context((folder / array).open("wb")) for array in ARRAYS}

        def append(array: str, values: Any) -> None:
            files[array].write(np.asarray(values, dtype=ARRAYS[array]).tobytes())

        append("lines", 0)
        append("rows", 0)
        # disable=None: the bar is shown on a terminal alone.
        for row in tqdm(rows, unit=" rows", disable=None, leave=False, file=sys.stderr):
            for sequence in row:
                counts["tokens"] += len(sequence.tokens)
                counts["learned"] += int(sequence.learned.sum())
                append("tokens", sequence.tokens)
                append("learned", sequence.learned)
                append("rewards", sequence.reward)
                append("lines", counts["tokens"])
            counts["sequences"] += len(row)
            counts["rows"] += 1
            append("rows", counts["sequences"])
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return counts
