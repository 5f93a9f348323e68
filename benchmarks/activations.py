"""What low-memory activations save and cost: bytes that autograd keeps, and step time, against plain.

    python benchmarks/activations.py [--models llama,gpt_neox] [--sides plain,approx_bp,few_bit] [--length 1024]
    python benchmarks/activations.py --bf16 --repeats 9

Models of 4 layers of 512, vocabulary 4,096, one sequence of random tokens, forward and backward without an optimizer.
Every row is a fresh process; each repeat has all sides in turn, the first one rotating, and ratios pair what one
repeat measured. `cpu` is the same in processor seconds, which neighbours on the machine disturb less. Bytes kept are
those of all different storages that autograd saves in a forward of the layers, parameters not counted. The table goes
to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from streaming import machine, spread, with_quartiles

from launch.sides import sides_of

ROOT = Path(__file__).resolve().parent.parent
COMMON = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
COMMON |= {"max_position_embeddings": 8192, "use_cache": False, "tie_word_embeddings": False}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 1536, "num_key_value_heads": 4},
    "gpt_neox": {"intermediate_size": 2048},
    "gpt2": {"activation_function": "gelu_pytorch_tanh", **NO_DROPOUT},
    "opt": {"ffn_dim": 2048, "activation_function": "gelu", "word_embed_proj_dim": 512, "dropout": 0.0},
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    model: str
    side: str
    length: int
    bf16: bool
    steps: int


def main() -> None:
    options = parse()
    if options.row:
        print(json.dumps(measured(Case(**json.loads(options.row)))))
        return
    sides, found = sides_of(options.sides), {}
    for model in options.models.split(","):
        case = Case(model, "", options.length, options.bf16, options.steps)
        found[model] = compared(case, sides, options.repeats)
        print(table(model, found[model]), file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine(), "models": found}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="llama,gpt_neox", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--sides", default="plain,approx_bp,few_bit", help="plain first: the others are held against it"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--bf16", action="store_true", help="weights in bfloat16")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process (5)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def compared(case: Case, sides: list[str], repeats: int) -> list[Row]:
    repeated: list[dict[str, Row]] = []
    for index in range(repeats):
        first = index % len(sides)
        order = sides[first:] + sides[:first]
        repeated.append({side: in_fresh_process(replace(case, side=side)) for side in order})
    rows = []
    for side in sides:
        row: Row = {"side": side, "kept_bytes": repeated[0][side]["kept_bytes"]}
        row["kept"] = row["kept_bytes"] / repeated[0][sides[0]]["kept_bytes"]
        for name in ("step_s", "cpu_s"):
            row[name] = median(repeat[side][name] for repeat in repeated)
            row[f"against_{name}"] = spread([repeat[side][name] / repeat[sides[0]][name] for repeat in repeated])
        rows.append(row)
    return rows


def in_fresh_process(case: Case) -> Row:
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--row", json.dumps(asdict(case))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case.side} on {case.model} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(case: Case) -> Row:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.sides import prepare

    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.for_model(case.model, **(COMMON | MODELS[case.model]))
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).train()
    step = prepare(case.side, model)
    ids = torch.randint(4096, (1, case.length), device=device)
    batch = {"input_ids": ids, "labels": ids}
    step(batch)
    kept, step_s, cpu_s = kept_bytes(model, ids), [], []
    for _ in range(case.steps):
        model.zero_grad(set_to_none=True)
        start, start_cpu = perf_counter(), process_time()
        step(batch)
        if device == "cuda":
            torch.cuda.synchronize()
        step_s.append(perf_counter() - start)
        cpu_s.append(process_time() - start_cpu)
    return {"kept_bytes": kept, "step_s": median(step_s), "cpu_s": median(cpu_s)}


def kept_bytes(model: Any, ids: Any) -> int:
    import torch

    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def note(kept: torch.Tensor) -> torch.Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        # Held until they are counted: a storage that is gone gives its address to the next.
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
    del hidden
    return sum(found.values())


def table(model: str, rows: list[Row]) -> str:
    lines = [f"| {model} | MiB kept | of plain's | step s | against plain | cpu |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row['kept_bytes'] / 2**20:.1f}", f"{row['kept']:.3f}", f"{row['step_s']:.3f}"]
        cells += [with_quartiles(row["against_step_s"]), with_quartiles(row["against_cpu_s"])]
        lines.append(f"| {row['side']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
