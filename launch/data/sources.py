"""Where records come from: the standard library, text, JSON lines, parquet, folders of those, and the hub.

A record is a dict of columns. Records are always read as a stream, whatever the size of the set.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any

from distrib.errors import UserError
from distrib.redaction import one_line
from launch.data.additions import additions
from launch.recipe import BUILT_IN_SETS, Source

Record = dict[str, Any]
_PROSE = (".txt", ".text", ".md", ".rst", ".tex", ".html")
_CODE = (".py", ".c", ".h", ".cpp", ".cu", ".go", ".java", ".js", ".ts", ".rs", ".rb", ".sh", ".sql")
TEXT_SUFFIXES = _PROSE + _CODE
JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
DATA_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
PIECE_CHARACTERS = 1 << 20
LONGEST_CHARACTERS = 1 << 26
"""Of a line of JSON, and of a text in a row."""
LONGEST_LIST_CHARACTERS = 1 << 30
KINDS = ("json", "parquet")
"""What `datasets` may take a folder for; it also knows formats that run or fetch something."""
_NOT_LIBRARY = {
    "test",
    "tests",
    "idlelib",
    "turtledemo",
    "lib2to3",
    "ensurepip",
    "site-packages",
    "dist-packages",
}


@dataclass(frozen=True)
class Records:
    """One source: `read()` starts it from its beginning; `fingerprint` changes whenever its records may
    have."""

    name: str
    weight: float
    fingerprint: str
    read: Callable[[], Iterator[Record]]


def open_source(source: Source) -> Records:
    """Find a source by name: a built-in, then a path, then the hub."""
    path = Path(source.name).expanduser()
    if source.name in BUILT_IN_SETS:
        _only_whole(source, "a built-in set")
    if source.name == "additions":
        records = additions()
        return _records(source, json.dumps(records), lambda: iter(records))
    if source.name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [file for file in _files(root, (".py",)) if not _NOT_LIBRARY & set(file.relative_to(root).parts)]
        return _records(source, _stamp(root, files), lambda: _texts(files))
    if path.is_file():
        _only_whole(source, "a single file")
        return _file(source, path)
    if path.is_dir():
        return _folder(source, path)
    if looks_like_a_path(source.name):
        raise UserError(f"dataset={source.name!r}: no such file or folder; {_choices()}")
    return _hub(source)


def looks_like_a_path(name: str) -> bool:
    """Whatever is there; a hub name does not."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(_suffix(Path(name)))


def _choices() -> str:
    kinds = ", ".join(DATA_SUFFIXES)
    return f"choose {', '.join(BUILT_IN_SETS)}, a file or folder of text or data ({kinds}), or a hub name"


def _only_whole(source: Source, what: str) -> None:
    for key, value, default in (("split", source.split, "train"), ("subset", source.subset, None)):
        if value != default:
            raise UserError(f"dataset={source.name!r}: {key}={value!r}, but {what} has no {key}s; leave {key} out")
    if source.revision is not None:
        raise UserError(f"dataset={source.name!r}: revision={source.revision!r} is for hub names; leave it out")


def _records(source: Source, fingerprint: str, read: Callable[[], Iterator[Record]]) -> Records:
    def guarded() -> Iterator[Record]:
        try:
            yield from read()
        except Exception as error:  # of half a dozen libraries, about what they are given
            raise UserError(f"dataset={source.name!r} cannot be read: {_line(error)}") from None

    return Records(source.name, source.weight, fingerprint, guarded)


def _line(error: Exception) -> str:
    return one_line(error, 300) or type(error).__name__


def _suffix(path: Path) -> str:
    """The known suffix that the name ends with, or nothing."""
    return next((end for end in (*DATA_SUFFIXES, *TEXT_SUFFIXES) if path.name.lower().endswith(end)), "")


