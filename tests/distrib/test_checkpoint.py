"""Checkpoints that can be trusted: what is damaged is found and walked past, what cannot be written is said, and a kill
at any point of a save leaves the one before."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_cases as cases
import pytest
import torch
import xxhash
from checkpoint_cases import Canary, FakeEngine, Real, equal, files_up_to, plan, save
from ranks import Ranks

from distrib import checkpoint, saving
from distrib.checkpoint import COMMITTED, MANIFEST, Manifest, Progress, inspect, newest
from distrib.engines import storage
from distrib.errors import NotWritten, UserError
from distrib.files import write_text

MODES = pytest.mark.parametrize("background", [False, True])


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(run)]


def everything(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@MODES
def test_a_checkpoint_tells_what_was_saved(tmp_path: Path, background: bool) -> None:
    assert save(tmp_path, 3, background=background, eval_loss=0.5) is None
    folder = tmp_path / "checkpoints" / "step-3"
    assert (folder / "engine" / "zero" / "state").read_bytes() == b"abc"
    manifest = checkpoint.read_manifest(folder)
    assert manifest == Manifest(
        Progress(3, 30, 9, 8, 12),
        *(1, "ddp", 4),
        eval_loss=0.5,
        strategy=["plain"],
        versions={"torch": torch.__version__},
        files={
            f"engine/{name}": {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
            for name, data in FakeEngine().files.items()
        },
    )
    assert (folder / COMMITTED).read_text() == xxhash.xxh3_128_hexdigest((folder / MANIFEST).read_bytes())
    assert [path.name for path in folder.parent.iterdir()] == ["step-3"]
    assert newest(tmp_path) == (folder, [])


def test_the_newest_are_kept_in_the_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-9", "step-10", "step-100"]
    save(tmp_path, 101, keep=2)
    assert names(tmp_path) == ["step-100", "step-101"]


def test_the_best_is_kept_beside_the_last_ones(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 1.5)):
        save(tmp_path, step, keep=1, best=True, eval_loss=loss)
        assert f"step-{step}" in names(tmp_path)
    assert names(tmp_path) == ["step-2", "step-5"]
    save(tmp_path, 6, keep=1, best=True, eval_loss=1.0)
    assert names(tmp_path) == ["step-6"]


def spoil(folder: Path, name: str, change: Callable[[bytearray], Any]) -> None:
    data = bytearray((folder / name).read_bytes())
    change(data)
    (folder / name).write_bytes(data)


def unlink(folder: Path, name: str) -> None:
    (folder / name).unlink()


def stale(folder: Path, name: str) -> None:
    """Of another step, with the marker that belongs to it."""
    for file in (MANIFEST, COMMITTED):
        shutil.copy(folder.with_name("step-1") / file, folder / file)


WEIGHTS = "engine/weights"
DAMAGES: dict[str, tuple[str, Callable[[Path, str], Any], str]] = {
    "flip": (WEIGHTS, lambda f, n: spoil(f, n, lambda d: d.__setitem__(7, d[7] ^ 4)), "is not what was written"),
    "cut": (WEIGHTS, lambda f, n: spoil(f, n, lambda d: d.pop()), "has 99 bytes, 100 were written"),
    "missing": (WEIGHTS, unlink, "engine/weights is missing"),
    "no manifest": (MANIFEST, unlink, "manifest.json: No such file"),
    "no marker": (COMMITTED, unlink, "COMMITTED: No such file"),
    "manifest": (MANIFEST, lambda f, n: spoil(f, n, lambda d: d.append(10)), "not the one that was committed"),
    "marker": (COMMITTED, lambda f, n: spoil(f, n, lambda d: d.append(10)), "not the one that was committed"),
    "stale": (MANIFEST, stale, "that of step 1"),
    "extra": ("engine/more", lambda f, n: (f / n).write_text("x"), "engine/more is not one of its files"),
    "no hashes": (MANIFEST, lambda f, n: (f / n).write_text('{"progress": {}, "world": 1}'), "is no manifest"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_damaged_is_passed_over_with_the_reason(tmp_path: Path, kind: str) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    name, damage, said = DAMAGES[kind]
    folder = tmp_path / "checkpoints" / "step-2"
    damage(folder, name)
    found, notes = newest(tmp_path)
    assert found == folder.with_name("step-1")
    (note,) = notes
    assert note.startswith(f"{folder} is passed over: ")
    assert said in note
    with pytest.raises(UserError, match=r"step-2 is damaged: .*; choose another checkpoint$"):
        checkpoint.require(folder)
    shutil.rmtree(folder.with_name("step-1"))
    with pytest.raises(UserError, match=r"has no checkpoint that is whole \(.*step-2 is passed over") as caught:
        newest(tmp_path)
    assert "\n" not in str(caught.value)


def test_one_of_before_there_were_hashes_is_read_with_a_word(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints" / "step-1"
    (folder / COMMITTED).unlink()
    fields = json.loads((folder / MANIFEST).read_text())
    old = {name: fields[name] for name in ("progress", "world", "engine", "global_batch", "step")}
    (folder / MANIFEST).write_text(json.dumps(old))
    found, (note,) = newest(tmp_path)
    assert found == folder
    assert note == f"{folder} cannot be verified: it was written without hashes, by an older version"
    assert checkpoint.require(folder) == [note]


def test_nothing_is_lost_when_a_run_goes_back(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    unlink(folder / "step-6", MANIFEST)
    (folder / ".step-7.draft").mkdir()
    (folder / "step-6-mine").mkdir()
    checkpoint.drop_after(tmp_path, 2)
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-6-mine", "damaged", "left"}
    assert (folder / "damaged" / "step-6" / WEIGHTS).exists()
    assert inspect(folder / "left" / "step-4").state == "whole"
    save(tmp_path, 4)
    assert {path.name for path in folder.iterdir()} == {"step-2", "step-4", "step-6-mine", "damaged"}


def test_a_run_whose_checkpoints_were_all_put_aside_does_not_begin_anew(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    save(tmp_path, 2)
    checkpoint.put_aside(tmp_path / "checkpoints" / "step-2", checkpoint.DAMAGED)
    with pytest.raises(UserError, match=r"no checkpoint that is whole \(what was there is in .*damaged\)"):
        newest(tmp_path)


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with checkpoints after 2, 4 and 6."""
    run = tmp_path_factory.mktemp("trained")
    Real().run(plan(run, save_total_limit=None))
    return run


