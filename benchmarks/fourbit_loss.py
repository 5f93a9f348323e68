"""Final loss on held-out text of training with 4-bit linears, against bf16 from the same weights on the same rows.

    python benchmarks/fourbit_loss.py [--steps 600] [--seeds 3] [--sides "bf16,fp4 paper,int4 hq_bs"] [--output FILE]

A Llama on the bytes of this machine's standard library, AdamW under autocast in bf16, its rate constant after a warmup
and falling to zero in the last fifth of the steps: what is in the target precision at the end is still learning.
A seed has one set of first weights and one order of rows, which all sides share. `fp32` shows how far two sides lie
apart that differ in roundings which do not matter. The naive sides are what comes to mind first: one scale a tensor,
everything rounded to the nearest, gradients too.

The loss as trained is that of the forward as it is at the end of training, rounded where it is rounded; the loss as
exported is that of the plain weights. Both are of the same windows of files that are not trained on. Ratios to bf16 are
paired by seed; *text* is the standard error that comes from the choice of windows, of ratios paired by window. Bounds
are on the mean ratio as trained.

Every run is written to `--output` as it ends, and is not run again. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from time import process_time
from typing import TYPE_CHECKING, Any

from spaco import corpus, machine, window

from distrib.errors import choose

if TYPE_CHECKING:
    from torch import Tensor

    from strategies import Prepared, Strategy

BASE = "bf16"
EXACT = "fp32"
SIDES: dict[str, dict[str, Any]] = {
    BASE: {"name": "plain"},
    EXACT: {"name": "plain"},
    "fp4 paper": {"name": "fp4", "preset": "paper"},
    "fp4 nvfp4": {"name": "fp4", "preset": "nvfp4"},
    "fp4 mxfp4": {"name": "fp4", "preset": "mxfp4"},
    "int4 hq_bs": {"name": "int4", "preset": "hq_bs"},
    "int4 paper": {"name": "int4", "preset": "paper"},
    "naive int4": {"name": "int4", "rules": {"*": "naive_int4"}},
    "naive fp4": {"name": "fp4", "rules": {"*": "naive_fp4"}, "target_share": 0.0},
}
BOUNDS = {"fp4 paper": 0.005, "fp4 nvfp4": 0.005, "int4 hq_bs": 0.015}
QUICK = {"steps": 15, "seeds": 1, "hidden": 64, "length": 64, "batch": 4, "windows": 8}


@dataclass(frozen=True)
class Case:
    """One training."""

    side: str
    seed: int
    steps: int
    hidden: int
    layers: int
    length: int
    batch: int
    learning_rate: float
    windows: int


@dataclass(frozen=True)
class Run:
    """What it came to: mean loss of a byte, window by window."""

    case: Case
    trained: list[float]
    exported: list[float]
    cpu_s: float


def main() -> None:
    options = parse()
    shared = {field.name: getattr(options, field.name) for field in fields(Case)[2:]}
    cases = [Case(side, seed, **shared) for seed in range(options.seeds) for side in options.sides]
    runs = finished(cases, options.output, options.processes)
    rows = summary(options.sides, [runs[case] for case in cases])
    print(table(rows), file=sys.stderr)
    print(json.dumps({"machine": machine(), "settings": shared | {"seeds": options.seeds}, "rows": rows}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=list(SIDES), type=lambda text: text.split(","), help=", ".join(SIDES))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=1024, help="held out, of --length bytes (1024)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, of one thread each (2)")
    parser.add_argument("--output", type=Path, help="of JSON lines")
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args()
    for side in options.sides:
        if side not in SIDES:
            parser.error(str(choose("--sides", side, SIDES)))
    if BASE not in options.sides:
        parser.error(f"--sides: add {BASE}, which the others are held against")
    return options


def finished(cases: list[Case], output: Path | None, processes: int) -> dict[Case, Run]:
    """The runs of all cases: those in the file, and the others, which are added to it."""
    lines = output.read_text().splitlines() if output and output.exists() else []
    earlier = [Run(**(made | {"case": Case(**made["case"])})) for made in map(json.loads, lines)]
    runs = {run.case: run for run in earlier}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, case) for case in cases if case not in runs]):
            run = future.result()
            runs[run.case] = run
            print(f"{run.case.side}, seed {run.case.seed}: {mean(run.trained):.4f}", file=sys.stderr, flush=True)
            if output:
                with output.open("a") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
    return runs


def train(case: Case) -> Run:
    import torch

    import strategies
    from distrib.contracts import Context
    from distrib.optim import OptimizerSpec, Schedule

    torch.set_num_threads(1)
    start = process_time()
    model = make_model(case)
    step = strategies.prepare(model, [strategy_of(case.side)])
    optimizer = OptimizerSpec(betas=(0.9, 0.95), weight_decay=0.1).build(model.named_parameters())
    rate = Schedule(case.learning_rate, case.steps, case.steps // 20, "warmup_stable_decay")
    text, held_out = corpus("cpu")
    rows = random.Random(case.seed)
    for index in range(case.steps):
        batch = together([window(text, case.length, rows) for _ in range(case.batch)])
        context = Context(case.seed, index, case.batch * (case.length - 1), case.steps)
        with autocast(case):
            step(batch, context)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(index)
        optimizer.step()
        optimizer.zero_grad()
    trained = losses(step, held_out, case)
    model.eval()
    return Run(case, trained, losses(step, held_out, case), process_time() - start)


def make_model(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from launch.models import load_config
    from launch.recipe import Recipe

    shape = {
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * 8 // 3,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.hidden // 64,
        "num_key_value_heads": case.hidden // 64,
    }
    torch.manual_seed(case.seed)
    return AutoModelForCausalLM.from_config(load_config(Recipe(config_overrides=shape))).train()


def strategy_of(side: str) -> Strategy:
    import strategies
    from strategies.lowbit.formats import E2M1, INT4, TENSOR, Scaled
    from strategies.lowbit.precision import PRECISIONS, Precision

    for name, format in (("naive_int4", INT4), ("naive_fp4", E2M1)):
        scaled = Scaled(format, TENSOR)
        PRECISIONS[name] = Precision(scaled, scaled, scaled, stochastic=False)
    return strategies.build([SIDES[side]])[0]


def autocast(case: Case) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=case.side != EXACT)


def together(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    import torch

    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def losses(step: Prepared, held_out: Tensor, case: Case) -> list[float]:
    """Of windows spread over the whole text, as many at a time as in training: they share scales."""
    import torch

    starts = torch.arange(case.windows) * (len(held_out) - case.length) // case.windows
    rows = held_out[starts[:, None] + torch.arange(case.length)]
    with autocast(case):
        found = step.logprobs([{"input_ids": ids, "labels": ids} for ids in torch.split(rows, case.batch)])
    return [round(loss, 5) for loss in (-torch.cat(found).sum(1) / (case.length - 1)).tolist()]


def summary(sides: list[str], runs: list[Run]) -> list[dict[str, Any]]:
    rows = []
    base = [run for run in runs if run.case.side == BASE]
    for side in sides:
        own = [run for run in runs if run.case.side == side]
        row: dict[str, Any] = {"side": side, "cpu_s": round(mean(run.cpu_s for run in own))}
        for what in ("trained", "exported"):
            of_seeds = [mean(getattr(run, what)) for run in own]
            ratios = [loss / mean(getattr(run, what)) for loss, run in zip(of_seeds, base, strict=True)]
            row[what] = {
                "loss": [round(loss, 4) for loss in of_seeds],
                "ratio": mean(ratios),
                "spread": stdev(ratios) if len(ratios) > 1 else None,
            }
        row["text"] = text_error(own, base)
        row["bound"] = bound = BOUNDS.get(side)
        row["met"] = None if bound is None else abs(row["trained"]["ratio"] - 1) <= bound
        rows.append(row)
    return rows


def text_error(own: list[Run], base: list[Run]) -> float:
    mine, theirs = (list(map(mean, zip(*(run.trained for run in runs), strict=True))) for runs in (own, base))
    ratio = mean(mine) / mean(theirs)
    error = stdev([a - ratio * b for a, b in zip(mine, theirs, strict=True)])
    return float(error / math.sqrt(len(mine)) / mean(theirs))


def table(rows: list[dict[str, Any]]) -> str:
    """The spread is the ratios' standard deviation over seeds."""
    seeds = [f"seed {seed}" for seed in range(len(rows[0]["trained"]["loss"]))]
    heads = ["side", *seeds, "against bf16", "spread", "text", "bound", "met", "as exported"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        trained, exported = row["trained"], row["exported"]
        cells = [row["side"], *(f"{loss:.4f}" for loss in trained["loss"])]
        if row["side"] == BASE:
            cells += [""] * 6
        else:
            cells += [percent(trained["ratio"] - 1, "+"), percent(trained["spread"]), percent(row["text"])]
            cells += [percent(row["bound"]), {True: "yes", False: "**no**", None: ""}[row["met"]]]
            cells += [percent(exported["ratio"] - 1, "+")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(share: float | None, sign: str = "") -> str:
    return "" if share is None else f"{share:{sign}.2%}"


if __name__ == "__main__":
    main()
