"""What tests ask warm ranks about themselves."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from distrib.heartbeat import collectives, stood
from distrib.topology import Topology


def watched(topology: Topology) -> tuple[tuple[bool, str], int]:
    """What another thread sees of the main one while rank 1 keeps rank 0 waiting, and the collectives it counted."""
    store = dist.distributed_c10d._get_default_store()
    store.delete_key("seen")
    dist.barrier()
    begun = collectives()
    seen: list[tuple[bool, str]] = []

    def look() -> None:
        while not (seen and seen[-1][0]):
            seen.append(stood())
            time.sleep(0.02)
        store.set("seen", "1")

    if topology.rank == 0:
        threading.Thread(target=look).start()
    while topology.rank == 1 and not store.check(["seen"]):
        threading.Thread(target=lambda: seen.append(stood())).start()
        time.sleep(0.05)
    dist.all_reduce(torch.ones(1))
    return seen[-1], collectives() - begun


def listening(topology: Topology) -> list[str]:
    """Addresses on which this process takes connections, as the kernel writes them."""
    mine = set()
    for file in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            mine.add(os.readlink(file))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1].partition(":")[0])
    return found
