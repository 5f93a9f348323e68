"""What recomputation saves and costs: every policy by name, `auto` at the bytes each of them holds, and checkpointing.

    python benchmarks/recompute.py [--model 512x8] [--length 4096] [--bf16] [--repeats 5]
    python benchmarks/recompute.py --attention eager --length 1024 --sides plain,recompute:policy=attention
    python benchmarks/recompute.py --model llama-3-8b --lora 16 --bf16 --length 4096,16384      # on a GPU

A row is a process of its own: two steps to choose and to warm up, then those that are timed, forward and backward of
one sequence of random tokens. Each repeat takes all sides in turn, the first one rotating, and ratios pair what one
repeat measured. `held` is what is live after the last layer's forward above what was before the first one's, counted
storage by storage in a further step (`distrib/tracker.py`), and does not come from the strategy; `predicted` does.

Sides are those of `launch/sides.py`, and `sac`: torch's selective checkpointing of whole layers, in which the products
and the attention are kept. Every policy P also has a side `auto=P`: `auto` with the bytes that P held as its budget.
The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

from sides import Case, build

ROOT = Path(__file__).resolve().parent.parent
HAND = {
    "norms": "recompute:policy=norms",
    "activations": "recompute:policy=activations",
    "norms+activations": "recompute",
    "mlp": "recompute:policy=mlp",
    "full": "recompute:policy=full",
}
SIDES = ["plain", "sac", "gc+ce", *HAND.values(), "recompute:offload=true", "recompute:policy=attention"]
MIB = 2**20
Row = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        print(json.dumps(measure(Case(**json.loads(sys.argv[2])))))
        return
    options = parse()
    tables = []
    for length in options.length:
        case = Case("", length, options.model, options.vocabulary, None, options.lora, options.bf16, options.steps)
        case = replace(case, threads=options.threads, attention=options.attention)
        tables.append({"case": asdict(case), "rows": compare(case, options.sides, options.repeats)})
        print(table(tables[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine(), "tables": tables}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=lambda text: text.split(","), default=SIDES)
    parser.add_argument("--model", default="512x8", help="hidden size x layers of a Llama, or a name (512x8)")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--length", type=lambda text: [int(part) for part in text.split(",")], default=[4096])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--lora", type=int, default=0, metavar="R")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process (3)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def measure(case: Case) -> Row:
    import torch

    from distrib.errors import UserError
    from distrib.meters import is_out_of_memory

    torch.set_num_threads(case.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return {"status": "ok"} | steps(case, device)
    except UserError as error:
        return {"status": "refused", "why": str(error)}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "oom"}


def steps(case: Case, device: str) -> Row:
    import torch

    from distrib.tracker import Tracker
    from distrib.units import blocks
    from launch.sides import prepare

    model = build(case, device)
    if case.side == "sac":
        with_selective_checkpoints(model)
    step = prepare("plain" if case.side == "sac" else case.side, model)
    ids = torch.randint(model.config.vocab_size, (1, case.length), device=device)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        step({"input_ids": ids, "labels": ids})
        if device == "cuda":
            torch.cuda.synchronize()

    train()
    train()
    step_s, cpu_s = [], []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(case.steps):
        start, start_cpu = perf_counter(), process_time()
        train()
        step_s.append(perf_counter() - start)
        cpu_s.append(process_time() - start_cpu)
    found = {"step_s": median(step_s), "cpu_s": median(cpu_s)}
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else None
    accounts = getattr(step, "accounts", dict)()
    found["predicted_bytes"] = accounts["recompute"]["kept_bytes"]["predicted"] if "recompute" in accounts else None
    layers, live = [layer for _, layer in blocks(model)], []
    tracker = Tracker(fake=False)
    for parameter in model.parameters():
        tracker.count(parameter)
    layers[0].register_forward_pre_hook(lambda *_: live.append(tracker.live_bytes))
    layers[-1].register_forward_hook(lambda *_: live.append(tracker.live_bytes))
    with tracker:
        train()
    return found | {"held_bytes": live[1] - live[0]}


def with_selective_checkpoints(model: Any) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    from distrib.units import blocks

    aten = torch.ops.aten
    kept = [
        *(aten.mm.default, aten.addmm.default, aten._scaled_dot_product_flash_attention.default),
        *(aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_cudnn_attention.default),
        aten._scaled_dot_product_efficient_attention.default,
    ]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    for _, layer in blocks(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def compare(case: Case, sides: list[str], repeats: int) -> list[Row]:
    first = {side: in_fresh_process(replace(case, side=side)) for side in sides}
    named = {side: name for name, side in HAND.items()}
    budgets = {side: first[side]["held_bytes"] for side in sides if side in named and first[side]["status"] == "ok"}
    auto = {f"recompute:policy=auto:budget='{held}'": f"auto={named[side]}" for side, held in budgets.items()}
    every = [*sides, *auto]
    repeated: list[dict[str, Row]] = []
    for index in range(repeats):
        begin = index % len(every)
        repeated.append({})
        for side in every[begin:] + every[:begin]:
            repeated[-1][side] = in_fresh_process(replace(case, side=side))
        print(f"repeat {index + 1} of {repeats}", file=sys.stderr, flush=True)
    partner = dict(zip(auto, budgets, strict=True))
    return [summary(side, auto.get(side, side), partner.get(side), repeated) for side in every]


def in_fresh_process(case: Case) -> Row:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": str(case.threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--row", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case.side} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def summary(side: str, name: str, partner: str | None, repeated: list[dict[str, Row]]) -> Row:
    own = [repeat[side] for repeat in repeated]
    failed = next((row for row in own if row["status"] != "ok"), None)
    if failed:
        return {"side": name, **failed}
    found: Row = {"side": name, "status": "ok", "step_s": median(row["step_s"] for row in own)}
    found |= {key: own[0][key] for key in ("held_bytes", "predicted_bytes", "peak_bytes")}
    for other in ("plain", partner):
        if other and all(repeat.get(other, {}).get("status") == "ok" for repeat in repeated):
            key = "plain" if other == "plain" else "partner"
            found[key] = {
                what: spread([r[side][what] / r[other][what] for r in repeated]) for what in ("step_s", "cpu_s")
            }
            found[key]["held_bytes"] = own[0]["held_bytes"] / repeated[0][other]["held_bytes"]
    return found


def spread(values: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [None] * 3
    return {"median": median(values), "quartiles": [low, high]}


def table(compared: Row) -> str:
    case = compared["case"]
    kind = "bf16" if case["bf16"] else "fp32"
    lines = [
        f"model {case['model']}, {kind}, length {case['length']}, {case['attention']}, {case['threads']} threads",
        "| side | held MiB | of plain's | predicted/held | time by plain's | processor time | time by the policy's |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in compared["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['side']} | {row['status']} {row.get('why', '')} | | | | | |")
            continue
        plain, partner = row.get("plain"), row.get("partner")
        predicted = row["predicted_bytes"]
        cells = [
            row["side"],
            f"{row['held_bytes'] / MIB:.1f}",
            f"{plain['held_bytes']:.3f}" if plain else "-",
            f"{predicted / row['held_bytes']:.3f}" if predicted is not None and row["held_bytes"] else "-",
            between(plain["step_s"]) if plain else "-",
            between(plain["cpu_s"]) if plain else "-",
            between(partner["step_s"]) if partner else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def between(found: Row) -> str:
    low, high = found["quartiles"]
    return f"{found['median']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def machine() -> Row:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
