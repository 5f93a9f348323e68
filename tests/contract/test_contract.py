"""Every strategy that can be found, held to every check."""

from functools import partial

import pytest
from contract.checks import CHECKS, small

import strategies


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("name", strategies.names())
def test_contract(name, check):
    check(partial(strategies.get(name), **small(name)))
