"""The environment that NCCL, gloo and torch read for talking between ranks: what is set, and what of it is wrong.

NCCL takes no offence at a name it does not know or a value it cannot read: it goes on with its default, more slowly.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from distrib.redaction import HIDDEN, clean, one_line
from launch.spawn import say

if TYPE_CHECKING:
    from distrib.topology import Topology

PREFIXES = ("NCCL_", "GLOO_", "MASTER_", "TORCH_NCCL_", "TORCH_DIST", "TORCH_GLOO_", "TORCH_FR_", "TORCH_LOGS")
WRONG, MATTERS, NOTED = "wrong", "matters", "noted"
INFINIBAND = Path("/sys/class/infiniband")
LONGEST = 120

NUMBERS = """
BUFFSIZE CHECKS_DISABLE CHECK_POINTERS COLLNET_ENABLE COMM_BLOCKING CREATE_THREAD_CONTEXT CROSS_NIC CUMEM_ENABLE
CUMEM_HOST_ENABLE DMABUF_ENABLE GDRCOPY_ENABLE GDRCOPY_FLUSH_ENABLE GDRCOPY_SYNC_ENABLE GIN_ENABLE
GRAPH_MIXING_SUPPORT GRAPH_REGISTER IBEXT_DISABLE IB_ADAPTIVE_ROUTING IB_AR_THRESHOLD IB_CUDA_SUPPORT IB_DISABLE
IB_ECE_ENABLE IB_FIFO_TC IB_GID_INDEX IB_MERGE_NICS IB_MERGE_VFS IB_PCI_RELAXED_ORDERING IB_QPS_PER_CONNECTION
IB_RETRY_CNT IB_RETURN_ASYNC_EVENTS IB_ROCE_VERSION_NUM IB_SL IB_SPLIT_DATA_ON_QPS IB_TC IB_TIMEOUT IB_USE_INLINE
IGNORE_COLLNET_MISMATCH IGNORE_CPU_AFFINITY IGNORE_DISABLED_P2P LAUNCH_ORDER_IMPLICIT LEGACY_CUDA_REGISTER
LL128_BUFFSIZE LL_BUFFSIZE LOCAL_REGISTER MAX_CTAS MAX_NCHANNELS MAX_NRINGS MAX_P2P_NCHANNELS MIN_CTAS MIN_NCHANNELS
MIN_NRINGS MNNVL_ENABLE MULTI_RANK_GPU_ENABLE NCHANNELS_PER_NET_PEER NET_DISABLE_INTRA NET_GDR_C2C NET_GDR_READ
NET_SHARED_BUFFERS NET_SHARED_COMMS NSOCKS_PERTHREAD NTHREADS NVB_DISABLE NVLSTREE_MAX_CHUNKSIZE NVLS_CHUNKSIZE
NVLS_ENABLE NVLS_NCHANNELS OOB_NET_ENABLE P2P_DIRECT_DISABLE P2P_DISABLE P2P_NET_CHUNKSIZE P2P_NVL_CHUNKSIZE
P2P_PCI_CHUNKSIZE P2P_USE_CUDA_MEMCPY PROFILE_EVENT_MASK PXN_DISABLE RAS_ENABLE RAS_TIMEOUT_FACTOR RUNTIME_CONNECT
SET_CPU_STACK_SIZE SET_STACK_SIZE SET_THREAD_NAME SHM_DISABLE SHM_LOCALITY SHM_USE_CUDA_MEMCPY
SINGLE_PROC_MEM_REG_ENABLE SOCKET_NTHREADS SOCKET_POLL_TIMEOUT_MSEC SYM_GIN_KERNELS_ENABLE TOPO_DUMP_FILE_RANK
UID_STAGGER_RATE UID_STAGGER_THRESHOLD WIN_ENABLE WIN_STRICT_ORDERING WORK_ARGS_BYTES WORK_FIFO_BYTES
""".split()  # noqa: SIM905
WORDS = """
ALGO COMM_ID CONF_FILE CTA_POLICY DEBUG DEBUG_FILE DEBUG_SUBSYS DEBUG_TIMESTAMP_FORMAT DEBUG_TIMESTAMP_LEVELS
ENV_PLUGIN GIN_PLUGIN GIN_TYPE GRAPH_DUMP_FILE GRAPH_FILE HOSTID IB_ADDR_FAMILY IB_ADDR_RANGE IB_GDR_LEVEL IB_HCA
LAUNCH_MODE NETDEVS_POLICY NET NET_FORCE_MERGE NET_GDR_LEVEL NET_MERGE_LEVEL NET_PLUGIN OOB_NET_IFNAME P2P_LEVEL
PROFILER_PLUGIN PROTO RAS_ADDR RINGS RMA_PLUGIN SOCKET_FAMILY SOCKET_IFNAME SYM_KERNEL TOPO_DUMP_FILE TOPO_FILE
TUNER_CONFIG_FILE TUNER_PLUGIN VERSION
""".split()  # noqa: SIM905
OF_TORCH = """
ABORT_IN_DESTROY_PG ASYNC_ERROR_HANDLING AVOID_RECORD_STREAMS BCAST_UNIQUEID BLOCKING_WAIT COORD_CHECK_MILSEC
CUDA_EVENT_CACHE DEBUG_INFO_PIPE_FILE DEBUG_INFO_TEMP_FILE DESYNC_DEBUG DUMP_ON_TIMEOUT ENABLE_MONITORING
ENABLE_TIMING EXTRA_DUMP_ON_EXEC HEARTBEAT_TIMEOUT_SEC HIGH_PRIORITY LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN NAN_CHECK
PROPAGATE_ERROR RANKS_PER_ROOT RETHROW_CUDA_ERRORS SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING TRACE_BUFFER_SIZE
TRACE_CPP_STACK USE_COMM_NONBLOCKING USE_TENSOR_REGISTER_ALLOCATOR_HOOK WAIT_TIMEOUT_DUMP_MILSEC
""".split()  # noqa: SIM905
KNOWN = {"NCCL_": {*NUMBERS, *WORDS}, "TORCH_NCCL_": {*OF_TORCH}}
MOVED = {"NCCL_ASYNC_ERROR_HANDLING", "NCCL_BLOCKING_WAIT", "NCCL_DESYNC_DEBUG", "NCCL_ENABLE_TIMING"}
"""torch's own, which it has under TORCH_NCCL_ now."""
MAY_DIFFER = ("_IFNAME", "_HCA", "_FILE", "HOSTID", "DEBUG", "_SUBSYS")
"""Ends of names whose values belong to one machine, or to what one rank prints."""
LEVELS = ("VERSION", "WARN", "INFO", "ABORT", "TRACE")
LEFT_ON = {
    "NCCL_P2P_DISABLE": "GPUs of a machine do not reach each other directly, over NVLink or PCIe",
    "NCCL_SHM_DISABLE": "ranks of a machine talk over the network",
    "NCCL_IB_DISABLE": "machines talk over TCP, not InfiniBand or RoCE",
    "TORCH_NCCL_BLOCKING_WAIT": "the host waits for every collective",
    "TORCH_NCCL_DESYNC_DEBUG": "every collective is noted in the store",
}


