"""Which process this is, among how many, on which device; and the process group between them.

The environment of torchrun, `accelerate launch` (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT) and of
SLURM's srun (SLURM_PROCID and friends) all end here. Without any, it is one process and no group is made.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

from distrib.errors import NotReached, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for another to appear, and at least in a collective."""
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Topology:
    """`tensor` adjacent ranks hold a model's layers together and see the same rows. `stages` ranks hold its layers one
    after the other and see the same rows as well; the ranks of one stage are adjacent. Together they are one of
    `data_world` replicas. `context` adjacent ranks see the same rows too, each a part of every sequence."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    device_type: str = "cpu"
    tensor: int = 1
    stages: int = 1
    context: int = 1

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor * self.context) % self.data_world

    @property
    def data_world(self) -> int:
        return self.world // self.copies

    @property
    def copies(self) -> int:
        """Ranks that see the same rows."""
        return self.tensor * self.stages * self.context

    @property
    def part(self) -> int:
        """Which part of every sequence this rank has."""
        return self.rank % self.context

    @property
    def stage(self) -> int:
        """The place of this rank in its pipeline."""
        return self.rank // (self.world // self.stages)

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda", self.local_rank) if self.device_type == "cuda" else torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0


def _slurm(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, from what srun sets; nothing outside srun or with a single task.

    A batch script without srun has a SLURM_PROCID and a SLURM_NTASKS as well, but is no step.
    """
    if "RANK" in env or "SLURM_STEP_ID" not in env or _integer(env, "SLURM_NTASKS", 1) < 2:
        return {}
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": _tasks_here(env),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env),
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + _integer(env, "SLURM_JOB_ID", 0) % 20000),
    }


def _first_host(env: Mapping[str, str]) -> str:
    """Where rank 0 is. The node that srun was called on comes last: it may be a login node."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST", "")
    first = re.match(r"(?:[^,[]|\[[^]]*\])+", nodes)
    if first is None:
        return env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0])


def _tasks_here(env: Mapping[str, str]) -> str:
    """Of this node, from a list such as 4(x2),3."""
    given = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or env["SLURM_NTASKS"]
    counts: list[str] = []
    for part in given.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[min(_integer(env, "SLURM_NODEID", 0), len(counts) - 1)]


def _integer(env: Mapping[str, str], name: str, default: int) -> int:
    try:
        return int(env.get(name, default))
    except ValueError:
        raise UserError(f"{name}={env[name]!r} in the environment: must be a whole number") from None


def read_environment() -> Topology:
    """The topology that the launcher's environment describes; it sets torchrun's variables when srun started us."""
    os.environ.update(_slurm(os.environ))
    rank, world = _integer(os.environ, "RANK", 0), _integer(os.environ, "WORLD_SIZE", 1)
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} with WORLD_SIZE={world} in the environment: RANK must be below WORLD_SIZE")
    import torch

    if not torch.cuda.is_available():
        # Whoever imports DeepSpeed would otherwise make it look for one, with a warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return Topology(
        rank=rank,
        world=world,
        local_rank=_integer(os.environ, "LOCAL_RANK", 0),
        local_world=_integer(os.environ, "LOCAL_WORLD_SIZE", 1),
        device_type="cuda" if torch.cuda.is_available() else "cpu",
    )


def connect(topology: Topology, hang_timeout_s: float = 0.0) -> Store | None:
    """Make the process group and return its store; None for a single process.

    The store's keys carry torchrun's restart count: a restarted rank must not read the addresses of dead peers.
    """
    import torch
    import torch.distributed as dist

    if topology.device_type == "cuda":
        torch.cuda.set_device(topology.device)
    if topology.world == 1:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE={topology.world} but no {name} in the environment: start with torchrun")
    store = dist.PrefixStore(f"generation-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", _meet(topology))
    _pin_interface(topology)
    backend = "cpu:gloo,cuda:nccl" if topology.device_type == "cuda" else "gloo"
    # A heartbeat that finds a hang in this time names the rank; this is for where none can.
    timeout = max(TIMEOUT, timedelta(seconds=hang_timeout_s)) + timedelta(seconds=30)
    dist.init_process_group(backend, store=store, rank=topology.rank, world_size=topology.world, timeout=timeout)
    return store


def _meet(topology: Topology) -> Store:
    """Where the ranks find each other. Those of one machine talk over its loopback interface: nobody else can."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if topology.local_world == topology.world and "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store: Store = next(iter(rendezvous("env://", topology.rank, topology.world, timeout=TIMEOUT)))[0]
        return store
    host, port = os.environ["MASTER_ADDR"], _integer(os.environ, "MASTER_PORT", 0)
    # torch's own server would listen on all interfaces
    server = _listener(host, port) if topology.main else None
    try:
        return dist.TCPStore(host, port, topology.world, topology.main, timeout=TIMEOUT, master_listen_fd=server)
    except dist.DistNetworkError:
        raise NotReached(
            f"rank 0 does not answer at MASTER_ADDR={host}, MASTER_PORT={port} for {TIMEOUT.total_seconds():g} s: "
            "it is not started, or out of reach"
        ) from None


def _listener(host: str, port: int) -> int | None:
    """At the one address that the name stands for; None where that is no single one of this machine's that others
    reach: a host's own name is often that of its loopback."""
    known: set[str] = set()
    with suppress(socket.gaierror):  # a cluster may know the name a little later
        known = {str(place[4][0]) for place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    address = known.pop() if len(known) == 1 else ""
    if not address or (ip_address(address).is_loopback and address != host):
        return None
    try:
        return socket.create_server((address, port), family=_family(address)).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise UserError(f"MASTER_ADDR={host}, MASTER_PORT={port}: cannot listen there: {error.strerror}") from None


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _pin_interface(topology: Topology) -> None:
    """On several machines, gloo and NCCL use the interface towards rank 0, where the environment names none. They would
    guess by the host's name, which is often the loopback's, or by the order of interfaces."""
    if topology.local_world < topology.world and (name := _interface(os.environ["MASTER_ADDR"])):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def address_towards(host: str) -> str | None:
    """This machine's, by the route there, for IPv4; no packet is sent."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return str(probe.getsockname()[0])
    return None


def _interface(host: str) -> str | None:
    """By the route there, on Linux."""
    if sys.platform != "linux" or not (address := address_towards(host)):
        return None
    import fcntl

    here = socket.inet_aton(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(asked, SIOCGIFADDR, name.encode().ljust(256, b"\0"))
                if found[20:24] == here and name != "lo":
                    return name
    return None


def ensure_group(topology: Topology) -> None:
    """A process group of one, for engines that want a group even there."""
    import torch.distributed as dist

    if topology.world == 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if topology.device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
