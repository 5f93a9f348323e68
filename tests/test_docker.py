"""Images and scripts of clusters: linters where they are installed, what the files promise each other, and the scripts
run with stand-ins for what a cluster has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_ranges import ROOT

from launch.spawn import STOPPED

DOCKER = ROOT / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSES = sorted(DOCKER.glob("compose*.yaml"))
PYTORCHJOB: dict[str, Any] = yaml.safe_load((DOCKER / "kubernetes-pytorchjob.yaml").read_text())
SERVICE, POLICY, JOB = yaml.safe_load_all((DOCKER / "kubernetes-job.yaml").read_text())


def tool(name: str) -> str:
    """Of this environment, or of the machine."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    passes(tool("shellcheck"), str(script))


def test_hadolint() -> None:
    passes(tool("hadolint"), str(DOCKER / "Dockerfile"))


@pytest.mark.parametrize("file", COMPOSES, ids=lambda path: path.stem)
def test_docker_compose_config(file: Path) -> None:
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker has no compose")
    passes(docker, "compose", "-f", str(file), "--profile", "*", "config", "--quiet")


def pods() -> dict[str, dict[str, Any]]:
    replicas = PYTORCHJOB["spec"]["pytorchReplicaSpecs"]
    return {"Job": JOB["spec"]["template"]} | {kind: spec["template"] for kind, spec in replicas.items()}


def test_kubernetes_knows_every_field() -> None:
    """Of the PyTorchJob, which is not Kubernetes' own, the pods."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    found = [{"apiVersion": "v1", "kind": "Pod", **template} for template in pods().values()]
    for resource in [SERVICE, POLICY, JOB, *found]:
        kubernetes_validate.validate(resource, "1.37", strict=True)


def runs_as() -> int:
    users = re.findall(r"^USER (\d+):\1$", DOCKERFILE, re.MULTILINE)
    assert len(users) == DOCKERFILE.count("\nUSER ") == 2
    return int(users[0])


@pytest.mark.parametrize("kind", pods())
def test_pods_are_confined(kind: str) -> None:
    pod = pods()[kind]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"].items() >= {"runAsNonRoot": True, "runAsUser": runs_as()}.items()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"runs": "/runs", "home": "/home/ebbtide", "tmp": "/tmp", "shm": "/dev/shm"}
    assert [volume["name"] for volume in pod["volumes"]] == list(mounted)
    assert pod["volumes"][-1]["emptyDir"]["medium"] == "Memory"


def test_the_jobs_parts_fit_together() -> None:
    spec, pod = JOB["spec"], JOB["spec"]["template"]["spec"]
    name = SERVICE["metadata"]["name"]
    told = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
    assert int(told["PET_NNODES"]) == spec["completions"] == spec["parallelism"]
    assert int(told["PET_NPROC_PER_NODE"]) == pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert told["MASTER_ADDR"] == f"{JOB['metadata']['name']}-0.{name}"
    assert pod["subdomain"] == name
    assert int(told["MASTER_PORT"]) == SERVICE["spec"]["ports"][0]["port"]
    labels = JOB["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == POLICY["spec"]["podSelector"]["matchLabels"] == labels
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2]), ("Ignore", [STOPPED]), ("Ignore", None)]
    assert pod["restartPolicy"] == "Never"  # a policy on failures needs it


def test_the_pytorchjob_is_as_the_operator_wants_it() -> None:
    spec = PYTORCHJOB["spec"]
    assert spec["pytorchReplicaSpecs"].keys() == {"Master", "Worker"}
    (container,) = pods()["Master"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert container["ports"][0]["name"] == "pytorchjob-port"
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]


@pytest.mark.parametrize("file", COMPOSES, ids=lambda path: path.stem)
def test_composed_containers_are_confined(file: Path) -> None:
    composed = yaml.safe_load(file.read_text())
    for service in composed["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "ports" not in service
        assert re.search(rf"^FROM run AS {service['build']['target']}$", DOCKERFILE, re.MULTILINE)


def test_two_composed_machines_are_one_job() -> None:
    composed = yaml.safe_load((DOCKER / "compose.two-nodes.yaml").read_text())
    services = composed["services"]
    for index, service in enumerate(services.values()):
        told = service["environment"]
        assert int(told["PET_NNODES"]) == len(services)
        assert int(told["PET_NODE_RANK"]) == index
        assert told["MASTER_ADDR"] == next(iter(services))
    assert composed["networks"] == {"ranks": {"internal": True}}


def test_the_image_installs_the_locks_and_nothing_else() -> None:
    for kind in ("cpu", "cuda"):
        stage = DOCKERFILE.split(f"AS install-{kind}\n")[1].split("\nFROM ")[0]
        assert f"docker/requirements-{kind}.lock" in stage
        assert f"./install.sh requirements-{kind}.lock" in stage
    assert "pip" not in re.sub(r"(?m)^(#.*|ENV.*|RUN python -m venv.*)$|PIP_EXTRA_INDEX_URL", "", DOCKERFILE)
    installs = re.findall(r'^ *"\$\{pip\[@\]\}" (.*)$', (DOCKER / "install.sh").read_text(), re.MULTILINE)
    assert [words.split()[0] for words in installs] == [".", "--require-hashes", "--require-hashes"]
    assert "--no-deps --no-build-isolation)" in (DOCKER / "install.sh").read_text()


def test_what_is_copied_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [words.split()[:-1] for words in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)]
    for path in (path for paths in copied for path in paths):
        assert (ROOT / path).exists()
        assert any(Path(path).match(pattern) for pattern in kept), path


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("code", [0, 1, 2, STOPPED])
def test_slurm_queues_again_what_stopped_with_a_checkpoint(tmp_path: Path, code: int) -> None:
    stand_in(tmp_path, "srun", f'echo "$@" > said; exit {code}')
    stand_in(tmp_path, "scontrol", '[ "$*" = "requeue 4242" ] && touch queued')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4242"}
    done = subprocess.run(
        [str(DOCKER / "slurm.sh"), "mine.yaml", "seed=1"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    assert done.returncode == code
    assert (tmp_path / "said").read_text().endswith("ebbtide train mine.yaml seed=1\n")
    assert (tmp_path / "queued").exists() == (code == STOPPED)


def health(folder: Path, pid: int) -> int:
    environment = {"PATH": os.environ["PATH"], "EBBTIDE_RUNS": str(folder), "TMPDIR": str(folder)}
    return subprocess.run([str(DOCKER / "health.sh"), str(pid)], env=environment, capture_output=True).returncode


def test_a_run_that_no_longer_writes_is_unhealthy(tmp_path: Path) -> None:
    journal = tmp_path / "mine" / "metrics.jsonl"
    journal.parent.mkdir()
    journal.touch()
    (tmp_path / "ebbtide-started").touch()
    now = time.time()
    with subprocess.Popen(["bash", "-c", "exec -a ebbtide sleep 60"]) as process:
        try:
            os.utime(journal, (now - 9000, now - 9000))
            os.utime(tmp_path / "ebbtide-started", (now - 8000, now - 8000))
            assert health(tmp_path, process.pid) == 0, "an earlier container's run says nothing"
            os.utime(journal, (now - 7000, now - 7000))
            assert health(tmp_path, process.pid) == 1
            os.utime(journal, (now - 60, now - 60))
            assert health(tmp_path, process.pid) == 0
            assert health(tmp_path, 1) == 1, "another program"
        finally:
            process.kill()
