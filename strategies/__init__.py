"""How gradients are computed: one file a strategy. The way in, for recipes and for anyone's loop:

step = strategies.prepare(model, [strategies.get("plain")()])
result = step({"input_ids": ids, "labels": labels})    # gradients in .grad; result.loss, result.tokens
"""

from strategies.core.contract import Fidelity, Strategy
from strategies.core.edits import NoMatch
from strategies.core.objectives import DPO, GRPO, SFT, Objective, Stats
from strategies.core.prepare import Prepared, edit, prepare, undo
from strategies.core.registry import build, check, get, name_of, names, staged

__all__ = [
    "DPO",
    "GRPO",
    "SFT",
    "Fidelity",
    "NoMatch",
    "Objective",
    "Prepared",
    "Stats",
    "Strategy",
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