def copied(run: Path, target: Path) -> Path:
    shutil.copytree(run, target)
    return target / "checkpoints" / "step-6"


def assert_found(folder: Path, what: str) -> None:
    run = folder.parents[1]
    found, notes = newest(run)
    assert (found, len(notes)) == (folder.with_name("step-4"), 1), what


def test_500_flipped_bits_are_found(tmp_path: Path, trained: Path) -> None:
    folder, draw = copied(trained, tmp_path / "run"), random.Random(0)
    files = sorted(everything(folder))
    for number in range(500):
        name = files[number % len(files)]
        whole = (folder / name).read_bytes()
        bit = draw.randrange(8 * len(whole))
        spoil(folder, name, lambda data, bit=bit: data.__setitem__(bit // 8, data[bit // 8] ^ 1 << bit % 8))
        assert_found(folder, f"bit {bit} of {name}")
        (folder / name).write_bytes(whole)
    assert newest(folder.parents[1]) == (folder, [])


def test_200_truncations_and_every_missing_file_are_found(tmp_path: Path, trained: Path) -> None:
    folder, draw = copied(trained, tmp_path / "run"), random.Random(1)
    files = sorted(everything(folder))
    for number in range(200):
        name = files[number % len(files)]
        whole = (folder / name).read_bytes()
        length = draw.randrange(len(whole))
        (folder / name).write_bytes(whole[:length])
        assert_found(folder, f"{name} cut to {length} bytes")
        (folder / name).write_bytes(whole)
    for name in files:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        assert_found(folder, f"{name} missing")
        (folder / name).write_bytes(whole)
    assert newest(folder.parents[1]) == (folder, [])


def test_a_run_goes_on_from_the_one_before_and_ends_the_same(
    tmp_path: Path, trained: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ebbtide"), "propagate", True)
    folder = copied(trained, tmp_path / "run")
    spoil(folder, "engine/__0_0.distcp", lambda data: data.__setitem__(200, data[200] ^ 1))
    real, whole = Real(), Real()
    real.run(plan(folder.parents[1]))
    whole.run(plan(trained))
    assert equal(real.state(), whole.state())
    assert "step-6 is passed over: engine/__0_0.distcp is not what was written" in caplog.text
    assert names(folder.parents[1]) == ["step-4", "step-6"]
    assert inspect(folder.parent / "damaged" / "step-6").state == "damaged"


def test_a_run_without_a_whole_checkpoint_is_refused_and_left_as_it_is(tmp_path: Path, trained: Path) -> None:
    run = copied(trained, tmp_path / "run").parents[1]
    for folder in checkpoint.checkpoints(run):
        (folder / COMMITTED).unlink()
    before = everything(run)
    with pytest.raises(UserError, match="has no checkpoint that is whole"):
        Real().run(plan(run, steps=8))
    with pytest.raises(UserError, match="step-4 is damaged"):
        Real().run(plan(run, steps=8), chosen=run / "checkpoints" / "step-4")
    assert everything(run) == before


@MODES
def test_a_second_engine_reads_what_the_first_has_written(tmp_path: Path, background: bool) -> None:
    first, second = Real(), Real()
    first.run(plan(tmp_path, save_async=background))
    second.run(plan(tmp_path))
    assert equal(second.state(), first.state())


def test_a_slow_disk_does_not_hold_up_steps_and_saves_come_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first save ends when step 3 is made; the second waits until the first is whole."""
    free, real, said = threading.Event(), Real(), []
    write_all = saving.write_all
    monkeypatch.setattr(saving, "write_all", lambda *args: (free.wait(30), write_all(*args)))
    finish = saving.Saving.finish

    def finishing(self: saving.Saving, *args: Any) -> str | None:
        said.append(f"finish {self.manifest.progress.step}")
        return finish(self, *args)

    monkeypatch.setattr(saving.Saving, "finish", finishing)
    step = real.step

    def stepping(batches: Any, context: Any) -> Any:
        said.append(context.step)
        if context.step == 3:
            assert names(tmp_path) == []
            free.set()
        return step(batches, context)

    real.step = stepping  # type: ignore[method-assign]
    real.run(plan(tmp_path, steps=4))
    assert said[:4] == [0, 1, 2, 3]
    assert said[4:] == ["finish 2", "finish 4"]
    assert names(tmp_path) == ["step-2", "step-4"]


def test_what_is_saved_is_the_state_when_the_save_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of step 2 are written after two more steps."""
    free = threading.Event()
    write_all = saving.write_all
    monkeypatch.setattr(saving, "write_all", lambda *args: (free.wait(30), write_all(*args)))
    real = Real()
    step = real.step
    real.step = lambda batches, context: (free.set() if context.step == 3 else None, step(batches, context))[1]  # type: ignore[method-assign]
    real.run(plan(tmp_path / "late", steps=4))
    again, whole = Real(), Real()
    again.run(plan(tmp_path / "again", steps=2), chosen=tmp_path / "late" / "checkpoints" / "step-2")
    whole.run(plan(tmp_path / "whole", steps=2))
    assert equal(again.state(), whole.state())


def failing(name: str, number: int) -> Callable[..., Any]:
    """write_all, with an error for the file of this name."""
    write_all = saving.write_all

    def write(file: Any, data: Any) -> None:
        if Path(file.name).name == name:
            raise OSError(number, os.strerror(number))
        write_all(file, data)

    return write


@MODES
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("name", ["weights", "state"])
def test_an_error_of_the_disk_is_one_line_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int, background: bool
) -> None:
    save(tmp_path, 1, keep=1)
    before = everything(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(saving, "write_all", failing(name, number))
        why = save(tmp_path, 2, keep=1, background=background)
    assert why is not None
    assert why.startswith(f"cannot write to {tmp_path / 'checkpoints'}: {os.strerror(number)}")
    assert ("free)" in why) == (number == errno.ENOSPC)
    if background and number == errno.ENOSPC:
        assert "(103 B wanted, " in why
    assert everything(tmp_path) == before
    assert save(tmp_path, 2, keep=1) is None
    assert names(tmp_path) == ["step-2"]


@pytest.mark.parametrize("fails", ["rename", "manifest", "folder"])
def test_an_error_while_committing_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    save(tmp_path, 1)
    before = everything(tmp_path)

    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        target, name = {"rename": (os, "rename"), "manifest": (saving, "write_text"), "folder": (saving, "sync")}[fails]
        patched.setattr(target, name, broken)
        assert save(tmp_path, 2) == f"cannot write to {tmp_path / 'checkpoints'}: Input/output error"
    assert everything(tmp_path) == before


@MODES
def test_a_run_stops_or_goes_on_when_a_save_fails(tmp_path: Path, background: bool) -> None:
    made = plan(tmp_path / "stop", save_async=background)
    with files_up_to(5000), pytest.raises(NotWritten, match=r"^step 2 is not saved: .*File too large.* untouched$"):
        Real().run(made)
    assert names(made.run) == []
    assert not list((made.run / "checkpoints").glob(".*"))
    events = [json.loads(line) for line in (made.run / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "not saved", "stop"]
    going = plan(tmp_path / "go", save_async=background, on_save_error="continue")
    with files_up_to(5000):
        assert Real().run(going).step == cases.STEPS
    assert names(going.run) == []
    events = [json.loads(line) for line in (going.run / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events if event["event"] == "not saved"] == [
        *(("not saved", step) for step in (2, 4, 6))
    ]
    Real().run(made)
    assert names(made.run) == ["step-4", "step-6"]


def test_a_journal_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with files_up_to(600), pytest.raises(NotWritten, match=r"^cannot write to .*jsonl: File too large \(.* free\)$"):
        Real().run(plan(tmp_path, steps=40, save_steps=100))


def reseal(folder: Path) -> None:
    """As someone would who can write the folder: all hashes are those of what is there."""
    fields = json.loads((folder / MANIFEST).read_text())
    for name in fields["files"]:
        data = (folder / name).read_bytes()
        fields["files"][name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    text = json.dumps(fields)
    (folder / MANIFEST).write_text(text)
    (folder / COMMITTED).write_text(xxhash.xxh3_128_hexdigest(text.encode()))
    assert inspect(folder).state == "whole"


def plant(path: Path, canary: Path) -> None:
    """In the file as a whole or, in one of tensors, in the place of each."""
    if path.name.endswith(".distcp"):
        index = storage.Reader(str(path.parent)).read_metadata().storage_data
        assert index is not None
        data = bytearray(path.read_bytes())
        planted = pickle.dumps(Canary(canary), protocol=2)
        for place in index.values():
            if place.relative_path == path.name and place.length >= len(planted):
                data[place.offset : place.offset + len(planted)] = planted
        path.write_bytes(data)
    elif path.name == ".metadata":
        path.write_bytes(pickle.dumps(Canary(canary)))
    else:
        torch.save(Canary(canary), path)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_planted_pickle_does_not_run(tmp_path: Path, trained: Path, name: str) -> None:
    folder, canary = copied(trained, tmp_path / "run"), tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(canary)))
    canary.unlink()
    plant(folder / "engine" / name, canary)
    with pytest.raises(UserError, match=f"step-6 is damaged: engine/{name}"):
        Real().run(plan(folder.parents[1], steps=8), chosen=folder)
    reseal(folder)
    with pytest.raises(UserError, match=r"holds more than data, which is not loaded: .*system") as caught:
        Real().run(plan(folder.parents[1], steps=8), chosen=folder)
    assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_a_planted_pickle_does_not_run_under_zero(tmp_path: Path, two_ranks: Ranks) -> None:
    """In each file, read by two ranks, by one that reshards, and for an export."""
    said = two_ranks("checkpoint_cases:planted_under_zero", str(tmp_path))
    assert len(said[0]) == 3
    for line in [*said[0], *said[1]]:
        assert "holds more than data, which is not loaded" in line
        assert "\n" not in line
    assert not (tmp_path / "canary").exists()


def test_two_ranks_agree_on_what_is_whole_and_on_what_failed(tmp_path: Path, two_ranks: Ranks) -> None:
    for engine in ("fsdp2", "ddp"):
        first, second = two_ranks("checkpoint_cases:two_agree", str(tmp_path / engine), engine)
        assert first == second
        assert first["resumed"] == 2
        assert "step 4 is not saved: cannot write to" in first["failed"]
        assert "Input/output error" in first["failed"]
        assert first["left"] == ["damaged", "step-2"]
        assert "has no checkpoint that is whole" in first["refused"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["background", "blocking"])
def test_a_kill_at_every_point_of_a_save(tmp_path: Path, mode: str) -> None:
    here = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    words = [sys.executable, cases.__file__, str(tmp_path), mode]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["points"] == told["killed"] == told["same"] > 60
    # A save that is being written when the kill comes is lost, and with it the steps made meanwhile.
    assert max(told["lost"]) <= cases.INTERVAL * (2 if mode == "background" else 1)


@pytest.mark.slow
@MODES
def test_a_disk_that_is_full_at_any_size(tmp_path: Path, background: bool) -> None:
    """A file system of its own, smaller by a page each time."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", disk, "-o", "size=4m"], capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        engine = FakeEngine({f"file-{number}": bytes(4000 + number) for number in range(8)})
        save(disk, 1, engine=engine)
        before, failed = everything(disk), 0
        for pages in range(0, 26):
            space = os.statvfs(disk)
            filler = disk / "filler"
            filler.write_bytes(bytes((space.f_bavail - pages) * space.f_frsize))
            why = save(disk, 2, keep=2, background=background, engine=engine)
            filler.unlink()
            if why is None:
                break
            failed += 1
            assert "No space left on device (" in why
            assert everything(disk) == before
        assert failed >= 8
        assert names(disk) == ["step-1", "step-2"]
        assert newest(disk)[1] == []
    finally:
        subprocess.run(["umount", disk], check=True)
