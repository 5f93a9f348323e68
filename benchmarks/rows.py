"""One measured row, in a process of its own.

A first step at a short length warms up; then come the steps that count, each the forward and backward of one sequence
of random tokens from gradients of None, as a training loop leaves them. There is no optimizer. Peaks are above weights
and gradients: what the process held at most, less the weights and less all gradients, which are there at the end.

On a CPU the C library's allocator is asked for one of two things. As it is, it keeps freed blocks, which is fast, and
what is resident is up to three times what is live. With `exact` it gives them back at once: what is resident is what
is live, and every block costs its page faults again. So times are taken as it is, peaks with `exact`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from sides import Case, build, trainer

from distrib.meters import EXACT_MALLOC, Memory, spare_the_machine
from distrib.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
# Two chunks and more of what works in chunks: every kernel has run once.
WARM_UP_LENGTH = 2048


def main() -> None:
    from distrib.errors import UserError

    case = Case(**json.loads(sys.argv[1]))
    spare_the_machine()
    try:
        row = {"status": "ok"} | (measure_fake if case.fake else measure)(case)
    except UserError as error:
        row = {"status": "refused", "why": str(error)}
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error) and "CUDA out of memory" not in str(error):
            raise
        row = {"status": "oom"}
    print(json.dumps(row))


def in_fresh_process(case: Case, exact: bool = True) -> dict[str, Any]:
    """The measured row with `status`: ok, oom or refused (and `why`)."""
    environment = dict(os.environ) | (EXACT_MALLOC if exact else {})
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment |= {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == -signal.SIGKILL:
        return {"status": "oom"}
    if done.returncode:
        sys.exit(f"{case.side} at {case.length} tokens failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(case: Case) -> dict[str, Any]:
    """`peak_bytes` above weights and gradients; of every step the seconds, and those of all processors."""
    import torch

    torch.set_num_threads(case.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if case.cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case.cap_gib * 2**30 / total)
    model = build(case, device)
    train = trainer(case, model)
    ids = torch.randint(model.config.vocab_size, (1, case.length), device=device)
    train(ids[:, :WARM_UP_LENGTH])
    model.zero_grad(set_to_none=True)
    memory, step_s, cpu_s = Memory(Topology(device_type=device)), [], []
    for _ in range(case.steps):
        model.zero_grad(set_to_none=True)
        start, start_cpu = perf_counter(), process_time()
        train(ids)
        if device == "cuda":
            torch.cuda.synchronize()
        step_s.append(perf_counter() - start)
        cpu_s.append(process_time() - start_cpu)
    return {"peak_bytes": peak(memory) - gradient_bytes(model), "step_s": step_s, "cpu_s": cpu_s}


def peak(memory: Memory) -> int:
    found = memory.peak_bytes()
    if found is None:
        sys.exit("this kernel does not tell a process's peak memory: measure on Linux, or on a GPU")
    return found


def gradient_bytes(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def measure_fake(case: Case) -> dict[str, Any]:
    """`peak_bytes` of the same run without its data."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from distrib.tracker import Tracker, materialise, tracking

    fake, tracker = FakeTensorMode(), Tracker()
    model = build(case, "meta")
    materialise(model, fake)
    # Outside: what a strategy tries on small tensors of its own needs their values.
    train = trainer(case, model)
    with tracking(fake, tracker):
        ids = torch.zeros(1, case.length, dtype=torch.int64)
        train(ids[:, :WARM_UP_LENGTH])
        model.zero_grad(set_to_none=True)
        gc.collect()
        tracker.restart()
        train(ids)
    return {"peak_bytes": tracker.peak_bytes() - gradient_bytes(model)}


if __name__ == "__main__":
    main()
