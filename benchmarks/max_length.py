"""The longest sequence of every side under one memory budget.

    python benchmarks/max_length.py 1GiB                                  # above weights and gradients
    python benchmarks/max_length.py 47.5GiB --meta qwen3-8b --bf16        # without a GPU: counted, not run
    python benchmarks/max_length.py --cap 24 --model qwen3-8b --lora 8 --bf16    # all of a GPU's memory, in GiB

Sides are those of `benchmarks/sides.py`. Every length tried is a row of `benchmarks/rows.py`, a fresh process that
runs forward and backward; with `--meta` its live bytes are counted by `distrib/tracker.py` instead. The search
goes along the line through the longest that fits and the shortest that does not, in steps of 1,024 tokens, until the
two are neighbours. Progress goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace

from rows import in_fresh_process
from sides import Case

from distrib.errors import UserError
from launch.device import size_bytes
from launch.longest import Probe, Row, search
from launch.sides import sides_of

SIDES = "gc,gc+ce,streambp,streambp:offload=true"
STEP = 1024
FURTHEST = 4096
"""Steps, 4M tokens: further is not looked for."""


def main() -> None:
    options = parse()
    model, fake = (options.meta, True) if options.meta else (options.model, False)
    case = Case("", 0, model, options.vocabulary, options.kv_heads, options.lora, options.bf16)
    case = replace(case, threads=options.threads, fake=fake, cap_gib=options.cap)
    found = {}
    for side in sides_of(options.sides):
        longest = search(probe_of(replace(case, side=side)), options.budget, FURTHEST)
        found[side] = longest | {"max_length": longest.pop("steps") * STEP} if "steps" in longest else longest
        print(f"{side}: {found[side]}", file=sys.stderr, flush=True)
    print(json.dumps({"budget_bytes": options.budget, "case": asdict(case), "sides": found}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("budget", nargs="?", metavar="BUDGET", help="such as 512MiB or 47.5GiB")
    parser.add_argument("--cap", type=float, metavar="GIB", help="what all of the process may take of a GPU")
    parser.add_argument("--meta", metavar="MODEL", help="count this model's live bytes, run nothing")
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--model", default="512x8", help="hidden size x layers of a Llama, or a name (512x8)")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--lora", type=int, default=0, metavar="R")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if (options.budget is None) == (options.cap is None):
        parser.error("give either BUDGET or --cap GIB")
    if options.budget is not None:
        try:
            options.budget = size_bytes("BUDGET", options.budget)
        except UserError as error:
            parser.error(str(error))
    if options.cap is not None and not has_gpu():
        parser.error(f"--cap {options.cap:g}: there is no GPU here; give BUDGET, the bytes above weights and gradients")
    return options


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def probe_of(case: Case) -> Probe:
    def probe(steps: int) -> Row:
        row = in_fresh_process(replace(case, length=steps * STEP))
        peak = f" {row['peak_bytes'] / 2**20:.0f} MiB" if row["status"] == "ok" else ""
        print(f"{case.side} at {steps * STEP}: {row['status']}{peak}", file=sys.stderr, flush=True)
        return row

    return probe


if __name__ == "__main__":
    main()
