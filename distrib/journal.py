"""The append-only files of a run, as `metrics.jsonl`: one JSON object a line, each with its `step`, without secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distrib.files import write_all, write_text, writing
from distrib.redaction import clean_texts


class Journal:
    """Appends lines; opening it at a step drops what a stopped run wrote after that step, or wrote half."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [line for line in read(path) if line["step"] <= step]
        with writing(path):
            if path.exists() or kept:
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            # Unbuffered: what could not be written is not tried again when it is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, line: dict[str, Any]) -> None:
        with writing(self._path):
            write_all(self._file, memoryview(json.dumps(clean_texts(line)).encode() + b"\n"))

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a last one that was cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
