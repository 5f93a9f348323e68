"""`ebbtide doctor`: whatever a machine has not is said with its reason, and the exit code is 0."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from distrib.topology import Topology
from launch import cli, doctor
from launch.doctor import advice, clocks, disk, machine, needs, ranks, show
from launch.spawn import started

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "recipes" / "tiny.yaml")
LINKS = {"backend": "gloo", "ranks": 2, "all_reduce": [], "neighbours": []}
SECTIONS = ["nodes", "network", "strategies", "links", "clocks", "todo"]
NOT_REACHED: dict[str, Any] = {name: {"why": "not reached"} for name in SECTIONS}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for name in before:
        if name.startswith(("NCCL_", "GLOO_", "MASTER_", "TORCH_", "RANK", "WORLD_SIZE", "SLURM_")):
            monkeypatch.delenv(name)
    yield
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are not started."""
    monkeypatch.setattr(ranks, "started_here", lambda devices: {"links": LINKS, "clocks": []})
    monkeypatch.setattr(disk, "BYTES", 2**20)


def found(capsys: Any, *words: str) -> dict[str, Any]:
    assert cli.main(["doctor", "--json", *words]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.usefixtures("no_start")
def test_a_machine_without_anything_says_what_is_missing(capsys: Any) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr()
    for title in ("machine", "gpus", "disk", "network", "strategies", "links", "clocks", "todo"):
        assert f"\n{title}\n  " in f"\n{said.out}"
    assert said.out.splitlines()[-1].startswith("  no GPU for torch here")
    assert "twobp: a stage a rank: start several" in said.out
    assert [line for line in said.err.splitlines() if not line.startswith("ebbtide: ")] == []


def everything_but(*names: str) -> Callable[..., Any]:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] in names:
            raise ImportError(f"No module named {name!r}")
        return real(name, *arguments, **keywords)

    return without


