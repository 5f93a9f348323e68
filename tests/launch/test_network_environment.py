"""The variables that NCCL, gloo and torch read: what is wrong, what slows ranks down, where ranks differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

import launch.train
from distrib.topology import Topology
from launch import network
from launch.network import MATTERS, NOTED, WRONG, check, check_all
from launch.recipe import Recipe

REAL = network.interfaces
INTERFACES = ["lo", "eth0", "eth1", "docker0"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: INTERFACES)
    for name in ("mlx5_0", "mlx5_1"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(network, "INFINIBAND", tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "kind", "why"),
    [
        ("NCCL_IBDISABLE", "1", WRONG, "did you mean NCCL_IB_DISABLE?"),
        ("NCCL_SOCKET_IFNAMES", "eth0", WRONG, "did you mean NCCL_SOCKET_IFNAME?"),
        ("TORCH_NCCL_BLOCKING_WAITS", "1", WRONG, "did you mean TORCH_NCCL_BLOCKING_WAIT?"),
        ("NCCL_OF_ANOTHER_YEAR", "1", NOTED, "a name not known here"),
        ("NCCL_BLOCKING_WAIT", "1", NOTED, "torch calls it TORCH_NCCL_BLOCKING_WAIT"),
        ("NCCL_P2P_DISABLE", "1", MATTERS, "do not reach each other directly"),
        ("NCCL_P2P_DISABLE", "true", WRONG, "is not a whole number"),
        ("NCCL_IB_DISABLE", "0x1", MATTERS, "TCP, not InfiniBand"),
        ("NCCL_SHM_DISABLE", "01", MATTERS, "over the network"),
        ("NCCL_BUFFSIZE", "4M", WRONG, "is not a whole number"),
        ("NCCL_NTHREADS", "1_024", WRONG, "is not a whole number"),
        ("NCCL_NTHREADS", "", WRONG, "is not a whole number"),
        ("NCCL_DEBUG", "INFO", MATTERS, "every rank prints"),
        ("NCCL_DEBUG", "verbose", WRONG, "choose VERSION, WARN, INFO, ABORT, TRACE"),
        ("NCCL_SOCKET_IFNAME", "ib", WRONG, "leaves none of what is here: docker0, eth0, eth1, lo"),
        ("NCCL_SOCKET_IFNAME", "=eth", WRONG, "leaves none"),
        ("NCCL_SOCKET_IFNAME", "^lo,eth,docker", WRONG, "leaves none"),
        ("NCCL_IB_HCA", "=mlx5_2:1", WRONG, "leaves none of what is here: mlx5_0, mlx5_1"),
        ("GLOO_SOCKET_IFNAME", "eth", WRONG, "no interface 'eth' here"),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", WRONG, "no interface 'ib0' here"),
        ("MASTER_PORT", "70000", WRONG, "is not a port"),
        ("MASTER_PORT", "http", WRONG, "is not a port"),
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL", MATTERS, "every collective is checked"),
    ],
)
def test_what_is_said_of_a_variable(name: str, value: str, kind: str, why: str) -> None:
    (found,) = check({name: value})
    assert (found.name, found.value, found.kind) == (name, value, kind)
    assert why in found.why


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_P2P_DISABLE", "0"),
        ("NCCL_IB_DISABLE", "0"),
        ("NCCL_DEBUG", "warn"),
        ("NCCL_SOCKET_IFNAME", "eth"),
        ("NCCL_SOCKET_IFNAME", "=eth0,eth1"),
        ("NCCL_SOCKET_IFNAME", "^docker,lo"),
        ("NCCL_IB_HCA", "mlx5_1:1,mlx5_9"),
        ("NCCL_ALGO", "Ring"),
        ("NCCL_BUFFSIZE", "8388608"),
        ("GLOO_SOCKET_IFNAME", "eth1"),
        ("MASTER_PORT", "29500"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        ("TORCH_DISTRIBUTED_DEBUG", "OFF"),
        ("TORCH_HOME", "/nowhere"),
        ("PATH", "NCCL_DEBUG"),
    ],
)
def test_what_is_in_order_is_not_spoken_of(name: str, value: str) -> None:
    assert check({name: value}) == []


def test_interfaces_that_are_not_known_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: None)
    assert check({"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}) == []


def test_this_machine_has_interfaces() -> None:
    assert "lo" in (REAL() or ())


def test_secrets_are_hidden_wherever_they_stand() -> None:
    env = {"NCCL_NET_TOKEN": "SEEN-1234", "TORCH_DIST_PASSWORD": "SEEN-5678", "MASTER_PORT": "tcp://me:SEEN9@host"}
    other = env | {"NCCL_NET_TOKEN": "SEEN-other"}
    found = check_all([(env, check(env)), (other, check(other))])
    assert {one.name for one in found} == {"NCCL_NET_TOKEN", "MASTER_PORT"}
    assert "SEEN" not in str([str(one) for one in found])
    assert "SEEN" not in str(found)


def merged(*environments: dict[str, str]) -> list[network.Finding]:
    return check_all([(env, check(env)) for env in environments])


def test_what_all_ranks_have_is_said_once() -> None:
    (found,) = merged({"NCCL_P2P_DISABLE": "1"}, {"NCCL_P2P_DISABLE": "1"})
    assert found.ranks == ()
    assert str(found).startswith("NCCL_P2P_DISABLE=1: GPUs")


def test_what_some_ranks_have_is_said_with_them() -> None:
    found = merged({}, {"NCCL_DEBUG": "INFO"}, {}, {"NCCL_DEBUG": "INFO"})
    assert [(one.kind, one.ranks) for one in found] == [(MATTERS, (1, 3)), (NOTED, ())]
    assert "on rank 1, 3" in str(found[0])


@pytest.mark.parametrize(
    ("name", "kind"), [("NCCL_ALGO", WRONG), ("NCCL_SOCKET_IFNAME", NOTED), ("NCCL_DEBUG_FILE", NOTED)]
)
def test_values_that_differ_between_ranks(name: str, kind: str) -> None:
    (found,) = merged({name: "eth0"}, {name: "eth0"}, {name: "eth1"})
    assert (found.name, found.value, found.kind) == (name, "eth0", kind)
    assert found.why == "rank 2 has eth1; set it alike on all ranks"


WRONGLY = {"NCCL_IBDISABLE": "1", "NCCL_P2P_DISABLE": "1", "NCCL_NEW_NAME_OF_2031": "1"}


def test_rank_0_says_one_line_at_the_start_of_a_run(two_ranks: Ranks) -> None:
    here = "doctor_cases:said_at_the_start"
    first, second = two_ranks(here, "cuda", [WRONGLY, WRONGLY])
    assert first.count("\n") == 1
    assert first.startswith(
        "ebbtide: network environment: NCCL_IBDISABLE=1: no such name, did you mean NCCL_IB_DISABLE?"
    )
    assert "; NCCL_P2P_DISABLE=1: " in first
    assert "2031" not in first
    assert second == ""
    (differs, _) = two_ranks(here, "cpu", [{}, {"GLOO_SOCKET_IFNAME": "no-such"}])
    assert "GLOO_SOCKET_IFNAME=no-such on rank 1: no interface 'no-such' here" in differs


@pytest.mark.parametrize(("device_type", "env"), [("cuda", {"NCCL_DEBUG": "WARN"}), ("cpu", WRONGLY), ("cpu", {})])
def test_nothing_is_said_where_nothing_matters(two_ranks: Ranks, device_type: str, env: dict[str, str]) -> None:
    assert two_ranks("doctor_cases:said_at_the_start", device_type, [env, env]) == ["", ""]


def test_a_run_of_one_rank_says_nothing(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such")
    network.say_once(Topology())
    assert capsys.readouterr().err == ""


def test_a_run_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(launch.train, "say_once", lambda topology: calls.append("network"))
    monkeypatch.setattr(launch.train, "_train", lambda *_: calls.append("run"))
    launch.train.train(Recipe(), Topology())
    assert calls == ["network", "run"]
