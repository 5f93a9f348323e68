"""How gradients are computed: one file a strategy. The way in, for recipes and for anyone's loop:

step = strategies.prepare(model, [strategies.get("plain")()])
result = step({"input_ids": ids, "labels": labels})    # gradients in .grad; result.loss, result.tokens

or, where the loop has a loss and a backward of its own (docs/other-loops.md), `attach` and `TrainerMixin`.
"""

from typing import TYPE_CHECKING, Any

from strategies.core.contract import Fidelity, Strategy
from strategies.core.edits import NoMatch
from strategies.core.objectives import DPO, GRPO, SFT, Objective, Stats
from strategies.core.prepare import Prepared, edit, prepare, undo
from strategies.core.registry import build, check, get, name_of, names, staged

if TYPE_CHECKING:
    from strategies.loops.attach import Attached, attach
    from strategies.loops.trainer import TrainerMixin

_LOOPS = {"Attached": "attach", "attach": "attach", "TrainerMixin": "trainer"}

__all__ = [
    "DPO",
    "GRPO",
    "SFT",
    "Attached",
    "Fidelity",
    "NoMatch",
    "Objective",
    "Prepared",
    "Stats",
    "Strategy",
    "TrainerMixin",
    "attach",
    "build",
    "check",
    "edit",
    "get",
    "name_of",
    "names",
    "prepare",
    "staged",
    "undo",
]


def __getattr__(name: str) -> Any:
    """These bring Transformers with them, so only when they are asked for."""
    if name not in _LOOPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"strategies.loops.{_LOOPS[name]}"), name)
