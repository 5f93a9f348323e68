"""Tokens per second and peak memory of `plain` against Hugging Face's Trainer: same model, rows, batch, optimizer.

    python benchmarks/loop.py [--shape 512x8] [--vocabulary 32000] [--length 1024] [--batch 1] [--repeats 7]
    python benchmarks/loop.py --shape 8b --length 4096 --lora 16 --bf16      # on a GPU

Each repeat starts two fresh processes, in alternating order, and compares them as a pair: machines drift. A step's
time is from the end of one step to the end of the next, everything that either loop does included; the first steps
are left out. Peak memory is the kernel's high-water mark on a CPU, the allocator's on a GPU, from the start of
training; it is given above weights and gradients with and without the two optimizer states, which both loops hold
alike. MFU counts the products of the weights that are really made (a frozen weight has no gradient of its own) and
causal attention; it needs a GPU whose peak is that `launch/flops.py` lists.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from rows import gradient_bytes, peak

from distrib.meters import Memory

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_STEPS = 2
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
}


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps({"ebbtide": run_ebbtide, "trainer": run_trainer}[options.side](options)))
        return
    pairs = [measure_pair(options, index) for index in range(options.repeats)]
    print(json.dumps(summary(options, pairs), indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="512x8", help="hidden size x layers, or 8b (512x8)")
    parser.add_argument("--lora", type=int, default=0, metavar="R")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a repeat (6)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=["ebbtide", "trainer"], help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_pair(options: argparse.Namespace, index: int) -> dict[str, dict[str, float]]:
    sides = ["ebbtide", "trainer"] if index % 2 == 0 else ["trainer", "ebbtide"]
    pair = {}
    for side in sides:
        command = [sys.executable, __file__, "--side", side, *sys.argv[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
        pair[side] = json.loads(done.stdout.splitlines()[-1])
    speed = pair["ebbtide"]["tokens_per_s"] / pair["trainer"]["tokens_per_s"]
    memory = pair["ebbtide"]["peak_bytes"] / pair["trainer"]["peak_bytes"]
    print(f"repeat {index + 1}: speed x{speed:.3f}, memory x{memory:.3f}", file=sys.stderr, flush=True)
    return pair


def summary(options: argparse.Namespace, pairs: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    def ratio(key: str) -> dict[str, float]:
        ratios = [pair["ebbtide"][key] / pair["trainer"][key] for pair in pairs]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        return {"median": round(median(ratios), 3), "quartiles": [round(low, 3), round(high, 3)]}

    import torch
    import transformers

    absolute = ["peak_bytes", "loss_first"]
    if torch.cuda.is_available():
        absolute += ["tokens_per_s", "mfu"]
    return {
        "lora": options.lora,
        "bf16": options.bf16,
        "shape": options.shape,
        "vocabulary": options.vocabulary,
        "length": options.length,
        "batch": options.batch,
        "threads": options.threads,
        "pairs": len(pairs),
        "tokens_per_s_ratio": ratio("tokens_per_s"),
        "peak_above_weights_and_gradients_ratio": ratio("peak_bytes"),
        "the_same_with_optimizer_states_ratio": ratio("peak_with_optimizer_bytes"),
        **{key: {side: median(p[side][key] for p in pairs) for side in pairs[0]} for key in absolute},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def rows(options: argparse.Namespace) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    count = (options.steps + WARM_UP_STEPS) * options.batch
    return torch.randint(options.vocabulary, (count, options.length), generator=generator)


def recipe(options: argparse.Namespace) -> Any:
    from launch.recipe import Recipe

    if options.shape == "8b":
        shape = LLAMA_8B
    else:
        hidden, layers = (int(part) for part in options.shape.split("x"))
        shape = {
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 128,
            "head_dim": 64,
            "vocab_size": options.vocabulary,
        }
    overrides = shape | {"tie_word_embeddings": False}
    return Recipe(config_overrides=overrides, lora_r=options.lora, bf16=options.bf16)


def figures(
    options: argparse.Namespace, model: Any, memory: Memory, ends: list[float], losses: list[float]
) -> dict[str, Any]:
    """Medians over the timed steps; `ends` are the times at which steps ended. The peak holds gradients and two
    optimizer states, told apart by their size."""
    times = [after - before for before, after in pairwise(ends)][WARM_UP_STEPS - 1 :]
    rate = options.batch * options.length / median(times)
    above = peak(memory) - gradient_bytes(model)
    return {
        "tokens_per_s": rate,
        "mfu": mfu(options, model, rate),
        "loss_first": losses[0],
        "peak_with_optimizer_bytes": above,
        "peak_bytes": above - 2 * gradient_bytes(model),
    }


def mfu(options: argparse.Namespace, model: Any, tokens_per_s: float) -> float | None:
    import torch

    from launch.flops import peak_flops, training_flops

    peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    flops = training_flops(model, model.config, [options.length])
    return None if peak is None or flops is None else tokens_per_s * flops / options.length / peak


def run_ebbtide(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    import strategies
    from distrib.checkpoint import Progress
    from distrib.contracts import Window
    from distrib.energy import Meter
    from distrib.engines import Settings, make
    from distrib.loop import Loop
    from distrib.numbers import Plan
    from distrib.optim import Schedule
    from distrib.topology import read_environment
    from launch.models import Weights, build, load_config

    torch.set_num_threads(options.threads)
    made_from, topology, tokens = recipe(options), read_environment(), rows(options)
    config = load_config(made_from)
    model = build(made_from, config)
    plain = [strategies.get("plain")()]
    strategies.edit(model, plain, topology)
    settings = Settings(bf16=options.bf16)
    engine = make("ddp", model, Weights(made_from, config, topology).fill, topology, settings)
    step = strategies.prepare(model, plain, engine=engine)

    def window(start: int, stop: int) -> Window:
        ids = tokens[start:stop]
        count = ids.numel()
        learned = count - len(ids)
        return Window([{"input_ids": ids, "labels": ids}], list(range(start, stop)), count, count, learned)

    ends: list[float] = []
    losses: list[float] = []

    def report(line: dict[str, Any]) -> None:
        ends.append(perf_counter())
        losses.append(line["loss"])

    steps = len(tokens) // options.batch
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            run=Path(folder),
            steps=steps,
            global_batch=options.batch,
            rows=None,
            schedule=Schedule(2e-4, steps, kind="linear"),
            seed=0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_steps=10**9,
            save_total_limit=1,
            eval_steps=None,
        )
        meter = Meter(topology)
        loop = Loop(plan, engine, step, window, strategies.SFT().weight, _nothing, lambda index: {}, report, meter)
        memory = Memory(topology)
        loop.run(Progress())
    return figures(options, model, memory, ends, losses)


def _nothing(*_: Any) -> None:
    pass


def run_trainer(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from distrib.engines import Settings, make
    from distrib.topology import read_environment
    from launch.models import Weights, build, load_config

    torch.set_num_threads(options.threads)
    made_from, topology, tokens = recipe(options), read_environment(), rows(options)
    config = load_config(made_from)
    model = build(made_from, config)
    make("ddp", model, Weights(made_from, config, topology).fill, topology, Settings(optimizer=None))

    ends: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                ends.append(perf_counter())
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=len(tokens) // options.batch,
            learning_rate=2e-4,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="sequential",
            bf16=options.bf16,
        )
        data = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()])
        memory = Memory(topology)
        trainer.train()
    return figures(options, model, memory, ends, losses)


if __name__ == "__main__":
    main()
