"""Every launcher's environment ends in the same topology."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
from ranks import Ranks

from distrib import topology as topologies
from distrib.errors import NotReached, UserError
from distrib.topology import Topology, connect, read_environment

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without any launcher's variables, and restored as a whole afterwards."""
    for name in [name for name in os.environ if name in NAMES or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return monkeypatch


@pytest.mark.usefixtures("environment")
def test_without_a_launcher_it_is_one_process_and_no_group() -> None:
    topology = read_environment()
    assert (topology.rank, topology.world, topology.main) == (0, 1, True)
    assert connect(topology) is None


def test_torchrun_and_accelerate(environment: pytest.MonkeyPatch) -> None:
    values = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in values.items():
        environment.setitem(os.environ, name, value)
    found = read_environment()
    assert (found.rank, found.world, found.local_rank, found.local_world) == (3, 4, 1, 2)
    assert not found.main


@pytest.mark.parametrize(
    ("more", "address", "local_world"),
    [
        ({"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}, "10.0.0.1", 8),
        ({"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_NODELIST": "node7,node8"}, "node7", 8),
        ({"MASTER_ADDR": "first", "SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, "first", 4),
        ({"SLURM_NODELIST": "gpu[007-011,20],cpu1", "SLURM_TASKS_PER_NODE": "3,5", "SLURM_NODEID": "1"}, "gpu007", 5),
        ({"SLURM_NODELIST": "a1", "SLURM_STEP_NODELIST": "r[2,4]n[03-04].x", "SLURM_NODEID": "0"}, "r2n03.x", 8),
    ],
)
def test_srun_sets_what_torchrun_would(
    environment: pytest.MonkeyPatch, more: dict[str, str], address: str, local_world: int
) -> None:
    for name, value in {**SLURM, **more}.items():
        environment.setitem(os.environ, name, value)
    found = read_environment()
    assert (found.rank, found.world, found.local_rank, found.local_world) == (5, 8, 1, local_world)
    assert os.environ["MASTER_ADDR"] == address
    assert os.environ["MASTER_PORT"] == str(20000 + 123456 % 20000)


def test_a_single_task_of_slurm_is_one_process(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}.items():
        environment.setitem(os.environ, name, value)
    assert read_environment().world == 1


def test_a_batch_script_without_srun_is_one_process(environment: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "SLURM_PROCID": "0"}.items():
        environment.setitem(os.environ, name, value)
    environment.delitem(os.environ, "SLURM_STEP_ID")
    assert read_environment().world == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"RANK": "two"}, "RANK='two' in the environment: must be a whole number"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4 with WORLD_SIZE=4 .* must be below"),
        ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK=-1 with WORLD_SIZE=4"),
    ],
)
def test_a_broken_environment_is_said(environment: pytest.MonkeyPatch, values: dict[str, str], said: str) -> None:
    for name, value in values.items():
        environment.setitem(os.environ, name, value)
    with pytest.raises(UserError, match=said):
        read_environment()


@pytest.mark.usefixtures("environment")
def test_ranks_without_an_address_are_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE=2 but no MASTER_ADDR in the environment: start with torchrun"):
        connect(Topology(rank=0, world=2))


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's table of connections")
def test_ranks_of_one_machine_listen_on_its_loopback_interface_alone(two_ranks: Ranks) -> None:
    found = two_ranks("rank_cases:listening")
    assert all(found), "gloo listens on every rank, the store on rank 0"
    assert len(found[0]) > len(found[1])
    assert {address for rank in found for address in rank} == {"0100007F"}


@pytest.mark.parametrize(
    ("host", "listens"),
    [("127.0.0.1", True), ("localhost", False), ("192.0.2.1", False), ("nothing.invalid", False)],
)
def test_the_store_listens_where_others_look_for_it(host: str, listens: bool) -> None:
    """Not at a name of the loopback, the address of another machine, as behind a balancer, or a name that is not known
    yet. Two network namespaces (test_nodes.py) have an address of their own."""
    found = topologies._listener(host, 0)
    assert (found is not None) == listens
    if found is not None:
        with socket.socket(fileno=found) as server:
            assert server.getsockname()[0] == host


def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}: cannot listen there: "):
            topologies._listener("127.0.0.1", port)


def test_a_rank_0_that_does_not_answer_is_said(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(topologies, "TIMEOUT", timedelta(seconds=1))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(silent.getsockname()[1]))):
            environment.setitem(os.environ, name, value)
        with pytest.raises(NotReached, match=r"rank 0 does not answer at MASTER_ADDR=127.0.0.1, .* for 1 s"):
            connect(Topology(rank=1, world=2))
