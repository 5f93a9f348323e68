"""The lines a person reads while a model trains."""

from __future__ import annotations

import io
from typing import Any

from launch.console import Console, line

RECORD: dict[str, Any] = {
    "step": 7, "loss": 5.43211, "grad_norm": 1.2345, "learning_rate": 0.0002, "tokens": 9, "nonpad_tokens": 8,
    "loss_tokens": 7, "tokens_per_s": 12345.6, "nonpad_tokens_per_s": 12000.4, "loss_tokens_per_s": 9000.0,
    "peak_bytes": 3 * 2**29, "joules": None, "joules_per_token": None, "energy_source": None, "time": 1.0,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_training_line() -> None:
    assert line(RECORD, 100) == (
        "step   7/100  loss 5.4321  grad norm 1.234  lr 2.00e-04  mem 1.50 GiB  "
        "tok/s 12,346 (non-pad 12,000, loss 9,000)"
    )


def test_energy_is_shown_only_when_it_was_measured() -> None:
    measured = {"joules": 12.34, "joules_per_token": 0.012345, "energy_source": "counter"}
    assert line({**RECORD, **measured}, 7).endswith("  J/tok 0.0123")
    assert "J/tok" not in line(RECORD, 7)
    assert "mem" not in line({**RECORD, "peak_bytes": None}, 7)


def test_values_that_are_no_numbers_are_shown_as_such() -> None:
    assert "loss 0.0000" in line({**RECORD, "loss": -1e-6}, 7)
    assert "loss nan  grad norm inf" in line({**RECORD, "loss": float("nan"), "grad_norm": float("inf")}, 7)


def test_an_evaluation_line_names_its_figures() -> None:
    assert line({"step": 10, "eval_loss": 5.0, "rows": 64, "time": 1.0}, 20) == "step 10/20  eval loss 5.0000  rows 64"


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    console = Console(100, stream=stream)
    console.log(RECORD)
    console.note("a remark")
    console.close()
    assert stream.getvalue() == f"{line(RECORD, 100)}\na remark\n"


def test_a_bar_below_the_lines_on_a_terminal() -> None:
    stream = Terminal()
    console = Console(100, done=5, stream=stream)
    console.log(RECORD)
    console.log({**RECORD, "step": 9})
    console.close()
    shown = stream.getvalue()
    assert f"{line(RECORD, 100)}\n" in shown
    assert "5/100" in shown
    assert "9/100" in shown
