"""Every strategy that can be found, held to every check."""

import pytest
from contract.checks import CHECKS

import strategies


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("name", strategies.names())
def test_contract(name, check):
    check(strategies.get(name))
