"""Forward plus backward of one linear whose products are of 4 bits, against fp32 and bf16: quantization included.

    python benchmarks/fourbit_linear.py [--sizes 2048x4096x4096] [--repeats 9] [--threads 1]
    python benchmarks/fourbit_linear.py --quick

Sizes are tokens x inputs x outputs. A side is one `nn.Linear` by autograd, as it is or as `int4` (hq_bs) and `fp4` make
it, weights and inputs of the type named. Each repeat has all sides in turn, the first one rotating, and ratios pair
what one repeat measured: how many times faster the side is, above one. How its products run is printed (y, dx, dw).
Where one is emulated there is no ratio, and the side runs once. The table goes to stderr, JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from streaming import machine, spread, with_quartiles

Row = dict[str, Any]


@dataclass(frozen=True)
class Side:
    run: Callable[[], object]
    products: list[str]


def main() -> None:
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    sizes = "64x96x80" if options.quick else options.sizes
    found = {
        size: measured(*map(int, size.split("x")), 3 if options.quick else options.repeats) for size in sizes.split(",")
    }
    for size, rows in found.items():
        print(table(size, rows), file=sys.stderr, flush=True)
    print(json.dumps({"machine": machine() | {"threads": options.threads}, "sizes": found}, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048x4096x4096")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="whether it runs")
    return parser.parse_args()


def measured(tokens: int, inputs: int, outputs: int, repeats: int) -> list[Row]:
    made = sides(tokens, inputs, outputs)
    names = [name for name in made if "emulated" not in made[name].products]
    once = {name: timed(made[name].run) for name in made}
    repeated = []
    for index in range(repeats):
        first = index % len(names)
        repeated.append({name: timed(made[name].run) for name in names[first:] + names[:first]})
    return [row(name, made[name].products, repeated if name in names else [once]) for name in made]


def row(name: str, products: list[str], repeated: list[dict[str, tuple[float, float]]]) -> Row:
    made: Row = {"side": name, "products": products}
    for index, clock in enumerate(("step_s", "cpu_s")):
        made[clock] = median(repeat[name][index] for repeat in repeated)
        for other in ("fp32", "bf16"):
            ratios = [repeat[other][index] / repeat[name][index] for repeat in repeated]
            made[f"{other}_over_{clock}"] = None if "emulated" in products else spread(ratios)
    return made


def timed(run: Callable[[], object]) -> tuple[float, float]:
    import torch

    start, start_cpu = perf_counter(), process_time()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - start, process_time() - start_cpu


def sides(tokens: int, inputs: int, outputs: int) -> dict[str, Side]:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        shape = (tokens, inputs, outputs)
        made[name] = side(shape, dtype, device, None)
        made[f"int4 of {name}"] = side(shape, dtype, device, "int4")
    for precision in ("fp8", "nvfp4", "mxfp4"):
        made[f"{precision} of bf16"] = side(shape, torch.bfloat16, device, precision)
    return made


def side(shape: tuple[int, int, int], dtype: Any, device: Any, precision: str | None) -> Side:
    """A linear, and what is multiplied with it and with what it gives."""
    import torch

    tokens, inputs, outputs = shape
    model = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, False, device, dtype))
    x_TI = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
    by_TO = torch.randn(tokens, outputs, device=device, dtype=dtype)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        x_TI.grad = None
        model(x_TI).backward(by_TO)

    return Side(run, [] if precision is None else few_bits(model, precision, device))


def few_bits(model: Any, precision: str, device: Any) -> list[str]:
    """How the products of its linear run from now on."""
    from strategies.core import edits
    from strategies.lowbit.draws import Draws
    from strategies.lowbit.linear import UNIT, LowBitLinear, Shared, Unit
    from strategies.lowbit.precision import PRECISIONS
    from strategies.lowbit.schedule import Schedule

    chosen = PRECISIONS[precision]
    assert chosen is not None
    unit = Unit(Shared(Draws(0), Schedule(0.0, False)), "0", chosen, precision, turned=False)
    edits.apply(model, [("benchmark", edits.Wrap("0", LowBitLinear, {UNIT: unit}))])
    return [str(how) for how in unit.products(device, trained=True)]


def table(size: str, rows: list[Row]) -> str:
    lines = [
        f"| {size} | products | step s | fp32 over it | bf16 over it | cpu: fp32 | cpu: bf16 |",
        "|---|" + "---|" * 6,
    ]
    for found in rows:
        over = [found[f"{other}_over_{clock}"] for clock in ("step_s", "cpu_s") for other in ("fp32", "bf16")]
        cells = [", ".join(found["products"]), f"{found['step_s']:.4f}"]
        cells += ["" if ratio is None else with_quartiles(ratio) for ratio in over]
        lines.append(f"| {found['side']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
