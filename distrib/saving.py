"""Writing a checkpoint while training goes on.

The engine's state is copied into memory, and one thread a rank hashes it, writes it and brings it to the disk. The
threads exchange nothing: the loop asks every rank, in the exchange it has before each step, whether its thread is done,
and then rank 0 writes the manifest, the marker with its hash, and gives the folder its name. A kill at any moment
leaves the checkpoint before as it was. Errors are noted where they happen and come up on all ranks alike.
"""

from __future__ import annotations

import gc
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
import xxhash

from distrib import checkpoint
from distrib.checkpoint import COMMITTED, LEFT, MANIFEST, Manifest
from distrib.contracts import Engine
from distrib.errors import UserError
from distrib.files import sync, why_not, write_all, write_text
from distrib.topology import Topology

T = TypeVar("T")
SMALL_BYTES = 2**16
"""Of which torch writes many: less than this goes to the disk together."""
CHUNK_BYTES = 2**26


class CopyBuffer:
    """Where a state is copied to, one at a time. It is kept for the next one: new memory has to be cleared by the
    kernel first, which takes as long as the copy."""

    def __init__(self) -> None:
        self._chunks: list[memoryview] = []
        self._used_bytes = 0

    def clear(self) -> None:
        self._used_bytes = 0

    def copied(self, data: memoryview) -> list[memoryview]:
        """The copy, which may lie in several chunks."""
        parts = []
        while data:
            index, begin = divmod(self._used_bytes, CHUNK_BYTES)
            if index == len(self._chunks):
                self._chunks.append(np.empty(CHUNK_BYTES, np.uint8).data)
            part = self._chunks[index][begin : begin + len(data)]
            part[:] = data[: len(part)]
            parts.append(part)
            data = data[len(part) :]
            self._used_bytes += len(part)
        return parts


@contextmanager
def uncollected() -> Iterator[None]:
    """Without a search for garbage: to plan a checkpoint makes many small objects, for which Python would look through
    all that a large program has, more than once."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Saving:
    """One checkpoint in the making. Every rank makes one, and ends it with `finish`, in the same steps."""

    def __init__(self, run: Path, engine: Engine, manifest: Manifest, buffer: CopyBuffer | None) -> None:
        """With `buffer`, in which nothing else is being saved, in the background."""
        self.engine = engine
        self.manifest = manifest
        self.final = run / "checkpoints" / f"step-{manifest.progress.step}"
        self.draft = self.final.with_name(f".{self.final.name}.draft")
        self.files: dict[str, dict[str, Any]] = {}
        self.why: str | None = None
        self._wanted_bytes: int | None = None
        self._thread: threading.Thread | None = None
        if buffer is not None:
            buffer.clear()
            held: dict[str, _Held] = {}
            with uncollected():
                engine.save(lambda name: held.setdefault(name, _Held(buffer)))
            self._thread = threading.Thread(target=self._write, args=(held,), daemon=True)
            self._thread.start()
        else:
            engine.save(self._create)

    @property
    def written(self) -> bool:
        """Whether this rank has done its part, well or not."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self, keep: int | None, keep_best: bool) -> str | None:
        """Waits for all ranks and commits; why there is no checkpoint, or None. Every rank calls it."""
        if self._thread:
            self._thread.join()
        everyone = _gathered(self.engine.topology, (self.files, self.why))
        why = next((why for _, why in everyone if why), None)
        if self.engine.topology.main:
            files = {name: entry for part, _ in everyone for name, entry in part.items()}
            if why is None:
                why = self._commit(replace(self.manifest, files=files), keep, keep_best)
            if why is not None:
                shutil.rmtree(self.draft, ignore_errors=True)
        return _gathered(self.engine.topology, why)[0]

    def note(self, error: Exception) -> None:
        if self.why is None:
            if isinstance(error, OSError):
                self.why = why_not(self.final.parent, error, self._wanted_bytes)
            else:
                self.why = f"cannot save: {error!r}"

    def _create(self, name: str) -> _File:
        return _File(self, f"engine/{name}")

    def _write(self, held: dict[str, _Held]) -> None:
        self._wanted_bytes = sum(file.tell() for file in held.values())
        try:
            for name, kept in held.items():
                with self._create(name) as file:
                    for part in kept.parts:
                        file.write(part)
        except Exception as error:
            self.note(error)

    def _commit(self, manifest: Manifest, keep: int | None, keep_best: bool) -> str | None:
        text = manifest.text()
        folder = self.final.parent
        try:
            write_text(self.draft / MANIFEST, text)
            write_text(self.draft / COMMITTED, checkpoint.digest(text.encode()))
            for place, _, _ in os.walk(self.draft):
                sync(Path(place))
            if self.final.exists():
                checkpoint.put_aside(self.final, LEFT)
            os.rename(self.draft, self.final)
            sync(folder)
            sync(folder.parent)
            _thin_out(folder.parent, keep, keep_best)
        except OSError as error:
            return why_not(folder, error)
        return None


