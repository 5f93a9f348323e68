"""Step time and peak memory of long sequences: streaming strategies, gradient checkpointing and plain, side by side.

    python benchmarks/streaming.py [--length 4096,8192] [--vocabulary 32000,128256] [--lora 16] [--repeats 3]
    python benchmarks/streaming.py --sides gc+ce,streambp:chunk=1024:offload=true
    python benchmarks/streaming.py --model qwen3-8b --lora 16 --bf16 --length 32768      # on a GPU

Sides are those of `benchmarks/sides.py`, rows those of `benchmarks/rows.py`: fresh processes, each repeat with all
sides in turn, the first one rotating. Ratios to `gc`, `gc+ce` and `plain` pair what one repeat measured: machines
drift. `cpu` is the same in processor seconds, which neighbours on the machine disturb less. `peak` is what was live
above weights and gradients; `resident` what the process held of it with the C library's allocator as it is. On a GPU
both are the allocator's peak. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from statistics import median, quantiles
from typing import Any

from rows import in_fresh_process
from sides import Case

from launch.sides import sides_of

SIDES = "plain,hf,gc,gc+ce,streambp,streambp:offload=true,seco,spaco/8"
AGAINST = ("gc", "gc+ce", "plain")
MIB = 2**20

Row = dict[str, Any]


def main() -> None:
    options = parse()
    sides = sides_of(options.sides)
    tables = []
    for vocabulary in options.vocabulary:
        for length in options.length:
            case = Case("", length, options.model, vocabulary, options.kv_heads, options.lora, options.bf16)
            case = replace(case, steps=options.steps, threads=options.threads)
            tables.append(compare(case, sides, options.repeats))
            print(table(tables[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine(), "tables": tables}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", default=SIDES)
    parser.add_argument("--model", default="512x8", help="hidden size x layers of a Llama, or a name (512x8)")
    parser.add_argument("--length", type=whole_numbers, default=[8192])
    parser.add_argument("--vocabulary", type=whole_numbers, default=[None])
    parser.add_argument("--kv-heads", type=int, help="as many as heads")
    parser.add_argument("--lora", type=int, default=0, metavar="R")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a process (2)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def whole_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def compare(case: Case, sides: list[str], repeats: int) -> Row:
    """All sides at one length and vocabulary."""
    repeated: list[dict[str, Row]] = []
    for index in range(repeats):
        first = index % len(sides)
        repeated.append({})
        for side in sides[first:] + sides[:first]:
            repeated[-1][side] = measured(replace(case, side=side), index)
            print(f"repeat {index + 1}: {line(side, repeated[-1][side])}", file=sys.stderr, flush=True)
    return {"case": asdict(case), "repeats": repeats, "rows": [summary(side, repeated) for side in sides]}


def measured(case: Case, index: int) -> Row:
    """One timed row; in the first repeat its live peak as well, which does not vary."""
    row = in_fresh_process(case, exact=False)
    if row["status"] != "ok":
        return row
    found = {"status": "ok", "resident_bytes": row["peak_bytes"]}
    found |= {name: median(row[name]) for name in ("step_s", "cpu_s")}
    if index == 0:
        exact = in_fresh_process(replace(case, steps=1))
        found["peak_bytes"] = exact.get("peak_bytes")
    return found


def summary(side: str, repeated: list[dict[str, Row]]) -> Row:
    own = [repeat[side] for repeat in repeated]
    failed = next((row for row in own if row["status"] != "ok"), None)
    if failed:
        return {"side": side} | failed
    found: Row = {"side": side, "status": "ok", "peak_bytes": own[0]["peak_bytes"]}
    for name in ("resident_bytes", "step_s", "cpu_s"):
        found[name] = spread([row[name] for row in own])
    against = [s for s in AGAINST if s in repeated[0] and all(repeat[s]["status"] == "ok" for repeat in repeated)]
    found["against"] = {other: ratios(side, other, repeated) for other in against}
    return found


def ratios(side: str, other: str, repeated: list[dict[str, Row]]) -> Row:
    def paired(name: str) -> list[float]:
        return [repeat[side][name] / repeat[other][name] for repeat in repeated]

    first = repeated[0]
    peaks = [first[name]["peak_bytes"] for name in (side, other)]
    found: Row = {name: spread(paired(name)) for name in ("step_s", "cpu_s", "resident_bytes")}
    return found | {"peak_bytes": peaks[0] / peaks[1] if all(peaks) else None}


def spread(values: list[float]) -> dict[str, Any]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [None] * 3
    return {"median": median(values), "quartiles": [low, high]}


def line(side: str, row: Row) -> str:
    if row["status"] != "ok":
        return f"{side} {row['status']} {row.get('why', '')}"
    peak = f", peak {row['peak_bytes'] / MIB:.0f} MiB" if row.get("peak_bytes") else ""
    return f"{side} {row['step_s']:.2f} s{peak}, resident {row['resident_bytes'] / MIB:.0f} MiB"


def table(compared: Row) -> str:
    case = compared["case"]
    columns = [f"x{other} {what}" for other in AGAINST for what in ("peak", "time", "cpu")]
    vocabulary = case["vocabulary"] or "its own"
    lines = [
        f"length {case['length']}, vocabulary {vocabulary}, model {case['model']}, LoRA {case['lora']}",
        "| side | peak MiB | resident MiB | step s | " + " | ".join(columns) + " |",
        "|---|" + "---|" * (3 + len(columns)),
    ]
    for row in compared["rows"]:
        if row["status"] != "ok":
            lines.append(f"| {row['side']} | {row['status']} |" + " |" * (2 + len(columns)))
            continue
        cells = [mebibytes(row["peak_bytes"]), mebibytes(row["resident_bytes"]["median"])]
        cells.append(f"{row['step_s']['median']:.2f}")
        for other in AGAINST:
            cells += cells_against(row["against"].get(other))
        lines.append(f"| {row['side']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mebibytes(size_bytes: float | None) -> str:
    return "-" if size_bytes is None else f"{size_bytes / MIB:.0f}"


def cells_against(found: Row | None) -> list[str]:
    if found is None:
        return ["-"] * 3
    peak = "-" if found["peak_bytes"] is None else f"{found['peak_bytes']:.2f}"
    return [peak, *(with_quartiles(found[name]) for name in ("step_s", "cpu_s"))]


def with_quartiles(found: Row) -> str:
    low, high = found["quartiles"]
    between = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    return f"{found['median']:.2f}{between}"


def machine() -> Row:
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}


if __name__ == "__main__":
    main()
