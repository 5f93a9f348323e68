"""What a checkpoint costs the training it is taken from: in the background, and in every other way.

    python benchmarks/checkpoint.py [--model small] [--length 256] [--interval 20] [--repeats 3] [--threads 1]
    python benchmarks/checkpoint.py --quick

One process trains a model with AdamW, without a checkpoint and with one of every side in turn, the first one rotating:
an interval is so many steps, with one save after the first of them. `held` is the time in which the loop stood still
for it, its share that of an interval without a save; in processor time of the loop's thread as well, which other
programs do not stretch, nor does a wait for the disk. `longer` is by how much the whole interval took longer than the
one without of the same repeat: writing and hashing beside the steps costs them something too. Sides: ours in the
background and blocking, with hashes, manifest and marker, until the folder has its name; torch's `dcp.save`, which
writes and syncs at once, and `dcp.async_save`. Files go below --folder, which should be a disk. The table goes to
stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from streaming import machine, spread, with_quartiles

NONE = "none"


@dataclass(frozen=True)
class Seen:
    seconds: float
    held_s: float
    cpu_s: float
    held_cpu_s: float


def main() -> None:
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, Path(folder))
    print(table(result), file=sys.stderr)
    print(json.dumps(result, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a built-in model (small)")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--interval", type=int, default=20, help="steps between two saves (20)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where checkpoints go (the system's temporary folder)")
    parser.add_argument("--quick", action="store_true", help="the model tiny, two steps, once")
    options = parser.parse_args()
    if options.quick:
        options.model, options.length, options.interval, options.repeats = "tiny", 32, 2, 1
    return options


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    trainer = Trainer(options)
    for _ in range(2):
        trainer.step()
    sides: list[str] = [NONE, *SIDES]
    seen: dict[str, list[Seen]] = {side: [] for side in sides}
    size = 0
    for repeat in range(options.repeats):
        for side in sides[repeat % len(sides) :] + sides[: repeat % len(sides)]:
            target = folder / f"{side.replace(' ', '-')}-{repeat}"
            target.mkdir()
            seen[side].append(interval(trainer, side, options.interval, target))
            size = max(size, sum(path.stat().st_size for path in target.rglob("*") if path.is_file()))
            shutil.rmtree(target)
            print(f"{repeat + 1} {side} {seen[side][-1]}", file=sys.stderr, flush=True)
    rows = []
    for side in SIDES:
        pairs = list(zip(seen[side], seen[NONE], strict=True))
        row = {
            "held_s": [one.held_s for one, _ in pairs],
            "held_percent": [100 * one.held_s / alone.seconds for one, alone in pairs],
            "held_cpu_percent": [100 * one.held_cpu_s / alone.cpu_s for one, alone in pairs],
            "longer_percent": [100 * (one.seconds / alone.seconds - 1) for one, alone in pairs],
        }
        rows.append({"side": side, **{key: spread(values) for key, values in row.items()}})
    known = {name: value for name, value in vars(options).items() if name not in ("folder", "quick")}
    return {
        **known,
        **machine(),
        "checkpoint_bytes": size,
        "step_s": spread([alone.seconds for alone in seen[NONE]])["median"] / options.interval,
        "rows": rows,
    }


def interval(trainer: Trainer, side: str, steps: int, folder: Path) -> Seen:
    begin, begin_cpu, held, held_cpu, busy = perf_counter(), thread_time(), 0.0, 0.0, None
    for index in range(steps):
        trainer.step()
        now, now_cpu = perf_counter(), thread_time()
        if index == 0 and side != NONE:
            busy = SIDES[side](trainer, folder)
        elif busy is not None and busy(index == steps - 1):
            busy = None
        held += perf_counter() - now
        held_cpu += thread_time() - now_cpu
    return Seen(perf_counter() - begin, held, thread_time() - begin_cpu, held_cpu)


class Trainer:
    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        import strategies
        from distrib.engines import Settings, make
        from distrib.saving import CopyBuffer
        from distrib.topology import Topology, ensure_group
        from launch.models import Weights, build, load_config
        from launch.recipe import Recipe

        topology = Topology()
        # For async_save.
        ensure_group(topology)
        recipe = Recipe(model_name_or_path=options.model)
        config = load_config(recipe)
        model = build(recipe, config)
        plain = [strategies.get("plain")()]
        strategies.edit(model, plain, topology)
        self.engine: Any = make("ddp", model, Weights(recipe, config, topology).fill, topology, Settings())
        self._run = strategies.prepare(model, plain, engine=self.engine)
        self.buffer = CopyBuffer()
        self._ids = torch.randint(256, (1, options.length), generator=torch.Generator().manual_seed(0))

    def step(self) -> None:
        self._run({"input_ids": self._ids, "labels": self._ids})
        self.engine.step(1e-4, 1.0)


def ours(background: bool) -> Callable[[Trainer, Path], Any]:
    def save(trainer: Trainer, folder: Path) -> Any:
        from distrib.checkpoint import Manifest, Progress
        from distrib.saving import Saving

        buffer = trainer.buffer if background else None
        saving = Saving(folder, trainer.engine, Manifest(Progress(1), 1, "ddp", 1), buffer)

        def finished(last: bool) -> bool:
            if not (saving.written or last):
                return False
            assert saving.finish(None, False) is None
            return True

        return None if not background and finished(True) else finished

    return save


def by_torch(background: bool) -> Callable[[Trainer, Path], Any]:
    def save(trainer: Trainer, folder: Path) -> Any:
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not background:
                dcp.save(trainer.engine._state(), checkpoint_id=str(folder))
                return None
            future: Any = dcp.async_save(trainer.engine._state(), checkpoint_id=str(folder))
        return lambda last: (future.done() or last) and future.result() is not None

    return save


SIDES = {
    "background": ours(True),
    "blocking": ours(False),
    "dcp.save": by_torch(False),
    "dcp.async_save": by_torch(True),
}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| side | held, s | % of an interval | % in processor time | interval longer by, % |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        figures = [with_quartiles(row[key]) for key in ("held_s", "held_percent", "held_cpu_percent", "longer_percent")]
        lines.append(f"| {row['side']} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