@dataclass(frozen=True)
class Finding:
    """Of one variable. WRONG: it does not do what it was set for; MATTERS: it does, and slows ranks down; NOTED: it
    may be meant."""

    name: str
    value: str
    kind: str
    why: str
    ranks: tuple[int, ...] = ()
    """Where it is so, when not everywhere."""

    def __str__(self) -> str:
        where = f" on rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return f"{self.name}={self.value}{where}: {self.why}"


def variables(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in sorted(env) if name.startswith(PREFIXES)}


def check(env: Mapping[str, str]) -> list[Finding]:
    """Of one rank, on its machine."""
    here = interfaces()
    return [
        Finding(name, _shown(name, value), kind, why)
        for name, value in variables(env).items()
        for kind, why in _judged(name, value, here)
    ]


def check_all(environments: Sequence[tuple[Mapping[str, str], Sequence[Finding]]]) -> list[Finding]:
    """Of what every rank has set and found, in their order: the findings once each, and where ranks differ."""
    ranks: dict[Finding, list[int]] = defaultdict(list)
    for rank, (_, findings) in enumerate(environments):
        for finding in findings:
            ranks[finding].append(rank)
    world = len(environments)
    merged = [
        Finding(one.name, one.value, one.kind, one.why, () if len(on) == world else tuple(on))
        for one, on in ranks.items()
    ]
    return merged + list(_differing([variables(env) for env, _ in environments]))


