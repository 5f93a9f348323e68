"""Forward plus backward of one linear whose products are of 4 bits, against fp32 and bf16: quantization included.

    python benchmarks/fourbit_linear.py [--sizes 2048x4096x4096] [--repeats 9] [--threads 1]
    python benchmarks/fourbit_linear.py --quick

Sizes are tokens x inputs x outputs. Each repeat has all sides in turn, the first one rotating, and ratios pair what one
repeat measured: how many times faster the side is, above one. `int4` is the published recipe with bit splitting:
Hadamard blocks of 32 and 4 bits a number in the forward, gradients as two numbers of 4 bits in the backward. How its
products run is printed (y, dx, dw); where one is emulated, no ratio is. The table goes to stderr, JSON to stdout.
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
    names = list(made)
    for side in made.values():
        side.run()
    repeated = []
    for index in range(repeats):
        first = index % len(names)
        repeated.append({name: timed(made[name].run) for name in names[first:] + names[:first]})
    return [row(name, made[name].products, repeated) for name in names]


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
        shapes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        drawn = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        made[name] = Side(lambda drawn=drawn: plain(*drawn), [])
        made[f"int4 of {name}"] = Side(lambda drawn=drawn: quantized(*drawn), how(device))
    return made


def plain(x_TI: Any, w_OI: Any, by_TO: Any) -> Any:
    return x_TI @ w_OI.T, by_TO @ w_OI, by_TO.T @ x_TI


def how(device: Any) -> list[str]:
    from strategies.lowbit.backends.probe import choose
    from strategies.lowbit.formats import INT4, SPLIT, Scaled

    return [choose(Scaled(format), Scaled(INT4), device)[1] for format in (INT4, SPLIT, SPLIT)]


def quantized(x_TI: Any, w_OI: Any, by_TO: Any) -> Any:
    from strategies.lowbit.backends.probe import choose
    from strategies.lowbit.formats import INT4, SPLIT, Scaled
    from strategies.lowbit.hadamard import hadamard_

    number, split, dtype = Scaled(INT4), Scaled(SPLIT), x_TI.dtype
    backend, _ = choose(number, number, x_TI.device)

    def weight() -> Any:
        return backend.quantize(w_OI, number, spread=32)

    x = backend.quantize(x_TI, number, spread=32)
    y = backend.product(x, weight(), dtype)
    w = weight()
    by = backend.quantize(by_TO, split, 1, w.row_scales()[:, 0])
    by_x = hadamard_(backend.product(by, w.turned(), dtype), 32)
    by = backend.quantize(by_TO.T, split, 2, x.row_scales()[:, 0])
    return y, by_x, hadamard_(backend.product(by, x.turned(), dtype), 32)


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