def _thin_out(run: Path, keep: int | None, keep_best: bool) -> None:
    """After a commit alone, so that there always is one that is whole; the best one stays beside the last ones."""
    shutil.rmtree(run / "checkpoints" / LEFT, ignore_errors=True)
    found = checkpoint.checkpoints(run)
    stay = set(found[-keep:] if keep else found)
    if keep_best:
        stay.add(checkpoint.best(found) or found[-1])
    for old in found:
        if old not in stay:
            checkpoint.remove(old)


class _Held:
    """A file in memory, which outlives its closing."""

    def __init__(self, buffer: CopyBuffer) -> None:
        self.parts: list[memoryview] = []
        self._buffer = buffer
        self._bytes = 0

    def __enter__(self) -> _Held:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Of no use."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.parts += self._buffer.copied(view)
        self._bytes += len(view)
        return len(view)


class _File:
    """A file of a draft, hashed as it is written from its beginning to its end. An error is noted and the rest is
    dropped: what writes it may be a collective, which must end on all ranks."""

    def __init__(self, saving: Saving, name: str) -> None:
        self._saving = saving
        self._name = name
        self._bytes = 0
        self._hash = xxhash.xxh3_128()
        self._small = bytearray()
        self._file: io.FileIO | None = None
        path = saving.draft / name
        try:
            if saving.why is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: what could not be written is not tried again when it is closed.
                self._file = path.open("wb", buffering=0)
        except OSError as error:
            saving.note(error)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        """Of no use before the end."""

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        if len(self._small) + len(view) < SMALL_BYTES:
            self._small += view
        else:
            self._put(memoryview(bytes(self._small)))
            self._small.clear()
            self._put(view)
        return len(view)

    def close(self) -> None:
        self._put(memoryview(self._small))
        if self._file:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._give_up(self._file, error)
                return
            self._file.close()
            self._file = None
            self._saving.files[self._name] = {"bytes": self._bytes, "xxh3_128": self._hash.hexdigest()}

    def _put(self, view: memoryview) -> None:
        if self._file and view:
            self._hash.update(view)
            try:
                write_all(self._file, view)
            except OSError as error:
                self._give_up(self._file, error)

    def _give_up(self, file: io.FileIO, error: OSError) -> None:
        self._saving.note(error)
        with suppress(OSError):
            file.close()
        self._file = None


def _gathered(topology: Topology, mine: T) -> list[T]:
    if topology.world == 1:
        return [mine]
    everyone: list[Any] = [None] * topology.world
    dist.all_gather_object(everyone, mine)
    return everyone


def from_main(topology: Topology, find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank; its refusal too. Every rank calls it."""
    outcome: list[Any] = [None, None]
    if topology.main:
        try:
            outcome[0] = find()
        except UserError as error:
            outcome[1] = str(error)
    if topology.world > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    found: T = outcome[0]
    return found


def wait(engine: Engine) -> None:
    if engine.topology.world > 1:
        dist.barrier()
