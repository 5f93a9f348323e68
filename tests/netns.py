"""Two machines as network namespaces with a cable between them. Nothing outside can be reached from within."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rank_faults import ROOT, Fault, command

ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "tide"
WAIT_S = 240


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_machines() -> Iterator[list[str]]:
    """Their namespaces' names; skips the test where there can be none."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("ss"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"ebbtide-{os.getpid()}-{node}" for node in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces: {error.stderr.strip()}")
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@dataclass
class Run:
    """The images' entry on both machines, as a cluster starts it; one rank each, one folder for both."""

    machines: Sequence[str]
    folder: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, dataset: str, fault: Fault, **changes: object) -> None:
        words, environment = command(self.folder, dataset, fault, **changes)
        script = self.folder / "ebbtide"
        script.write_text(f'#!/bin/sh\nexec {words[0]} -m launch "$@"\n')
        script.chmod(0o755)
        environment |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "MASTER_ADDR": ADDRESSES[0]}
        for node, name in enumerate(self.machines):
            with self._said(node).open("wb") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", name, str(ROOT / "docker" / "entry.sh"), "train", words[-1]],
                        env=environment | {"PET_NNODES": "2", "JOB_COMPLETION_INDEX": str(node)},
                        cwd=self.folder,
                        stderr=stderr,
                    )
                )

    def _said(self, node: int) -> Path:
        return self.folder / f"said-{node}.txt"

    def said(self) -> list[str]:
        """By each machine so far."""
        return [self._said(node).read_text() for node in range(len(self.machines))]

    def struck(self) -> float:
        """Waits until the fault has; when that was."""
        end = time.monotonic() + WAIT_S
        while not (notes := [note.read_text() for note in self.folder.glob("struck-*")]) or not notes[0]:
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.1)
        return float(notes[0])

    def listening(self) -> list[set[str]]:
        """The addresses at which each machine can be called."""
        asked = [ip("netns", "exec", name, "ss", "-Hltn") for name in self.machines]
        return [{line.split()[3].rpartition(":")[0] for line in text.splitlines()} for text in asked]

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes, and what each machine said."""
        return [process.wait(WAIT_S) for process in self.processes], self.said()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
