"""Several ranks as one program: real processes, with a training that does what a test needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.rank import report_alone
from launch.spawn import launched

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "recipes" / "tiny.yaml")
BODY = """
import os, signal, sys, time
from types import ModuleType

def train(recipe, topology):
    import torch, torch.distributed as dist
    from distrib.errors import Interrupted, UserError
    rank, mode = topology.rank, recipe.output_dir
    said = open(f"{os.environ['NOTES']}/{rank}", "w")
    print(os.getpid(), os.environ["OMP_NUM_THREADS"], file=said, flush=True)
    dist.barrier()
    if mode == "mistake" or mode == "mistake of one" and rank == 1:
        raise UserError("batch=3: choose 2 or 4")
    if mode == "defect" and rank == 1 or mode == "defect of the first" and rank == 0:
        raise ZeroDivisionError("oh")
    if mode == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "stopped" and rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "asleep" and rank == 1:
        time.sleep(600)
    if mode == "dies once":
        told = os.environ.get("EBBTIDE_FAILURE", "first")
        print(told, file=open(f"{os.environ['NOTES']}/generation-{rank}", "a"), flush=True)
        if rank == 1 and told == "first":
            os.kill(os.getpid(), signal.SIGKILL)
    if mode == "dies always" and rank == 0:
        os._exit(4)
    if mode == "one is told":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(600)
    if mode == "stuck":
        if rank == 1:
            raise ZeroDivisionError("oh")
        time.sleep(600)
    if mode == "endless":
        from distrib.told import EARS
        EARS.listen()
        print("ready", file=said, flush=True)
        while True:
            stop = torch.tensor([int(EARS.asked)])
            dist.all_reduce(stop)
            if stop.item():
                time.sleep(float(os.environ.get("SAVING_TAKES", 0.5)))
                print("saved", file=said, flush=True)
                raise Interrupted("stopped after step 3; the same command goes on from there")
            time.sleep(0.02)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    return {"final": mode, "total": total.item(), "world": topology.world}

module = ModuleType("launch.train")
module.train = train
sys.modules["launch.train"] = module
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(BODY)
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "OMP_NUM_THREADS")}
    return {**known, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "NOTES": str(tmp_path)}


