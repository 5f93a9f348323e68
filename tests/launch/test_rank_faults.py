"""Ranks of real runs that die, hang or are told to stop: all end, nobody is orphaned, and the run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rank_faults import Fault, alive, run
from train_cases import exact, lines, recipe, trained

SAID = {
    "KILL": "rank {} was ended by SIGKILL; memory may have run out",
    "SEGV": "rank {} was ended by SIGSEGV",
    "STOP": "rank {} does not answer for 3 s, last seen at ",
    "sleep": "rank {} makes no progress, others wait for it 3 s: ",
    "exit": "rank {} ended with exit code 3, without a word",
    "quiet exit": "rank {} ended with exit code 0, without a word",
    "exception": "rank {}: ZeroDivisionError: division by zero",
    "sys.exit": "rank {}: SystemExit: 3",
}
FAULTS = [Fault(name, "step", rank) for name in SAID for rank in (0, 1)]
FAULTS += [
    Fault("STOP", "loading", 0),
    Fault("KILL", "preflight", 1),
    Fault("sleep", "evaluation", 1, (4,)),
    Fault("STOP", "saving", 1, (4,)),
    Fault("exception", "finishing", 0),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: str) -> Path:
    """What a run that nothing happened to writes."""
    folder = tmp_path_factory.mktemp("whole")
    trained(recipe(folder, dataset, max_steps=6), 2)
    return folder


def evaluated(dataset: str) -> dict[str, Any]:
    return {"eval_dataset": [{"name": dataset}], "eval_steps": 4, "eval_rows": 4}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.name}-{fault.phase}-{fault.rank}")
def test_a_rank_that_fails_ends_all_and_is_named(tmp_path: Path, dataset: str, fault: Fault) -> None:
    found = run(tmp_path, dataset, fault, nproc=2, **evaluated(dataset))
    print(f"{fault}: said {found.said_s:.2f} s after the fault, ended {found.ended_s:.2f} s")
    assert found.code == 1
    wanted = SAID[fault.name].format(fault.rank)
    assert [line for line in found.said if wanted in line], found.said
    assert not [line for line in found.said if f"rank {1 - fault.rank} " in line], found.said
    assert alive(tmp_path) == []
    assert not (tmp_path / "run" / "final" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_runs_that_are_killed_again_and_again_lose_and_repeat_no_row(
    tmp_path: Path, dataset: str, whole: Path, rank: int
) -> None:
    """Started again by `nproc`; a checkpoint between two kills starts the count anew."""
    found = run(tmp_path, dataset, Fault("KILL", "step", rank, (0, 1, 3, 5)), nproc=2, max_restarts=2)
    assert found.code == 0, found.said
    restarts = [line for line in found.said if line.startswith("ebbtide: restart ")]
    assert restarts == [
        f"ebbtide: restart {count} of 2, from step {step}, ranks: 2" for count, step in ((1, 0), (2, 0), (1, 2), (1, 4))
    ]
    assert exact(tmp_path / "run") == exact(whole)
    assert lines(tmp_path / "run", "samples") == lines(whole, "samples")
    again = [line["detail"] for line in lines(tmp_path / "run", "events") if line["event"] == "restart"]
    assert len(again) == 3  # the one at step 1 was trained again
    assert all(detail.startswith(f"rank {rank} was ended by SIGKILL") for detail in again)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KILL", "STOP", "sleep"])
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_starts_ranks_again(tmp_path: Path, dataset: str, whole: Path, name: str, rank: int) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3")
    # torchrun waits half a minute for a stopped rank
    found = run(tmp_path, dataset, Fault(name, "step", rank, (2, 3, 5) if name == "KILL" else (3,)), *launcher)
    assert found.code == 0, found.said
    assert exact(tmp_path / "run") == exact(whole)
    assert lines(tmp_path / "run", "samples") == lines(whole, "samples")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "why"), [("STOP", "did not answer"), ("exception", "failed")])
def test_a_run_goes_on_without_the_rank_that_failed(
    tmp_path: Path, dataset: str, whole: Path, name: str, why: str
) -> None:
    changes = {"nproc": 2, "max_restarts": 1, "min_nproc": 1}
    found = run(tmp_path, dataset, Fault(name, "step", 0), **changes)
    assert found.code == 0, found.said
    assert found.said[-1] == "ebbtide: restart 1 of 1, from step 2, ranks: 1"
    assert json.loads((tmp_path / "run" / "report.json").read_text())["world"] == 1
    (again,) = [line["detail"] for line in lines(tmp_path / "run", "events") if line["event"] == "restart"]
    assert again.startswith(f"rank 0 {why}; ")
    assert lines(tmp_path / "run", "samples") == lines(whole, "samples")
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path / "run", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_memory_that_runs_out_takes_fewer_sequences_at_once(
    tmp_path: Path, dataset: str, whole: Path, nproc: int
) -> None:
    fields = {"on_oom": "halve", "per_device_train_batch_size": 2, "global_batch_size": 4}
    found = run(tmp_path, dataset, Fault("memory", "step", nproc - 1), nproc=nproc, **fields)
    assert found.code == 0, found.said
    said = [line for line in found.said if line.startswith("ebbtide: ")]
    assert said[0].startswith(
        "ebbtide: out of memory in step 4 (CUDA out of memory. Tried to allocate 2 GiB.); beside "
    )
    assert said[1] == (
        "ebbtide: on_oom=halve: starting again from the newest checkpoint with per_device_train_batch_size=1"
    )
    assert lines(tmp_path / "run", "samples") == lines(whole, "samples")
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path / "run", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


AT_ONCE = "ebbtide: stopped at once; the same command goes on from the newest checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("TERM", 0), ("USR1", 1)])
@pytest.mark.parametrize(
    ("phase", "at", "saved"),
    [
        ("loading", 0, None),
        ("preflight", 0, None),
        ("step", 3, 4),
        ("evaluation", 4, 4),
        ("saving", 2, 2),
        ("finishing", 0, None),
    ],
)
def test_a_signal_to_one_rank_stops_all_of_them(
    tmp_path: Path, dataset: str, whole: Path, name: str, phase: str, at: int, saved: int | None, rank: int
) -> None:
    fault = Fault(name, phase, rank, (at,))
    found = run(tmp_path, dataset, fault, nproc=2, **evaluated(dataset))
    wanted = f"ebbtide: stopped after step {saved}; the same command goes on from there" if saved else AT_ONCE
    assert (found.code, found.said) == (75, [wanted])
    assert alive(tmp_path) == []
    assert saved is None or (tmp_path / "run" / "checkpoints" / f"step-{saved}" / "manifest.json").exists()
    # The fault has struck and does not again.
    assert run(tmp_path, dataset, fault, nproc=2, **evaluated(dataset)).code == 0
    assert exact(tmp_path / "run") == exact(whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["step", "evaluation", "saving"])
@pytest.mark.parametrize("name", ["TERM twice", "USR1 twice"])
def test_a_second_signal_to_one_rank_ends_all_at_once(
    tmp_path: Path, dataset: str, whole: Path, name: str, phase: str
) -> None:
    """Though that rank goes nowhere, and the other waits for it in a collective."""
    fault = Fault(name, phase, 1, (4,))
    found = run(tmp_path, dataset, fault, nproc=2, hang_timeout_s=60.0, **evaluated(dataset))
    assert (found.code, found.said) == (75, [AT_ONCE])
    assert found.ended_s < 10
    assert alive(tmp_path) == []
    assert run(tmp_path, dataset, fault, nproc=2, hang_timeout_s=60.0, **evaluated(dataset)).code == 0
    assert exact(tmp_path / "run") == exact(whole)