def _files(root: Path, suffixes: tuple[str, ...], without: Collection[str] = ()) -> list[Path]:
    """Every file under `root` that ends so, sorted by its path; neither hidden ones nor folders named in
    `without`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in without]
        shown = [name for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
        found += [Path(folder, name) for name in shown]
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _stamp(root: Path, files: list[Path]) -> str:
    """Names, sizes and times of change: content is not read, so a change that keeps all three goes unseen."""
    stats = [(file.relative_to(root).as_posix(), file.stat()) for file in files]
    return json.dumps([str(root.resolve()), *([name, s.st_size, s.st_mtime_ns] for name, s in stats)])


def _file(source: Source, path: Path) -> Records:
    stamp, suffix = _stamp(path.parent, [path]), _suffix(path)
    if suffix in JSON_SUFFIXES:
        return _records(source, stamp, lambda: _json(path))
    if suffix == ".parquet":
        return _records(source, stamp, lambda: _load("parquet", data_files=str(path)))
    if suffix in TEXT_SUFFIXES:
        return _records(source, stamp, lambda: _texts([path]))
    raise UserError(f"dataset={source.name!r}: {path.suffix or 'no suffix'!r} is no known kind of file; {_choices()}")


def _folder(source: Source, path: Path) -> Records:
    """A folder of data files is read with `datasets`, which finds its splits and subsets; else it is text."""
    data = _files(path, DATA_SUFFIXES)
    if data:
        stamp = json.dumps([_stamp(path, data), source.split, source.subset])
        return _records(source, stamp, lambda: _data_files(path, source))
    _only_whole(source, "a folder of text")
    texts = _files(path, TEXT_SUFFIXES)
    if not texts:
        raise UserError(f"dataset={source.name!r}: the folder holds no text and no data files; {_choices()}")
    return _records(source, _stamp(path, texts), lambda: _texts(texts))


def _data_files(path: Path, source: Source) -> Iterator[Record]:
    import datasets

    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    builder = datasets.load_dataset_builder(str(path), name=source.subset)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind not in KINDS:
        raise ValueError(
            f"the folder would be read as {kind}; name the file, or a folder of {' or '.join(KINDS)} alone"
        )
    for file in (str(file) for files in builder.config.data_files.values() for file in files):
        if not Path(os.path.normpath(file)).is_relative_to(path.resolve()):
            raise ValueError(f"its README.md names {file}, which is not in the folder")
    yield from map(dict, builder.as_streaming_dataset(split=source.split))


def _texts(files: list[Path]) -> Iterator[Record]:
    """One file, one document. A large one comes in pieces, cut at a line's end, that `begins` and `ends`
    tie."""
    for path in files:
        try:
            with path.open(encoding="utf-8-sig") as lines:
                piece, begins = _piece(lines), True
                while piece:
                    following = _piece(lines)
                    yield {"text": piece, "begins": begins, "ends": not following}
                    piece, begins = following, False
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def _piece(lines: IO[str]) -> str:
    text = lines.read(PIECE_CHARACTERS)
    return text + lines.readline(PIECE_CHARACTERS) if text else text


def _json(path: Path) -> Iterator[Record]:
    """One object a line; a file that starts with `[` is one list of them, and is read whole."""
    with (
        gzip.open(path, "rt", encoding="utf-8-sig")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8-sig") as lines
    ):
        listed = lines.read(1) == "["
        lines.seek(0)
        if listed:
            text = _bounded(lines.read, LONGEST_LIST_CHARACTERS, "the list")
            for number, item in enumerate(_parse(text, "the list"), start=1):
                yield _object(item, f"item {number}")
            return
        for number in count(1):
            line = _bounded(lines.readline, LONGEST_CHARACTERS, f"line {number}")
            if line.strip():
                yield _object(_parse(line, f"line {number}"), f"line {number}")
            elif not line:
                return


def _bounded(read: Callable[[int], str], most: int, where: str) -> str:
    text = read(most + 1)
    if len(text) > most:
        raise ValueError(f"{where} is longer than {most} characters; split it, one object a line")
    return text


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError(f"{where} is not data: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, must be an object with named columns")
    return value


def _load(path: str, **where: Any) -> Iterator[Record]:
    import datasets

    # Its exceptions end in our own line; its log would say them a second time.
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    loaded = datasets.load_dataset(path, **({"split": "train"} | where), streaming=True)
    for record in loaded:
        yield dict(record)


def _hub(source: Source) -> Records:
    """A set on the hub. Its fingerprint is the commit that the revision stands for now."""
    import datasets

    if source.name in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        # a reader of files, which would take all that it finds in the working directory
        raise UserError(f"dataset={source.name!r} is a kind of file, not a data set; {_choices()}")
    where = {"name": source.subset, "revision": source.revision}
    try:
        builder = datasets.load_dataset_builder(source.name, **where)
    except Exception as error:
        raise UserError(
            f"dataset={source.name!r}: no such file or folder, and not to be had from the hub "
            f"({_line(error)}); {_choices()}"
        ) from None
    stamp = json.dumps([source.name, source.subset, source.split, source.revision, builder.hash])
    return _records(source, stamp, lambda: _load(source.name, split=source.split, **where))