@contextmanager
def started(mode: str, environment: dict[str, str], *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-m", "launch", "train", TINY, f"output_dir={mode}", "nproc=2", *words]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=environment["NOTES"],
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(mode: str, environment: dict[str, str], *words: str) -> tuple[int, str, list[str]]:
    with started(mode, environment, *words) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err.splitlines()


def notes(environment: dict[str, str]) -> list[str]:
    return [path.read_text() for path in sorted(Path(environment["NOTES"]).glob("[01]"))]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


def gone(environment: dict[str, str]) -> bool:
    return not any(alive(int(note.split()[0])) for note in notes(environment))


def test_two_ranks_work_together_and_print_one_result(environment: dict[str, str]) -> None:
    code, out, err = ended("fine", environment, "--json")
    assert (code, err) == (0, [])
    assert json.loads(out) == {"final": "fine", "total": 3.0, "world": 2}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert [int(note.split()[1]) for note in notes(environment)] == [threads, threads]


def test_threads_that_the_user_chose_are_kept(environment: dict[str, str]) -> None:
    assert ended("fine", {**environment, "OMP_NUM_THREADS": "3"})[0] == 0
    assert [note.split()[1] for note in notes(environment)] == ["3", "3"]


@pytest.mark.parametrize("mode", ["mistake", "mistake of one"])
def test_a_mistake_is_said_once_with_its_exit_code(mode: str, environment: dict[str, str]) -> None:
    assert ended(mode, environment) == (2, "", ["ebbtide: batch=3: choose 2 or 4"])
    assert gone(environment)


@pytest.mark.parametrize(("mode", "rank"), [("defect", 1), ("defect of the first", 0)])
def test_a_defect_shows_the_traceback_of_its_rank_only(mode: str, rank: int, environment: dict[str, str]) -> None:
    code, out, err = ended(mode, environment)
    assert (code, out) == (1, "")
    assert err[0] == f"rank {rank}: Traceback (most recent call last):"
    assert err[-1] == f"rank {rank}: ZeroDivisionError: oh"
    assert {line.split(":")[0] for line in err} == {f"rank {rank}"}


def test_a_peer_that_waits_for_a_failed_rank_is_ended(environment: dict[str, str]) -> None:
    begin = time.monotonic()
    code, _, err = ended("stuck", environment)
    assert code == 1
    assert [line for line in err if not line.startswith("rank 1: ")] == []
    assert time.monotonic() - begin < 30
    assert gone(environment)


def test_a_killed_rank_is_named(environment: dict[str, str]) -> None:
    code, out, err = ended("killed", environment)
    assert (code, out) == (1, "")
    assert sorted(err) == [
        "ebbtide: rank 0: lost the connection to another rank",
        "ebbtide: rank 1 was ended by SIGKILL; memory may have run out",
    ]


def test_a_stopped_rank_is_named_and_nobody_is_left(environment: dict[str, str]) -> None:
    """Rank 0, which holds the store that all talk through."""
    code, out, err = ended("stopped", environment, "hang_timeout_s=2")
    assert (code, out) == (1, "")
    assert err == ["ebbtide: rank 0 does not answer for 2 s, last seen at starting: it is stopped, or out of reach"]
    assert gone(environment)


def test_ranks_start_again_after_a_death(environment: dict[str, str]) -> None:
    code, out, err = ended("dies once", environment, "max_restarts=1", "--json")
    assert (code, json.loads(out)["total"]) == (0, 3.0)
    assert err[-2:] == [
        "ebbtide: rank 1 was ended by SIGKILL; memory may have run out",
        "ebbtide: restart 1 of 1, from step 0, ranks: 2",
    ]
    first, again = (Path(environment["NOTES"]) / "generation-1").read_text().splitlines()
    assert (first, json.loads(again)[0]) == ("first", "rank 1 was ended by SIGKILL; memory may have run out")


@pytest.mark.slow
def test_a_rank_that_fails_every_time_is_given_up(environment: dict[str, str]) -> None:
    code, _, err = ended("dies always", environment, "max_restarts=1")
    assert code == 1
    died = "ebbtide: rank 0 ended with exit code 4, without a word"
    assert [line for line in err if "lost the connection" not in line] == [
        died,
        "ebbtide: restart 1 of 1, from step 0, ranks: 2",
        died,
        "ebbtide: max_restarts=1 without a new checkpoint: giving up",
    ]


def test_a_signal_to_one_rank_outside_of_a_step_ends_all(environment: dict[str, str]) -> None:
    code, out, err = ended("one is told", environment)
    assert (code, out, err) == (
        75,
        "",
        ["ebbtide: stopped at once; the same command goes on from the newest checkpoint"],
    )
    assert gone(environment)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGUSR1, marks=SLOW), signal.SIGHUP]
)
def test_a_stop_signal_lets_the_ranks_save_and_twice_is_as_good(
    number: signal.Signals, environment: dict[str, str]
) -> None:
    with started("endless", environment) as process:
        eventually(lambda: [note.count("ready") for note in notes(environment)] == [1, 1])
        process.send_signal(number)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert err.splitlines() == [
        "ebbtide: stopping with a checkpoint after this step; Ctrl-C again, after 1 s, stops at once",
        "ebbtide: stopped after step 3; the same command goes on from there",
    ]
    assert [note.count("saved") for note in notes(environment)] == [1, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_a_second_signal_after_a_second_stops_at_once(number: signal.Signals, environment: dict[str, str]) -> None:
    with started("endless", environment | {"SAVING_TAKES": "30"}) as process:
        eventually(lambda: [note.count("ready") for note in notes(environment)] == [1, 1])
        process.send_signal(number)
        time.sleep(1.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 75
    assert err.splitlines()[1:] == ["ebbtide: stopped at once; the same command goes on from the newest checkpoint"]
    assert gone(environment)
    assert [note.count("saved") for note in notes(environment)] == [0, 0]


def test_a_stop_before_the_first_step_ends_cleanly(environment: dict[str, str]) -> None:
    with started("endless", environment) as process:
        eventually(lambda: bool(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()))
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "Traceback" not in err


def test_ranks_stop_when_what_started_them_is_killed(environment: dict[str, str]) -> None:
    with started("endless", environment) as process:
        eventually(lambda: [note.count("ready") for note in notes(environment)] == [1, 1])
        process.kill()
        eventually(lambda: gone(environment))
    assert [note.count("saved") for note in notes(environment)] == [1, 1]


@pytest.mark.slow
def test_under_torchrun_the_same_entry_is_one_rank(environment: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "launch",
    ]
    done = subprocess.run(
        [*command, "train", TINY, "output_dir=fine", "--json"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"final": "fine", "total": 3.0, "world": 2}


@pytest.mark.parametrize(
    ("env", "yes"),
    [
        ({}, False),
        ({"RANK": "0"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, False),
        ({"SLURM_NTASKS": "2"}, False),
    ],
)
def test_who_was_started_by_a_launcher(env: dict[str, str], yes: bool) -> None:
    assert launched(env) is yes


@pytest.mark.parametrize(
    ("env", "error", "said"),
    [
        ({"RANK": "8", "LOCAL_RANK": "0"}, FileNotFoundError("x"), "rank 8: FileNotFoundError: x\n"),
        ({"RANK": "3", "LOCAL_RANK": "1"}, FileNotFoundError("x"), "ebbtide: rank 3: FileNotFoundError: x\n"),
        ({"RANK": "3", "LOCAL_RANK": "1"}, KeyboardInterrupt(), ""),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"},
            KeyboardInterrupt(),
            "",
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},
            KeyboardInterrupt(),
            "ebbtide: interrupted\n",
        ),
    ],
)
def test_errors_from_before_the_ranks_can_talk(
    env: dict[str, str], error: BaseException, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report_alone(error, env)
    assert capsys.readouterr().err == said
