"""Replicas through torchft: one is killed within a step, another comes late, and the weights are those of one process
that had all rows."""

from __future__ import annotations

import importlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from replica_cases import batch, loss_of, parts, wait_for

from distrib import replicas
from distrib.errors import NotReached, UserError

pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")  # torchft's
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def torchft() -> None:
    pytest.importorskip("torchft", reason="torchft is not installed: pip install -c constraints.txt .[torchft]")
    try:
        socket.create_server(("::", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"torchft listens on IPv6: {error}")


@contextmanager
def lighthouse() -> Iterator[str]:
    coordination: Any = importlib.import_module("torchft.coordination")
    server = coordination.LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=500, heartbeat_timeout_ms=2000
    )
    try:
        yield f"http://127.0.0.1:{server.address().rpartition(':')[2]}"
    finally:
        server.shutdown()


def started(folder: Path, who: str, address: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), replicas.LIGHTHOUSE: address, "OMP_NUM_THREADS": "1"}
    with (folder / f"{who}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "replica_cases.py"), str(folder), who],
            env=environment,
            stdout=log,
            stderr=log,
        )


def one_process(steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    model, optimizer, schedule = parts(seed=len("first"))
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return model.state_dict(), losses


def lines(folder: Path, who: str) -> list[list[str]]:
    return [line.split() for line in (folder / who).read_text().splitlines()]


@pytest.mark.usefixtures("torchft")
def test_replicas_that_go_and_come_train_as_one_process(tmp_path: Path) -> None:
    with lighthouse() as address:
        processes = {"first": started(tmp_path, "first", address)}
        try:
            wait_for(tmp_path / "first")
            processes["lost"] = started(tmp_path, "lost", address)
            wait_for(tmp_path / "is-lost")
            processes["lost"].kill()
            processes["late"] = started(tmp_path, "late", address)
            for who in ("first", "late"):
                assert processes[who].wait(300) == 0, (tmp_path / f"{who}.log").read_text()[-3000:]
        finally:
            for process in processes.values():
                process.kill()
                process.wait()

    steps = int((tmp_path / "over").read_text())
    weights, losses = one_process(steps)
    found = lines(tmp_path, "first")
    made = [(int(step), int(count)) for step, count, total in found if total != "None"]
    assert len(found) == len(made) + 1, "one step is made again"
    assert [step for step, _ in made] == list(range(steps))
    assert [count for count, _ in groupby(count for _, count in made)] == [1, 2, 1, 2]
    for step, _, total in found:
        assert total == "None" or float(total) == pytest.approx(losses[int(step)], rel=1e-10)
    for who in ("first", "late"):
        trained = torch.load(tmp_path / f"{who}.pt")
        for name, right in weights.items():
            assert (trained[name] - right).norm() <= 1e-10 * right.norm(), (who, name)


@pytest.mark.usefixtures("torchft")
def test_a_lighthouse_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(replicas.LIGHTHOUSE, "http://nothing.invalid:29510")
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=re.escape("'http://nothing.invalid:29510': no way there from here")):
        replicas.Replicas(model, torch.optim.SGD(model.parameters()))


@pytest.mark.usefixtures("torchft")
@pytest.mark.parametrize("given", ["", "nowhere"])
def test_a_lighthouse_that_is_not_named_is_said(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv(replicas.LIGHTHOUSE, given)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=re.escape(f"TORCHFT_LIGHTHOUSE={given!r}: name the lighthouse, as http://")):
        replicas.Replicas(model, torch.optim.SGD(model.parameters()))


@pytest.mark.usefixtures("torchft")
def test_a_lighthouse_that_does_not_answer_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(replicas.LIGHTHOUSE, "http://127.0.0.1:9")
    monkeypatch.setattr(replicas, "CONNECT_S", 1.0)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"TORCHFT_LIGHTHOUSE='http://127\.0\.0\.1:9' does not answer"):
        replicas.Replicas(model, torch.optim.SGD(model.parameters()))


@pytest.mark.usefixtures("torchft")
def test_a_step_that_never_succeeds_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchft takes up any error of its own, and would make the step again for ever."""
    model = torch.nn.Linear(1, 1)
    with lighthouse() as address:
        monkeypatch.setenv(replicas.LIGHTHOUSE, address)
        with replicas.Replicas(model, torch.optim.SGD(model.parameters(), lr=1.0)) as few:
            before = model.weight.clone()
            shares = few.steps(2)
            for index in range(replicas.MOST_TRIES):
                assert next(shares) == replicas.Share(0, 0, 1)
                loss = model(torch.ones(1, 1)).sum()
                loss.backward()
                few._manager.report_error(ValueError("planted"))
                if index + 1 < replicas.MOST_TRIES:
                    assert few.update(loss) is None
            with pytest.raises(NotReached, match=r"^step 1 failed 10 times: planted$"):
                few.update(loss)
            assert torch.equal(model.weight, before)


class Planted:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.usefixtures("torchft")
def test_pickled_objects_of_another_replica_are_not_read(tmp_path: Path) -> None:
    found = []
    for state in ({"weights": torch.arange(3.0), "lr": 0.1}, Planted(tmp_path / "touched")):
        transport = replicas._transport("127.0.0.1", timedelta(seconds=20))
        try:
            transport.send_checkpoint([1], 7, state, timedelta(seconds=20))
            found.append(transport.recv_checkpoint(0, transport.metadata(), 7, timedelta(seconds=20)))
        except UnpicklingError as error:
            found.append(error)
        finally:
            transport.shutdown()
    data, refused = found
    assert data["lr"] == 0.1
    assert data["weights"].tolist() == [0, 1, 2]
    assert isinstance(refused, UnpicklingError)
    assert not (tmp_path / "touched").exists()


def test_without_torchft_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match=re.escape("replicas need the torchft package: pip install 'ebbtide[torchft]'")):
        replicas.Replicas(model, torch.optim.SGD(model.parameters()))
