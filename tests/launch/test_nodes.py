"""Several machines: the entry of the images on two network namespaces, a cable that is cut, what stays of the ranks'
words, and the names that clusters give to all this."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from netns import ADDRESSES, CABLE, Run, ip, two_machines
from rank_faults import ROOT, Fault
from train_cases import exact, recipe, trained

from distrib.errors import UserError
from distrib.redaction import cleaned_output
from launch.cli import main
from launch.nodes import Nodes, Relay
from launch.spawn import Job

HANG_S = 5.0


@pytest.fixture(scope="module")
def machines() -> Iterator[list[str]]:
    with two_machines() as names:
        yield names


@pytest.fixture(scope="module")
def whole(machines: list[str], tmp_path_factory: pytest.TempPathFactory, dataset: str) -> Path:
    """Two ranks on one machine."""
    folder = tmp_path_factory.mktemp("whole")
    trained(recipe(folder, dataset, max_steps=6), 2)
    return folder


@contextmanager
def running(machines: list[str], folder: Path, dataset: str, fault: Fault, **changes: object) -> Iterator[Run]:
    run = Run(machines, folder)
    try:
        run.start(dataset, fault, **changes)
        yield run
    finally:
        run.kill()


def assert_whole(folder: Path, whole: Path) -> None:
    assert exact(folder) == exact(whole)
    weights = Path("final", "model.safetensors")
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_machine_that_is_cut_off_is_named_and_the_run_goes_on(
    machines: list[str], tmp_path: Path, dataset: str, whole: Path
) -> None:
    fault = Fault("cut", "step", 1)
    with running(machines, tmp_path, dataset, fault, hang_timeout_s=HANG_S) as run:
        cut_s, listening = run.struck(), run.listening()
        codes, said = run.end()
    logs = [tmp_path / "run" / "logs" / f"node-{node}.log" for node in range(2)]
    last_s = [round(log.stat().st_mtime - cut_s, 1) for log in logs]
    print(f"hang_timeout_s={HANG_S:g}: last lines {last_s} s after the cut, ended {time.time() - cut_s:.1f} s after it")
    assert listening == [{address} for address in ADDRESSES]
    assert codes == [1, 1], said
    for node, text in enumerate(said):
        wanted = f"[rank {node}] ebbtide: rank {1 - node} does not answer for {HANG_S:g} s, last seen at "
        assert wanted in text
        assert wanted in logs[node].read_text()
    assert not (tmp_path / "run" / "final").exists()

    ip("-n", machines[1], "link", "set", CABLE, "up")
    with running(machines, tmp_path, dataset, fault, hang_timeout_s=HANG_S) as run:
        codes, said = run.end()
    assert codes == [0, 0], said
    assert_whole(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_machine_that_is_told_to_stop_stops_all(
    machines: list[str], tmp_path: Path, dataset: str, whole: Path, node: int
) -> None:
    """As a cluster does it: the signal comes to the entry."""
    with running(machines, tmp_path, dataset, Fault("pause", "step", 0), max_steps=6) as run:
        run.struck()
        run.processes[node].send_signal(signal.SIGTERM)
        codes, said = run.end()
    assert codes == [75, 75], said
    assert "stopped after step 4; the same command goes on" in said[0]
    with running(machines, tmp_path, dataset, Fault("pause", "step", 0), max_steps=6) as run:
        codes, said = run.end()
    assert codes == [0, 0], said
    assert_whole(tmp_path / "run", whole)


TOLD = {
    "a single machine": ({}, {"PET_NNODES": "1"}, []),
    "ranks": ({"PET_NPROC_PER_NODE": "3"}, {"PET_NNODES": "1"}, ["nproc=3"]),
    "an indexed job": (
        {"PET_NNODES": "2", "JOB_COMPLETION_INDEX": "1", "PET_NPROC_PER_NODE": "8"},
        {"PET_NNODES": "2", "PET_NODE_RANK": "1"},
        ["nproc=8"],
    ),
    "PyTorchJob that counts pods": (
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"PET_NNODES": "2", "PET_NODE_RANK": "1"},
        [],
    ),
    "PyTorchJob that multiplies": (
        {"WORLD_SIZE": "16", "RANK": "1", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8"},
        {"PET_NNODES": "2", "PET_NODE_RANK": "1"},
        ["nproc=8"],
    ),
    "a rank of torchrun": (
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "PET_NPROC_PER_NODE": "8"},
        {"WORLD_SIZE": "2", "RANK": "1"},
        [],
    ),
    "a rank of srun": ({"SLURM_STEP_ID": "0", "PET_NPROC_PER_NODE": "8"}, {}, []),
}


def entered(folder: Path, environment: dict[str, str], body: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "ebbtide").write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / "ebbtide").chmod(0o755)
    return subprocess.run(
        [str(ROOT / "docker" / "entry.sh"), *words],
        env={"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("case", TOLD)
def test_the_entry_says_which_machine_this_is(tmp_path: Path, case: str) -> None:
    given, wanted, more = TOLD[case]
    names = "PET_NNODES", "PET_NODE_RANK", "RANK", "WORLD_SIZE"
    body = f'for name in {" ".join(names)}; do echo "$name=${{!name}}"; done; echo "$@"; exit 75'
    found = entered(tmp_path, given, body, "train", "mine.yaml")
    assert found.returncode == 75, found.stderr
    *values, said = found.stdout.splitlines()
    assert values == [f"{name}={wanted.get(name, '')}" for name in names]
    assert said.split() == ["train", "mine.yaml", *more]


@pytest.mark.parametrize("words", [("plan", "mine.yaml"), ("train", "mine.yaml", "nproc=1"), ("train", "--nproc", "1")])
def test_the_entry_adds_ranks_to_a_training_that_names_none(tmp_path: Path, words: tuple[str, ...]) -> None:
    found = entered(tmp_path, {"PET_NPROC_PER_NODE": "8"}, 'echo "$@"', *words)
    assert found.stdout.split() == list(words)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "PET_NNODES=2 but no MASTER_ADDR in the environment: name the machine of rank 0"),
        ({"MASTER_ADDR": "a"}, "PET_NNODES=2 but no PET_NODE_RANK in the environment: 0 to 1"),
        ({"MASTER_ADDR": "a", "PET_NODE_RANK": "2"}, "PET_NODE_RANK=2 in the environment: must be below PET_NNODES=2"),
        ({"PET_NNODES": "1:2"}, "PET_NNODES='1:2' in the environment: must be a whole number"),
        ({"MASTER_ADDR": "a", "PET_NODE_RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment: must be"),
    ],
)
def test_machines_that_do_not_add_up_are_said(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("?", ".")):
        Nodes.of({"PET_NNODES": "2"} | given)


def test_where_the_ranks_meet() -> None:
    told = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "3"}
    assert Nodes.of(told) == Nodes(2, 1, "a", 3)
    assert Nodes.of(told | {"PET_MASTER_ADDR": "b", "PET_MASTER_PORT": "4"}) == Nodes(2, 1, "b", 4)
    assert Nodes.of({"PET_NNODES": "1", "MASTER_ADDR": "a"}) == Nodes()


def says(relay: Relay, rank: int, code: str) -> None:
    """A process with this rank says it."""
    process = subprocess.Popen([sys.executable, "-S", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with closing(process.stdout), closing(process.stderr):
        relay.take(process, rank)
        process.wait()
        relay.drain()


def test_what_ranks_say_is_kept_once_the_folder_is_the_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "tide-and-ebb")
    claim = tmp_path / "recipe.lock.yaml"
    claim.write_text("another run's")
    relay = Relay(Nodes(2, 1, "a", 3), tmp_path)
    with cleaned_output():
        says(relay, 8, "import os; os.write(2, b'early, with tide-and-ebb\\n'); print('{}')")
        assert not relay.file.parent.exists()
        os.utime(claim, ns=(1, 1))
        says(relay, 9, "import sys; print('late', file=sys.stderr)")
    relay.keep("ebbtide: the end")
    kept = relay.file.read_text().splitlines()
    assert sorted(kept[:2]) == ["[rank 8] early, with (hidden)", "[rank 8] {}"]
    assert kept[2:] == ["[rank 9] late", "ebbtide: the end"]
    out, err = capfd.readouterr()
    assert out == "{}\n"
    assert err.splitlines() == ["[rank 8] early, with (hidden)", "[rank 9] late"]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    relay = Relay(Nodes(2, 0, "a", 3), tmp_path)
    (tmp_path / "recipe.lock.yaml").touch()
    (tmp_path / "logs").write_text("a file")
    relay.keep("one")
    relay.keep("two")
    assert capfd.readouterr().err.count("what ranks say is not kept") == 1


def test_a_rank_that_is_killed_goes_by_its_number_in_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    relay = Relay(Nodes(2, 1, "a", 3), tmp_path)
    (tmp_path / "recipe.lock.yaml").touch()
    command = [sys.executable, "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stderr is not None
    with closing(process.stdout), closing(process.stderr):
        job = Job([process], 8, relay)
        job.wait()
        relay.drain()
    assert job.exit_code() == 1
    line = "ebbtide: rank 8 was ended by SIGKILL; memory may have run out"
    assert capfd.readouterr().err.splitlines() == [line]
    assert relay.file.read_text() == f"{line}\n"


@pytest.mark.parametrize("key", ["max_restarts=1", "on_oom=halve"])
def test_machines_do_not_start_again_each_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    for name, value in (("PET_NNODES", "2"), ("PET_NODE_RANK", "0"), ("MASTER_ADDR", "a")):
        monkeypatch.setenv(name, value)
    assert main(["train", str(ROOT / "recipes" / "tiny.yaml"), key]) == 2
    assert "but each of PET_NNODES=2 machines would start its ranks again by itself" in capsys.readouterr().err
