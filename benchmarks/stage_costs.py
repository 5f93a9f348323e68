"""What a stage's operations cost on one device, what splitting the backward adds, and what a pipeline makes of it.

    python benchmarks/stage_costs.py --small [--length 512,2048] [--repeats 15]     # on a CPU
    python benchmarks/stage_costs.py [--length 4096,8192] [--fp32]                  # Llama-3-8B's shape, on a GPU

A stage of one layer of a model with random weights runs as a rank of a pipeline would run it. Each repeat takes all
ways of its backward in turn, the first one rotating, and ratios pair what one repeat measured:

    plain       autograd's, with nothing put aside
    store       in one go through the store of weight gradients (strategies/pipelining/store.py)
    split       in two parts through it: p1 leaves what p2 multiplies
    torch       PyTorch's own split, `stage_backward_input` and `stage_backward_weight`

On a CPU these are processor seconds of this process, which others on the machine do not take part in.

`held` and `stash` are what a micro-batch keeps after its forward and after p1, counted storage by storage. Simulated
steps take each layer's cost at its place, and links of no time. Markdown goes to stdout.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from statistics import median, quantiles
from time import process_time
from typing import Any

from loop import LLAMA_8B

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
DEVICES = (4, 8)
SCHEDULES = ("1f1b", "1f1b+2bp", "h1", "v", "greedy")
MIB = 2**20


def main() -> None:
    options = parse()
    for length in options.length:
        report(options, length)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of 512x16 in place of Llama-3-8B's shape")
    parser.add_argument("--length", type=lambda text: [int(part) for part in text.split(",")], default=[2048])
    parser.add_argument("--rows", type=int, default=1, help="of a micro-batch (1)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="in place of bf16")
    return parser.parse_args()


def report(options: argparse.Namespace, length: int) -> None:
    import torch

    from launch.device import device_of
    from launch.plan_pipeline import PipelinePlanner
    from launch.recipe import Recipe
    from launch.stages import measure
    from strategies.twobp import TwoBP

    torch.set_num_threads(options.threads)
    shape = (SMALL if options.small else LLAMA_8B) | {"tie_word_embeddings": False}
    recipe = Recipe(
        config_overrides=shape,
        max_length=length,
        per_device_train_batch_size=options.rows,
        bf16=not options.fp32,
    )
    device = device_of({"count": "1"}, 1)
    planners = [PipelinePlanner(recipe, replace(device, count=count), [TwoBP()]) for count in DEVICES]
    first = planners[0]
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"a CPU, {options.threads} threads"
    precision = "float32" if options.fp32 else "bf16"
    print(
        f"## {shape['hidden_size']} x {shape['num_hidden_layers']} layers, {options.rows} x {length} tokens, "
        f"{precision}, {name}, torch {torch.__version__}\n"
    )
    print_layer(first, options)
    kind = device.type
    places = measure(first.workshop, first.whole, first.kinds, first.border, options.rows, kind, process_time)
    for planner in planners:
        planner._places[options.rows] = places
    print(f"\nPlaces, median ms of {places.repetitions}: forward + p1 + p2\n")
    print("| first, with the embedding | a layer | last, with the head | a stage without layers |\n|---|---|---|---|")
    cells = (places.layers[0], places.layers[1], places.layers[-1], places.empty)
    print(f"| {' | '.join(' + '.join(f'{1000 * x:.2f}' for x in one) for one in cells)} |")
    print_steps(planners, options.rows)


def print_layer(planner: Any, options: argparse.Namespace) -> None:
    ways = layer_ways(planner, options.rows)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for index in range(-1, options.repeats):
        start = index % len(ways)
        order = [*ways][start:] + [*ways][:start]
        times = {name: ways[name]() for name in order}
        if index >= 0:
            for name, one in times.items():
                found[name].append(one)
    held = {name: layer_bytes(planner, options.rows, name) for name in ways}
    print("One layer, median ms of a micro-batch; x plain: median of paired ratios and their quartiles\n")
    print(
        "| backward | forward | p1 | p2 | all | x plain | held, MiB | stash, MiB |\n|---|---|---|---|---|---|---|---|"
    )
    for name, rows in found.items():
        ratios = [sum(one) / sum(plain) for one, plain in zip(rows, found["plain"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        parts = [f"{1000 * median(column):.2f}" for column in zip(*rows, strict=True)]
        parts += ["" for _ in range(3 - len(parts))]
        whole = 1000 * median(map(sum, rows))
        memory = " | ".join("" if one is None else f"{one / MIB:.1f}" for one in held[name])
        print(
            f"| {name} | {' | '.join(parts)} | {whole:.2f} | {median(ratios):.3f} ({low:.3f}-{high:.3f}) | {memory} |"
        )


def layer_part(planner: Any, rows: int, way: str) -> Any:
    """A stage of layer 1 alone; without the store for what autograd does."""
    import torch

    from launch.stages import draw

    torch.manual_seed(0)
    parts = replace(planner.whole, bounds=(0, 1, 2, len(planner.whole.layers)))
    kind = planner.device.type
    model = planner.workshop.edited(parts, 1)
    draw(model, kind)
    part = planner.workshop.part(model, parts, 1, kind)
    if way in ("plain", "torch"):
        part.store = nullcontext()
    part.begin(planner.workshop.run(planner.border, rows, planner.recipe.max_length, 1, kind))
    return part


def layer_ways(planner: Any, rows: int) -> dict[str, Callable[[], tuple[float, ...]]]:
    from launch.stages import between, repeat

    def way(name: str) -> Callable[[], tuple[float, ...]]:
        part = layer_part(planner, rows, name)
        if name == "torch":
            return lambda: tuple(between(torch_split(part)))
        return lambda: tuple(between(repeat(part, "FIW" if name == "split" else "FB", process_time)))

    return {name: way(name) for name in ("plain", "store", "split", "torch")}


def torch_split(part: Any, after: Callable[[], None] = lambda: None) -> list[Any]:
    """The moments around a forward and PyTorch's two parts of the backward; `after` is called after the first two."""
    from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

    from launch.stages import moment, received

    came, by = received(part, 0), received(part, 0)
    moments = [moment(part, process_time)]
    part.forward(0, came)
    moments.append(moment(part, process_time))
    after()
    inputs, left = part._graphs.pop(0)
    weights = list(part.model.parameters())
    _, groups = stage_backward_input([left], [by], [inputs], iter(weights))
    del inputs, left, came, by
    moments.append(moment(part, process_time))
    after()
    stage_backward_weight(iter(weights), groups)
    moments.append(moment(part, process_time))
    return moments