@pytest.mark.usefixtures("no_start")
def test_everything_absent(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    """No torch, no DeepSpeed, no binding for NVML, no compiler on an empty PATH, no /proc, no host names."""
    absent = ("torch", "deepspeed", "pynvml", "triton", "transformers", "packaging", "strategies")
    monkeypatch.setattr(builtins, "__import__", everything_but(*absent))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(disk, "MOUNTS", tmp_path / "none")
    monkeypatch.setattr("launch.machine._from", lambda path, key: None)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.freedesktop_os_release", lambda: {})
    monkeypatch.setattr("socket.if_nameindex", lambda: (_ for _ in ()).throw(OSError("none")))
    result = found(capsys)
    (node,) = result["nodes"]
    assert node["machine"]["memory_bytes"] is node["machine"]["cpu"] is None
    assert node["machine"]["packages"] == []
    assert "ranges are not known" in node["machine"]["packages_why"]
    assert node["machine"]["torch"] | {"why": ""} == {"cuda": None, "nccl": None, "devices": None, "why": ""}
    assert node["gpus"]["devices"] is None
    assert "pynvml" in node["gpus"]["why"]
    assert node["disk"]["file_system"] is node["disk"]["on"] is None
    assert "torch" in result["links"]["why"]
    assert "No module named" in result["strategies"]["why"]
    assert "pip install torch" in result["todo"][0]
    for name in SECTIONS:
        assert "Traceback" not in "\n".join(show.section(name, result[name]))


def test_a_compiler_and_deepspeed_that_are_not_there_are_said_where_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = needs.look(Topology())
    rows = {row["name"]: row["missing"] for row in (*result["strategies"], *result["engines"])}
    assert {name for name, missing in rows.items() if missing} == {"zero"}
    assert "deepspeed" in (rows["zero"] or "")
    assert "without a compiler" in result["compile"]["missing"]
    said = advice.todo(NOT_REACHED | {"strategies": result})
    assert {"zero", "compile"} <= {line.partition(":")[0] for line in said}


def test_every_strategy_and_engine_has_a_row_of_what_its_own_checks_say() -> None:
    result = needs.look(Topology())
    assert {"plain", "streambp", "twobp", "int4", "fp4"} <= {row["name"] for row in result["strategies"]}
    assert [row["name"] for row in result["engines"]] == ["ddp", "fsdp2", "zero"]
    notes = {row["name"]: row["note"] for row in result["strategies"]}
    assert notes["fp4"] == "emulated: 6 of 6 products"
    assert notes["plain"] is None
    assert result["offload"] == {"to": "a file in the folder for temporary ones", "missing": None}
    assert [source["how"] for source in result["energy"]["sources"]].count(None) == len(result["energy"]["notes"])


@pytest.mark.usefixtures("no_start")
@pytest.mark.parametrize(
    ("words", "missing"),
    [
        ([], None),
        (["engine.name=zero", "compile=true"], "compile=true with engine.name='zero'"),
        (["nproc=2", "strategy={name: twobp, stages: 3}"], "a pipeline of 3 stages with a world of 2"),
        (["report_to=tensorboard"], "needs the tensorboard package"),
        (["model_name_or_path=./nowhere"], "nowhere"),
    ],
)
def test_a_recipe_gets_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], missing: str | None
) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    result = found(capsys, TINY, *words)["strategies"]
    assert result["recipe"]["starts"] is (missing is None)
    if missing:
        assert missing in result["recipe"]["missing"][0]
        assert f"cannot start: {result['recipe']['missing'][0]}" in "\n".join(show.section("strategies", result))
    else:
        assert [row["name"] for row in result["strategies"]] == ["plain"]
        assert [row["name"] for row in result["engines"]] == ["ddp"]
        assert result["compile"] is result["offload"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nix.yaml"], "nix.yaml: no such recipe file"),
        (["--jsn"], "unknown argument --jsn, did you mean --json?"),
        (["max_steps=3"], "max_steps=3: changes a recipe, and none is given"),
        ([TINY, "max_step=3"], "did you mean max_steps?"),
    ],
)
def test_only_a_wrong_command_line_is_a_mistake(capsys: Any, words: list[str], said: str) -> None:
    assert cli.main(["doctor", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.usefixtures("no_start")
def test_secrets_are_not_printed(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    planted = {
        "NCCL_NET_TOKEN": "SEEN-12345",
        "TORCH_DIST_SECRET": "SEEN",
        "HF_TOKEN": "hf_SEENaaaaaaaaaaaaaaaaaaaaaaaa",
    }
    planted |= {"MASTER_ADDR": "tcp://me:SEEN-678@localhost", "NCCL_DEBUG_FILE": "hf_SEENaaaaaaaaaaaaaaaaaaaaaaaa"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    for words in (["doctor"], ["doctor", "--json"]):
        assert cli.main(words) == 0
        said = capsys.readouterr()
        assert "NCCL_NET_TOKEN" in said.out
        assert "SEEN" not in said.out + said.err


def test_two_ranks_measure_their_links_and_clocks(two_ranks: Ranks) -> None:
    first, second = two_ranks("doctor_cases:measured")
    assert [one["bytes"] for one in first["links"]["all_reduce"]] == [4096, 2**20, 2**21]
    assert {**first["links"], "neighbours": 0, "all_reduce": 0} == {**LINKS, "neighbours": 0, "all_reduce": 0}
    for one in first["links"]["all_reduce"]:
        low, high = one["seconds_iqr"]
        assert 0 < low <= one["seconds"] <= high
        assert one["bytes_per_s"] == one["bytes"] / one["seconds"] == pytest.approx(one["bus_bytes_per_s"])
        assert one["runs"] >= 5
    (pair,) = first["links"]["neighbours"]
    assert (pair["from"], pair["to"]) == (0, 1)
    assert min(pair["latency_s"], pair["bytes_per_s"]) > 0
    (clock,) = first["clocks"]
    # it is one clock
    assert abs(clock["ahead_s"]) <= clock["give_or_take_s"]
    assert first["links"] == second["links"]


def test_three_neighbours_of_four_ranks_are_measured(four_ranks: Ranks) -> None:
    first = four_ranks("doctor_cases:measured")[0]
    pairs = sorted((pair["from"], pair["to"]) for pair in first["links"]["neighbours"])
    assert pairs == [(0, 1), (1, 2), (2, 3)]
    assert [one["rank"] for one in first["clocks"]] == [1, 2, 3]
    for one in first["links"]["all_reduce"]:
        assert one["bus_bytes_per_s"] == pytest.approx(one["bytes_per_s"] * 1.5)


def test_ranks_of_two_machines_are_one_report(two_ranks: Ranks) -> None:
    env = [{"NCCL_ALGO": "Ring"}, {"NCCL_ALGO": "Tree", "GLOO_SOCKET_IFNAME": "no-such"}]
    (_, result), (silence, _) = two_ranks("doctor_cases:examined", env, ["2.13.0", "2.11.0"])
    assert silence == ""
    assert [node["ranks"] for node in result["nodes"]] == [[0], [1]]
    assert result["links"]["ranks"] == 2
    assert any("has torch 2.13.0, " in line and "2.11.0: install the same" in line for line in result["todo"])
    assert any("GLOO_SOCKET_IFNAME=no-such on rank 1" in line for line in result["todo"])
    (differs,) = [one for one in result["network"]["findings"] if one["name"] == "NCCL_ALGO"]
    assert (differs["why"], differs["effect"]) == ("rank 1 has Tree; set it alike on all ranks", False)
    for name in SECTIONS:
        show.section(name, result[name])


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(
        "import os, time\n"
        "from launch.doctor import links, ranks\n"
        "ranks.HANG_S = 2.0\n"
        "measure = links.measure\n"
        "links.measure = lambda topology: time.sleep(600) if topology.rank else measure(topology)\n"
        "ranks.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    monkeypatch.setattr(ranks, "started", lambda module, *arguments: started("hanging", *arguments))
    result = ranks.started_here(0)
    assert result["why"].startswith("rank 1 makes no progress, others wait for it 2 s: ")


def test_ranks_that_end_without_an_answer_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "started", lambda module, *arguments: started("json.nothing", *arguments))
    assert "json.nothing" in ranks.started_here(0)["why"]


def test_a_folder_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    result = disk.look(tmp_path / "runs" / "new")
    assert list(tmp_path.iterdir()) == []
    assert result["unusable"] is None
    assert result["bytes"] == disk.BYTES
    assert min(result["write_bytes_per_s"], result["read_bytes_per_s"]) > 0


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    result = disk.look(tmp_path / "file" / "run")
    assert result["write_bytes_per_s"] is None
    assert "cannot write below" in result["unusable"]
    assert disk.problems(result) == [result["unusable"]]

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert disk.look(tmp_path)["unusable"] == "cannot be written: No space left on device"


@pytest.mark.parametrize(
    ("kind", "on"),
    [("ext4", "this machine"), ("nfs4", "network"), ("fuse.sshfs", "network"), ("tmpfs", "memory"), (None, None)],
)
def test_what_a_folder_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None, on: str | None) -> None:
    mounts = tmp_path / "mountinfo"
    home = tmp_path / "a b"
    home.mkdir()
    point = str(home).replace(" ", "\\040")
    lines = ["22 1 8:1 / / rw - xfs /dev/sda1 rw"] + (
        [f"23 22 0:9 / {point} rw shared:1 - {kind} x rw"] if kind else []
    )
    if kind:
        mounts.write_text("\n".join(lines))
    monkeypatch.setattr(disk, "MOUNTS", mounts)
    monkeypatch.setattr(disk, "BYTES", 2**12)
    result = disk.look(home / "run")
    assert (result["file_system"], result["on"]) == (kind, on)
    assert (result["why"] is None) is (kind is not None)
    assert ("in memory" in str(disk.problems(result))) is (on == "memory")


def test_versions_out_of_range_and_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "1.0", "peft": None}
    real = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: versions.get(name, real(name)))
    result = machine.look()
    said = machine.problems(result, {"devices": None})
    assert said == [
        "torch 1.0 is out of range: pip install 'torch>=2.11'",
        "peft is not installed: pip install 'peft>=0.19'",
    ]


@pytest.mark.parametrize(
    ("cuda", "devices", "there", "said"),
    [
        (None, 0, 2, "2 GPUs, but torch is for CPUs"),
        ("13.0", 0, 2, "2 GPUs, but torch sees none of them"),
        ("13.0", 1, 2, "torch sees 1 of 2 GPUs"),
        ("13.0", 2, 2, None),
        (None, 0, 0, None),
    ],
)
def test_gpus_that_torch_does_not_see(cuda: str | None, devices: int, there: int, said: str | None) -> None:
    result = machine.look() | {"torch": {"cuda": cuda, "nccl": None, "devices": devices, "why": None}}
    lines = machine.problems(result, {"devices": [{}] * there})
    assert [line[: len(said)] for line in lines] == [said] if said else lines == []


def test_clocks_that_are_apart_are_said_and_those_that_may_not_be_are_not() -> None:
    apart = {"rank": 3, "ahead_s": -7.0, "give_or_take_s": 0.1}
    near = {"rank": 2, "ahead_s": 7.0, "give_or_take_s": 6.5}
    found = NOT_REACHED | {"clocks": {**clocks.resolution(), "differences": [apart, near]}}
    said = [line for line in advice.todo(found) if "clock" in line]
    assert said == ["the clock of rank 3 is -7.0 s off rank 0's: see chrony or NTP"]


def test_a_report_that_stopped_half_way_says_why(capsys: Any) -> None:
    report = doctor.Report(as_json=False)
    report.add("network", {"variables": {}, "findings": []})
    report.finish("rank 1 does not answer")
    said = capsys.readouterr().out
    assert "links\n  unknown: rank 1 does not answer\n" in said
    assert "ranks do not talk: rank 1 does not answer" in said


def test_a_link_that_breaks_is_a_reason(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(topology: Topology) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ranks, "connected", lambda: (Topology(world=2), None, None))
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda everyone, mine: everyone.__setitem__(slice(2), [mine, mine])
    )
    monkeypatch.setattr(ranks, "measure", broken)
    monkeypatch.setattr(disk, "BYTES", 2**12)
    result = found(capsys)
    assert result["links"] == result["clocks"] == {"why": "RuntimeError: connection closed by peer"}
    assert "ranks do not talk: RuntimeError: connection closed by peer" in result["todo"]


@pytest.mark.slow
def test_two_ranks_of_torchrun_make_one_report(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "launch", "doctor", TINY, "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [node["ranks"] for node in result["nodes"]] == [[0, 1]]
    assert result["links"]["ranks"] == result["strategies"]["recipe"]["ranks"] == 2


def test_a_real_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launch", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result) == SECTIONS
    assert len(result["links"]["all_reduce"]) >= 2, result["links"]
    assert len(result["clocks"]["differences"]) == result["links"]["ranks"] - 1 == 1
    assert list(tmp_path.iterdir()) == []
