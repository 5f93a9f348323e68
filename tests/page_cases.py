"""Results as pages get them: every figure known, or unknown, failed, marked, and written by somebody mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launch.recipe import Recipe
from launch.recipe_file import dump_recipe

MEAN = "<script>alert(1)</script> & \"x\" | `y`\n# z hub_token=hf_SEEN --api-key 'SEEN'"
GIB = 2**30


def row(strategy: str, length: int, speed: float, peak_bytes: float, **changes: Any) -> dict[str, Any]:
    return {
        "strategy": strategy, "baseline": strategy == "plain", "engine": "ddp", "world": 1, "length": length,
        "status": "ok", "why": None, "tokens_per_s": speed, "nonpad_tokens_per_s": 0.9 * speed,
        "loss_tokens_per_s": 0.5 * speed, "step_s": length / speed, "step_s_iqr": [0.9, 1.1],
        "steps_timed": 24, "against": {"plain": {"median": 1.25, "low": 1.2, "high": 1.3}}, "peak_bytes": peak_bytes,
        "activation_peak_bytes": peak_bytes / 2, "flops_per_s": 3.2e13, "mfu": 0.41, "max_length": 16384,
        "max_length_budget_bytes": 24 * GIB, "joules_per_token": 0.0123, "net_joules_per_token": 0.0101, "watts": 302.4,
        "energy_source": "counter", "energy_bound": 0.04, "energy_coverage": 1.0, "grad_error": 1.2e-7,
        "grad_error_dtype": "float32", "grad_error_parameter": "model.norm.weight", "fidelity": "exact",
        "gemm": {"native": 412, "exact_via_int8": 0, "emulated": 0}, **changes,
    }  # fmt: skip


def nothing(strategy: str, length: int, **changes: Any) -> dict[str, Any]:
    """A row of which no figure is known."""
    known = {"strategy": strategy, "baseline": False, "engine": "ddp", "world": 1, "length": length, "status": "ok"}
    return dict.fromkeys(row("", 1, 1, 1)) | known | changes


def result(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return {
        "created": "2026-01-02T03:04:05Z", "command": "ebbtide bench mine.yaml hub_token=hf_SEEN", "repeats": 3,
        "steps": 8, "warm_up_steps": 2, "status": "complete", "how": {"tokens_per_s": "Tokens by the median step."},
        "machine": {"device": "A device", "devices": 1, "cpu": "A processor", "cores": 2, "memory_bytes": 8 * GIB,
                    "device_memory_bytes": None, "platform": "Linux", "versions": {"torch": "2.13.0"}},
        "model": {"name": "tiny", "type": "llama", "parameters": 1000, "trainable_parameters": 10, "dtype": "float32"},
        "recipe": {"model_name_or_path": MEAN, "config_overrides": {"num_key_value_heads": 2, "hub_TOKEN": "hf_SEEN"},
                   "dataset": [{"name": "stdlib", "api_key": 5550199}]},
        "rows": rows, **changes,
    }  # fmt: skip


def many() -> dict[str, Any]:
    """Two lengths, every status, every mark, nulls, a long name."""
    rows = []
    for length in (2048, 8192):
        rows += [
            row("plain", length, 20000, 6 * GIB),
            row("streambp:chunk=512", length, 15000, 2 * GIB),
            row("seco", length, 9000, 3 * GIB),
            row("spaco", length, 16000, 1.5 * GIB, fidelity="unbiased"),
            row("fp4", length, 500, 5 * GIB, fidelity="approximate", gemm={"native": 1, "emulated": 3}),
            nothing("unmeasured", length, fidelity="exact"),
            nothing("plugin:" + "field=value," * 6, length, status="refused", why=MEAN),
        ]  # fmt: skip
    rows.append(nothing("gc", 32768, status="oom", why="31 GiB of logits"))
    return result(rows, status="partial")


def run_folder(folder: Path, steps: int, finished: bool, joules: float | None = 20.0, **recipe: Any) -> Path:
    """A run as `train` leaves it, resumed at step 2; a line every second, and a gap of 1000 s before going on."""
    folder.mkdir(parents=True)
    (folder / "recipe.lock.yaml").write_text(dump_recipe(Recipe(max_steps=steps, output_dir=str(folder), **recipe)))
    lines = [
        {
            "step": step, "loss": 5 - step / steps, "grad_norm": 1.5, "learning_rate": 1e-3, "tokens": 100 * step,
            "nonpad_tokens": 90 * step, "loss_tokens": 50 * step, "tokens_per_s": 100.0 + step,
            "nonpad_tokens_per_s": 90.0, "loss_tokens_per_s": 50.0, "peak_bytes": GIB, "joules": joules,
            "time": 1000.0 + step + (1000 if step > 2 else 0),
        }
        for step in range(1, steps + 1 if finished else steps)
    ]  # fmt: skip
    events = [
        {"step": 0, "time": 1000.0, "event": "start", "detail": "ddp, world 1"},
        {"step": 2, "time": 1002.5, "event": "stop", "detail": MEAN},
        {"step": 2, "time": 2002.0, "event": "resume", "detail": "ddp, world 1"},
        {"step": 3, "time": 2003.0, "event": "skipped step", "detail": "the gradient is infinite"},
        {"step": 3, "time": 2003.0, "event": "precision switch", "detail": None},
    ]
    if not finished:
        events.append({"step": steps - 1, "time": 3000.0, "event": "stop", "detail": "told to"})
    evaluations = [{"step": 2, "eval_loss": 4.25, "eval_rows": 8, "eval_texts": ["a text </pre> of the model"]}]
    for name, kept in {"metrics": lines, "events": events, "evaluations": evaluations}.items():
        write_lines(folder / f"{name}.jsonl", kept)
    if finished:
        energy = {"joules": 60.0, "net_joules": 40.0, "watts": 20.0, "bound_joules": 1.5, "source": "counter",
                  "coverage": 1.0, "notes": ["one device was lost"]}  # fmt: skip
        report = {"step": steps, "tokens": 100 * steps, "loss_first": 4.9, "loss_last": 4.0, "tokens_per_s": 101.0,
                  "peak_bytes": GIB, "world": 2, "device": "A device", "energy": energy}  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
