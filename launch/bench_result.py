"""From what a comparison measured to the rows of `bench.json`. What was not measured is None."""

from __future__ import annotations

from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from distrib.energy import summed

if TYPE_CHECKING:
    from launch.bench import Book, Options
    from launch.recipe import Recipe

Row = dict[str, Any]
AGAINST = ("plain", "hf", "gc", "gc+ce")
HOW = {
    "step_s": "Median over the timed steps of all repeats; a step is data, forward, backward, clipping and update.",
    "step_s_iqr": "Quartiles of the same steps.",
    "against": "Ratio of step times, each repeat's median by the other's of the same repeat: median, lowest, highest.",
    "tokens_per_s": "Median over the timed steps; all positions, padding included.",
    "nonpad_tokens_per_s": "The same without padding.",
    "loss_tokens_per_s": "The same of tokens that are learned.",
    "peak_bytes": "Of a training process: CUDA's allocator, on a CPU the kernel's high-water mark, libraries included.",
    "activation_peak_bytes": "Of forward and backward of the largest micro-batch, above weights and gradients.",
    "flops_per_s": "Products of weights and attention within each document, by the median step; nothing counted twice.",
    "mfu": "The same by the device's peak in bfloat16; unknown in other precisions and on unlisted devices.",
    "grad_error": "Difference from plain autograd by the gradient, in norms, on a few short rows; an estimate's mean.",
    "grad_deviation": "Of an estimate: its standard deviation from step to step by the gradient's norm.",
    "grad_error_dtype": "What both were computed in.",
    "joules_per_token": "Energy of the timed steps of all repeats, of all devices, by the tokens processed.",
    "net_joules_per_token": "The same less what the devices drew before the run.",
    "energy_bound": "How far the joules may be off, relative to them: age and steps of the counters, what was missed.",
    "accounts": "What strategies say of themselves: of recompute, bytes and seconds as predicted and as measured.",
    "max_length": "Longest length, in steps of 256, whose whole training step stays within the budget.",
}


def summary(options: Options, book: Book, recipe: Recipe, refused: dict[str, str]) -> list[Row]:
    return [_row(side, length, options, book, recipe, refused) for length in options.lengths for side in options.sides]


def _row(side: str, length: int, options: Options, book: Book, recipe: Recipe, refused: dict[str, str]) -> Row:
    from launch.bench import Task
    from launch.sides import BASELINES

    row: Row = dict.fromkeys(FIELDS)
    row |= {"strategy": side, "baseline": side in BASELINES, "engine": recipe.engine.name, "world": recipe.nproc}
    row |= {"length": length, "fidelity": _fidelity(side, recipe), "max_length_budget_bytes": options.budget_bytes}
    failed = book.failed(side, length)
    times = book.times(side, length)
    if side in refused:
        return row | {"status": "refused", "why": refused[side]}
    if failed:
        return row | {"status": failed["status"], "why": failed.get("why")}
    if not times:
        return row | {"status": "not run", "why": "stopped before it was measured"}
    row |= {"status": "ok", **speed(times), **energy(times), "against": _against(side, length, options, book)}
    row["accounts"] = times[-1].get("accounts")
    row["gemm"] = next((said["gemm"] for said in (row["accounts"] or {}).values() if "gemm" in said), None)
    if row["gemm"] and row["gemm"]["emulated"]:
        # The time of an emulation is no time of what it stands for.
        row["against"] = {}
    memory = Task("memory", side, length)
    if memory in book:
        row["activation_peak_bytes"] = book[memory].get("activation_peak_bytes")
    error = Task("error", side, options.lengths[0])
    if error in book:
        found = book[error]
        row |= {"grad_error": found.get("grad_error"), "grad_error_dtype": found.get("dtype")}
        row |= {"grad_error_parameter": found.get("worst"), "grad_verdict": found.get("verdict")}
        row["grad_deviation"] = found.get("deviation")
    longest = Task("longest", side, 0)
    if longest in book:
        row["max_length"] = book[longest].get("max_length")
    return row


def speed(times: list[Row]) -> Row:
    """Of one side and length, over all repeats."""
    step_s = [seconds for row in times for seconds in row["step_s"]]

    def rate(key: str) -> float:
        return float(median(count / s for row in times for count, s in zip(row[key], row["step_s"], strict=True)))

    low, _, high = quantiles(step_s, n=4) if len(step_s) > 1 else step_s * 3
    peaks = [row["peak_bytes"] for row in times if row["peak_bytes"] is not None]
    flops = times[0]["flops"]
    flops_per_s = None if flops is None else flops / len(times[0]["step_s"]) / median(step_s)
    return {
        "step_s": median(step_s),
        "step_s_iqr": [low, high],
        "steps_timed": len(step_s),
        "tokens_per_s": rate("tokens"),
        "nonpad_tokens_per_s": rate("nonpad_tokens"),
        "loss_tokens_per_s": rate("loss_tokens"),
        "peak_bytes": max(peaks, default=None),
        "flops_per_s": flops_per_s,
        "mfu": flops_per_s / times[0]["peak_flops"] if flops_per_s and times[0]["peak_flops"] else None,
    }


def energy(times: list[Row]) -> Row:
    """Of the timed steps of all repeats."""
    whole = summed([row["energy"] for row in times])
    net = whole.net_joules
    return {
        "joules_per_token": whole.joules_per_token,
        "joules_per_step": whole.joules_per_step,
        "net_joules_per_token": net / whole.tokens if net is not None and whole.tokens else None,
        "watts": whole.watts,
        "energy_source": whole.source,
        "energy_bound": whole.bound_joules / whole.joules if whole.joules and whole.bound_joules is not None else None,
        "energy_coverage": whole.coverage if whole.joules is not None else None,
        "energy_notes": list(whole.notes),
    }


def _against(side: str, length: int, options: Options, book: Book) -> Row:
    own = book.times(side, length)
    found = {}
    for other in AGAINST:
        if other not in options.sides or book.failed(other, length):
            continue
        pairs = zip(own, book.times(other, length), strict=False)
        ratios = [median(one["step_s"]) / median(two["step_s"]) for one, two in pairs]
        if ratios:
            found[other] = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def _fidelity(side: str, recipe: Recipe) -> str:
    """The least that the side's strategies promise."""
    import strategies
    from launch.sides import sections
    from strategies.core.contract import Fidelity

    order = list(Fidelity)
    kinds = [Fidelity.EXACT, *(strategies.get(section["name"]).fidelity for section in sections(side, recipe))]
    return max(kinds, key=order.index).name.lower()


FIELDS = (
    "strategy", "baseline", "engine", "world", "length", "status", "why",
    "tokens_per_s", "nonpad_tokens_per_s", "loss_tokens_per_s", "step_s", "step_s_iqr", "steps_timed", "against",
    "peak_bytes", "activation_peak_bytes", "flops_per_s", "mfu", "max_length", "max_length_budget_bytes",
    "joules_per_token", "joules_per_step", "net_joules_per_token", "watts", "energy_source", "energy_bound",
    "energy_coverage", "energy_notes",
    "grad_error", "grad_error_dtype", "grad_error_parameter", "grad_verdict", "grad_deviation", "fidelity",
    "accounts", "gemm",
)  # fmt: skip
