"""Every launcher ends in the same entry: two real ranks train together and give what one process gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from train_cases import SHAPE, answers, lines, recipe, trained, write_rows

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run")
ACCELERATE = ("-m", "accelerate.commands.launch")
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, and the losses of one process."""
    folder = tmp_path_factory.mktemp("launchers")
    data = write_rows(folder / "rows.jsonl", answers(14))
    keys = {"dataset": data, "max_length": 64, "max_steps": 2, "global_batch_size": 4, "config_overrides": SHAPE}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    trained(recipe(folder / "alone", data, max_steps=2))
    return folder


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def together(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> tuple[list[int], list[str]]:
    """Exit codes and what was said, of commands that run at the same time."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    known |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=known | environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


def train(workplace: Path, name: str, *words: str) -> tuple[str, ...]:
    recipe = str(workplace / "recipe.yaml")
    return ("-m", "launch", "train", recipe, f"output_dir={workplace / name}", "engine.name=fsdp2", *words)


def assert_two_ranks_trained(workplace: Path, name: str, codes: list[int], said: list[str]) -> None:
    assert set(codes) == {0}, "\n".join(said)
    assert sum(f"final: {workplace / name}/final" in text for text in said) == 1
    assert '"world": 2' in (workplace / name / "report.json").read_text()
    expected = [line["loss"] for line in lines(workplace / "alone")]
    assert [line["loss"] for line in lines(workplace / name)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_torchrun_on_two_nodes(workplace: Path) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    node = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint)
    command = (*TORCHRUN, *node, "--rdzv-id", "1", *train(workplace, "nodes"))
    assert_two_ranks_trained(workplace, "nodes", *together([command, command], [{}, {}]))


@pytest.mark.slow
def test_accelerate_launch(workplace: Path) -> None:
    """Its --cpu starts one process whatever else is asked; --multi_gpu starts as many as asked without any GPU."""
    own = ("--multi_gpu", "--num_processes", "2", "--main_process_port", free_port())
    command = (*ACCELERATE, *own, *train(workplace, "accelerate", "--seed", "42"))
    assert_two_ranks_trained(workplace, "accelerate", *together([command], [{}]))


def test_accelerate_launch_on_a_cpu_is_one_process(workplace: Path) -> None:
    command = (*ACCELERATE, "--cpu", "--num_processes", "2", *train(workplace, "cpu", "max_steps=1"))
    codes, said = together([command], [{}])
    assert codes == [0], said
    assert '"world": 1' in (workplace / "cpu" / "report.json").read_text()


def slurm(rank: int) -> dict[str, str]:
    """What srun gives to two tasks on one node."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",
    }


def test_srun(workplace: Path) -> None:
    """The node that srun was called on, which cannot be reached here, plays no part."""
    port = free_port()
    environments = [slurm(rank) | {"MASTER_PORT": port} for rank in range(2)]
    codes, said = together([train(workplace, "srun", "nproc=2")] * 2, environments)
    assert_two_ranks_trained(workplace, "srun", codes, said)


@pytest.mark.slow
def test_a_batch_script_without_srun_starts_its_own_ranks(workplace: Path) -> None:
    environment = {name: value for name, value in slurm(0).items() if "STEP" not in name} | {"SLURM_NTASKS": "8"}
    result = together([train(workplace, "batch", "nproc=2")], [environment])
    assert_two_ranks_trained(workplace, "batch", *result)


def test_nproc_that_contradicts_the_launcher_is_said(workplace: Path) -> None:
    environments = [slurm(rank) | {"MASTER_PORT": "1"} for rank in range(2)]
    codes, said = together([train(workplace, "srun of 3", "nproc=3")] * 2, environments)
    assert codes == [2, 2]
    assert said == [
        "ebbtide: nproc=3, but the launcher started 2 ranks on this machine: leave nproc out, or start 3\n",
        "",
    ]


@pytest.mark.slow
def test_torchrun_adds_its_table_to_a_mistake(workplace: Path) -> None:
    """Our line comes first and once; the exit code is torchrun's."""
    command = (*TORCHRUN, "--standalone", "--nproc-per-node", "2", *train(workplace, "wrong", "max_length=99999"))
    codes, said = together([command], [{}])
    assert codes == [1]
    ours = [line for line in said[0].splitlines() if line.startswith("ebbtide: ")]
    assert ours == ["ebbtide: max_length=99999: this model takes at most 32768 tokens"]
    assert "ChildFailedError" in said[0].split(ours[0])[1]
