"""Loss on held-out text after equal time: chunked training with sampled backwards against all of them.

    python benchmarks/spaco.py [--seconds 120] [--seeds 3] [--length 1024] [--chunk 64] [CONTENDER ...]
    python benchmarks/spaco.py seco spaco:p=0.25 spaco:p=0.125

A contender is a strategy with fields, `name:field=value:field=value`; `chunk` is given to all. Each is trained from
the same weights on the same rows for the same time, on random windows of this machine's standard library, with AdamW
and a learning rate that falls to zero as the time runs out. The peak rate is each contender's own best of
`--learning-rates`, found on a seed that is not reported: noisy gradients want a smaller one.

Time is the processor time of this process on a CPU (neighbours do not change it), wall time on a GPU; evaluation is
not counted. `steps` says how many sequences each contender could afford. Differences between seeds are large beside
differences between contenders: look at `against_first`, paired by seed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from launch.sides import section

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = [
    "seco",
    "spaco:p=0.5",
    "spaco:p=0.25",
    "spaco:p=0.125",
    "spaco_published:share=0.125",
    "spaco_published:share=0.125:scale_loss=true",
]
WARM_UP_STEPS = 20
HELD_OUT_ROWS = 16


@dataclass(frozen=True)
class Run:
    """What one training came to."""

    contender: str
    seed: int
    learning_rate: float
    held_out_loss: float
    steps: int


def main() -> None:
    sys.path.insert(0, str(ROOT))
    options = parse()
    runs = [run for seed in range(options.seeds) for run in race(options, seed)]
    report = {"settings": vars(options) | machine(), "rows": summary(options, runs), "runs": [asdict(r) for r in runs]}
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=DEFAULT, metavar="CONTENDER", help=" ".join(DEFAULT))
    parser.add_argument("--seconds", type=float, default=120, help="of each training (120)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], metavar="RATE")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def race(options: argparse.Namespace, seed: int) -> list[Run]:
    """Every contender once, each at its own best learning rate, in an order that changes with the seed."""
    turn = seed % len(options.contenders)
    order = options.contenders[turn:] + options.contenders[:turn]
    return [train(options, contender, best_rate(options, contender), seed) for contender in order]


_best: dict[str, float] = {}


def best_rate(options: argparse.Namespace, contender: str) -> float:
    if contender not in _best:
        rates = options.learning_rates
        # Seeds of the report count from 0.
        trials = [train(options, contender, rate, seed=-1) for rate in rates] if len(rates) > 1 else []
        _best[contender] = min(trials, key=lambda run: run.held_out_loss).learning_rate if trials else rates[0]
    return _best[contender]


def train(options: argparse.Namespace, contender: str, peak_rate: float, seed: int) -> Run:
    import torch

    import strategies

    torch.set_num_threads(options.threads)
    torch.manual_seed(seed + 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model().to(device)
    step = strategies.prepare(model, [parsed(contender, options.chunk)])
    text, held_out = corpus(device)
    rows = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    # The first step compiles, tries the model and warms the allocator; its gradient is not used.
    step(window(text, options.length, random.Random(seed)))
    optimizer.zero_grad()
    clock, steps = clock_of(device), 0
    while (spent := clock() / options.seconds) < 1:
        step(window(text, options.length, rows))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = peak_rate * min(1, (steps + 1) / WARM_UP_STEPS) * (1 - spent)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    loss = evaluate(model, step, held_out, options.length)
    print(f"{contender} seed {seed} rate {peak_rate:g}: loss {loss:.4f}, {steps} steps", file=sys.stderr, flush=True)
    return Run(contender, seed, peak_rate, loss, steps)


def parsed(contender: str, chunk: int) -> Any:
    """`spaco:p=0.25` as a strategy."""
    from strategies.core.registry import build

    return build([{"chunk": chunk} | section(contender)])[0]


def make_model() -> Any:
    from transformers import AutoModelForCausalLM

    from launch.models import load_config
    from launch.recipe import Recipe

    return AutoModelForCausalLM.from_config(load_config(Recipe(model_name_or_path="tiny")))


def corpus(device: Any) -> tuple[Tensor, Tensor]:
    """Bytes to train on, and the last tenth of the files, which are held out."""
    import torch

    from launch.data.sources import open_source
    from launch.recipe import Source

    files = [record["text"].encode() for record in open_source(Source(name="stdlib")).read()]
    random.Random(0).shuffle(files)
    cut = len(files) * 9 // 10
    parts = (b"\n".join(files[:cut]), b"\n".join(files[cut:]))
    train_n, held_out_n = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long().to(device) for part in parts)
    return train_n, held_out_n


def window(text: Tensor, length: int, rows: random.Random) -> dict[str, Tensor]:
    start = rows.randrange(len(text) - length)
    ids = text[start : start + length][None]
    return {"input_ids": ids, "labels": ids}


def clock_of(device: Any) -> Callable[[], float]:
    """Seconds since now."""
    import torch

    def wall() -> float:
        torch.cuda.synchronize()
        return perf_counter()

    now = wall if device.type == "cuda" else process_time
    start = now()
    return lambda: now() - start


def evaluate(model: Any, step: Any, held_out: Tensor, length: int) -> float:
    """Mean loss of a token."""
    model.eval()
    rows = random.Random(0)
    batches = [window(held_out, length, rows) for _ in range(HELD_OUT_ROWS)]
    total = sum(float(logprobs.sum()) for logprobs in step.logprobs(batches))
    return -total / (HELD_OUT_ROWS * (length - 1))


def summary(options: argparse.Namespace, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row a contender; `against_first` is its loss less that of the first one, paired by seed."""
    by_seed = {(run.contender, run.seed): run for run in runs}
    rows = []
    for contender in options.contenders:
        own = [by_seed[contender, seed] for seed in range(options.seeds)]
        losses = [run.held_out_loss for run in own]
        first = [by_seed[options.contenders[0], seed].held_out_loss for seed in range(options.seeds)]
        rows.append(
            {
                "contender": contender,
                "learning_rate": own[0].learning_rate,
                "held_out_loss": round(mean(losses), 4),
                "held_out_loss_std": round(stdev(losses), 4) if len(losses) > 1 else None,
                "against_first": [round(mine - theirs, 4) for mine, theirs in zip(losses, first, strict=True)],
                "steps": round(mean(run.steps for run in own)),
            }
        )
    return rows


def machine() -> dict[str, str]:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}


if __name__ == "__main__":
    main()
