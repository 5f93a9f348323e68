"""What metering costs, and on a GPU what its counter is worth.

    python benchmarks/energy.py [--model 256x4] [--length 512] [--steps 5] [--repeats 15]

Overhead: the same steps with and without a meter that is read, and asked for an account, after every step; in pairs,
in alternating order, by the time of all the process's threads, which others on the machine disturb less than the time
that passes. `share` is what metering takes by itself: reading and asking, of a step; sampling, of one processor. Where
there is no GPU, the tests' stand-in for NVML is metered, without a counter so that its power is sampled, which is the
dearest, and a powercap tree of files.

On a GPU also: the counter's period, idle power, and the counter against integrated power over a minute of steps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import mean, median, quantiles
from threading import get_ident
from time import perf_counter, process_time, thread_time
from typing import Any

from sides import Case, build, trainer

from distrib.energy import Meter
from distrib.energy.clock import Clock
from distrib.topology import Topology

ROOT = Path(__file__).resolve().parent.parent
COMPARED_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="256x4", help="hidden size x layers (256x4)")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="of one side of a pair (5)")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    with real() if cuda else stand_in() as make:
        found = compare(make) if cuda else {}
        step = steps_of(options, "cuda" if cuda else "cpu")
        print(json.dumps(overhead(make, step, options) | (found | against_power(step) if cuda else {}), indent=1))


@contextmanager
def real() -> Iterator[Callable[[Clock], Any]]:
    yield lambda clock: Meter(Topology(device_type="cuda"), clock=clock)


@contextmanager
def stand_in() -> Iterator[Callable[[Clock], Any]]:
    """One GPU without a counter, and two packages with memory."""
    sys.path.insert(0, str(ROOT / "tests"))
    from energy_cases import NOT_SUPPORTED, Tree, compiled, standin

    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            sys.exit("no GPU here, and no C compiler to build the stand-in with")
        tree = Tree(Path(folder) / "powercap")
        for index, name in enumerate(("package-0", "dram", "package-1")):
            tree.add("intel-rapl:0:0" if name == "dram" else f"intel-rapl:{index}", name, 100.0)
        with standin(library) as nvml:
            nvml.now.value = -1.0
            nvml.add(energy_error=NOT_SUPPORTED)
            yield lambda clock: Meter(Topology(device_type="cuda"), tree.root, clock, {})


def steps_of(options: argparse.Namespace, device: str) -> Callable[[], None]:
    import torch

    case = Case("plain", options.length, options.model)
    run = trainer(case, build(case, device))
    ids = torch.randint(0, 32000, (1, options.length), device=device)

    def step() -> None:
        run(ids)
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    return step


class Timed(Clock):
    """Knows what its threads took."""

    def __init__(self) -> None:
        self.took_s: dict[int, float] = {}

    def every(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            call()
            self.took_s[get_ident()] = thread_time()

        return super().every(seconds, timed)


def overhead(make: Callable[[Clock], Any], step: Callable[[], object], options: argparse.Namespace) -> dict[str, Any]:
    ratios, step_s, ask_s, sampling = [], [], [], []
    for index in range(options.repeats):
        process_s = {}
        for metered in (True, False) if index % 2 else (False, True):
            if metered:
                process_s[True], asked_s, share = metered_steps(make, step, options.steps)
                ask_s.append(asked_s)
                sampling.append(share)
            else:
                process_s[False], each_s = bare_steps(step, options.steps)
                step_s.append(each_s)
        ratios.append(process_s[True] / process_s[False])
    low, _, high = quantiles(ratios, n=4)
    return {
        "step_s": median(step_s),
        "metered_over_bare": {"median": median(ratios), "quartiles": [low, high]},
        "read_and_account_s": median(ask_s),
        "share": {"read_and_account": median(ask_s) / median(step_s), "sampling": mean(sampling)},
    }


def bare_steps(step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Seconds of all threads, and of one step."""
    step()
    start, began = perf_counter(), process_time()
    for _ in range(steps):
        step()
    return process_time() - began, (perf_counter() - start) / steps


def metered_steps(make: Callable[[Clock], Any], step: Callable[[], object], steps: int) -> tuple[float, float, float]:
    """Seconds of all threads, of one reading with its account, and of the meter's threads by the time that passed."""
    clock = Timed()
    with closing(make(clock)) as meter:
        opened = perf_counter()
        step()
        began, before, asked_s = process_time(), meter.read(), []
        for _ in range(steps):
            step()
            asked = perf_counter()
            after = meter.read()
            meter.between(before, after, tokens=1, steps=1)
            asked_s.append(perf_counter() - asked)
            before = after
        process_s = process_time() - began
        return process_s, median(asked_s), sum(clock.took_s.values()) / (perf_counter() - opened)


def compare(make: Callable[[Clock], Any]) -> dict[str, Any]:
    """Before anything has run on the device."""
    with closing(make(Clock())) as meter:
        idle = meter.measure_idle(5.0)
        sources = [source for source, _ in meter._sources]
        return {"idle_watts": idle, "counter_period_s": {source.name: source.edge_s for source in sources}}


def against_power(step: Callable[[], None]) -> dict[str, Any]:
    """The counter and the integral of power, both over the same steps."""
    import os

    import pynvml

    from distrib.energy import nvml
    from distrib.energy.source import Counter, Power

    clock = Clock()
    uuid = nvml._uuid(Topology(device_type="cuda"), os.environ)
    handle = nvml._handle(uuid)
    counter = Counter("gpu", uuid, clock, 2000.0, lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)
    power = Power("gpu", uuid, clock, 2000.0, lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
    end = clock.now() + 10
    while clock.now() < end:  # the sensor's mean over the last second, and the clocks, settle
        step()
    stop = clock.every(Power.every_s, power.look)
    before = counter.look(), power.look()
    while clock.now() < end + COMPARED_S:
        step()
    counted, integrated = counter.look() - before[0], power.look() - before[1]
    stop()
    return {
        "counter_joules": counted.joules,
        "power_joules": integrated.joules,
        "counter_over_power": counted.joules / integrated.joules,
    }


if __name__ == "__main__":
    main()