def _differing(environments: Sequence[Mapping[str, str]]) -> Iterator[Finding]:
    for name in sorted({name for env in environments for name in env}):
        values = [env.get(name) for env in environments]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            first, second = (
                _shown(name, one) if (one := values[rank]) is not None else "(not set)" for rank in (0, other)
            )
            kind = NOTED if name.endswith(MAY_DIFFER) else WRONG
            yield Finding(name, first, kind, f"rank {other} has {second}; set it alike on all ranks")


def say_once(topology: Topology) -> None:
    """At the start of a run of several ranks: one line of rank 0 where something is wrong or slows them down. All ranks
    call it."""
    if topology.world == 1:
        return
    import torch.distributed as dist

    mine = variables(os.environ)
    everyone: list[tuple[dict[str, str], list[Finding]]] = [({}, [])] * topology.world
    dist.all_gather_object(everyone, (mine, check(mine)))
    found = [one for one in check_all(everyone) if one.kind != NOTED and has_effect(one.name, topology.device_type)]
    if found and topology.main:
        say(f"network environment: {'; '.join(map(str, found))} (`ebbtide doctor` has more)")


def has_effect(name: str, device_type: str) -> bool:
    """NCCL has no part in a run on CPUs."""
    return device_type == "cuda" or "NCCL_" not in name


def _judged(name: str, value: str, interfaces: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    number = _number(value)
    if name in MOVED:
        yield NOTED, f"an old name: torch calls it TORCH_{name}"
    elif unknown := _unknown(name):
        yield unknown
    elif name.removeprefix("NCCL_") in NUMBERS and number is None:
        yield WRONG, "is not a whole number, and NCCL takes something else for it"
    elif name == "MASTER_PORT" and not 0 < (number or 0) < 2**16:
        yield WRONG, "is not a port, 1 to 65535"
    elif name in LEFT_ON and number:
        yield MATTERS, f"{LEFT_ON[name]}; unset it unless that is meant"
    elif name == "NCCL_DEBUG":
        yield from _debug(value)
    elif name == "TORCH_DISTRIBUTED_DEBUG" and value.upper() == "DETAIL":
        yield MATTERS, "every collective is checked on all ranks first; unset it after debugging"
    elif name == "NCCL_IB_HCA":
        yield from _chosen(value, _adapters())
    elif name.endswith("_IFNAME") and interfaces is not None:
        yield from (_named if name.startswith("GLOO_") else _chosen)(value, interfaces)


def _unknown(name: str) -> tuple[str, str] | None:
    prefix = next((prefix for prefix in KNOWN if name.startswith(prefix)), None)
    if prefix is None or (rest := name.removeprefix(prefix)) in KNOWN[prefix]:
        return None
    near = get_close_matches(rest, KNOWN[prefix], n=1, cutoff=0.8)
    return (WRONG, f"no such name, did you mean {prefix}{near[0]}?") if near else (NOTED, "a name not known here")


def _number(value: str) -> int | None:
    """As C reads it, in the base that it begins with."""
    for base in (0, 8):
        with suppress(ValueError):
            return None if "_" in value else int(value, base)
    return None


def _debug(value: str) -> Iterator[tuple[str, str]]:
    if value.upper() not in LEVELS:
        yield WRONG, f"choose {', '.join(LEVELS)}"
    elif value.upper() in ("INFO", "TRACE"):
        yield MATTERS, "every rank prints what NCCL does; WARN is enough when nothing is wrong"


def _named(value: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in value.split(","):
        if name not in names:
            yield WRONG, f"no interface {name!r} here: {_listed(names)}"


def _chosen(value: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """As NCCL reads a list: beginnings of names, or whole ones after `=`; after `^` those that are left out."""
    excluding, value = value.startswith("^"), value.removeprefix("^")
    whole, value = value.startswith("="), value.removeprefix("=")
    wanted = [part.partition(":")[0] for part in value.split(",") if part]

    def meant(name: str) -> bool:
        return any(name == part if whole else name.startswith(part) for part in wanted)

    left = [name for name in names if meant(name) != excluding]
    if not left:
        yield WRONG, f"leaves none of what is here: {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def interfaces() -> list[str] | None:
    """Of this machine; None where the system does not tell."""
    try:
        return [name for _, name in socket.if_nameindex()]
    except OSError:
        return None


def _adapters() -> list[str]:
    return sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []


def _shown(name: str, value: str) -> str:
    return HIDDEN if clean({name: value})[name] == HIDDEN else one_line(value, LONGEST)