def layer_bytes(planner: Any, rows: int, way: str) -> list[int | None]:
    """After the forward, and after p1 where there is one."""
    from distrib.tracker import Tracker
    from launch.stages import perform, sent

    part = layer_part(planner, rows, way)
    tracker = Tracker(fake=False)
    with tracker:
        for tensor in (*part.model.parameters(), *part.model.buffers()):
            tracker.count(tensor)
        for kind in "FB":
            perform(part, kind, 0, sent(part, kind, 0))
        gc.collect()
        start, seen = tracker.live_bytes, []

        def note() -> None:
            gc.collect()
            seen.append(tracker.live_bytes - start)

        if way == "torch":
            torch_split(part, note)
            return [*seen]
        for kind in "FIW" if way == "split" else "FB":
            perform(part, kind, 0, sent(part, kind, 0))
            note()
    return [seen[0], seen[1] if way == "split" else None]


def print_steps(planners: list[Any], rows: int) -> None:
    print("\nSimulated steps, and the most that a device holds of activations and of what waits, GiB\n")
    print("| devices | micro-batches | schedule | step | idle | x 1f1b | x one device | holds | layers |")
    print("|---|---|---|---|---|---|---|---|---|")
    for planner in planners:
        for count in (planner.ranks, 2 * planner.ranks):
            for name in SCHEDULES:
                row = planner.row(name, count, rows)
                if "ranks" not in row:
                    print(f"| {planner.ranks} | {count} | {name} | {row['why']} |||||")
                    continue
                holds = max(one["activations"] + one["waiting"] for one in row["ranks"]) / 2**30
                print(
                    f"| {planner.ranks} | {count} | {name} | {1000 * row['seconds']:.0f} ms | "
                    f"{100 * row['bubble']:.1f}% | {row['speedup_1f1b']:.3f} | {row['speedup_device']:.2f} | "
                    f"{holds:.3f} | {' '.join(map(str, row['layers']))} |"
                )


if __name__ == "__main__":
    main()
