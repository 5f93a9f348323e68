"""Every strategy that can be found, held to every check; and what takes other paths through one."""

from functools import partial

import pytest
from contract.checks import CHECKS, settings

import strategies

RECOMPUTE = {
    "attention": {"policy": "attention"},
    "full": {"policy": "full"},
    "mlp by pattern": {"policy": {"*.layers.0.*": "mlp", "*.self_attn": ["full"]}},
    "auto": {"policy": "auto", "budget": 0.4},
}
# In one process: backwards in two parts, and two stages on a rank.
TWOBP = {"1f1b+2bp": {"schedule": "1f1b+2bp"}, "v": {"schedule": "v"}}
FACTORIES = (
    settings()
    | {f"recompute, {name}": partial(strategies.get("recompute"), **fields) for name, fields in RECOMPUTE.items()}
    | {f"twobp, {name}": partial(strategies.get("twobp"), **fields) for name, fields in TWOBP.items()}
)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
def test_contract(factory, check):
    check(factory)
