"""The choice for a budget, on layers made up of a few operators, against every choice there is."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from strategies.recomputation.choice import by_hand, frontier, least, spread
from strategies.recomputation.cost import Operator, Spot, Study

LAYERS = 3


def made_up(seed):
    """A chain with side inputs: operator i fills place i + 1 from the one before it and perhaps an older one."""
    draw = random.Random(seed)
    operators, spots = [], [Spot(None, 8)]
    for index in range(7):
        sources = {index, draw.randrange(index + 1)}
        policies = frozenset({name for name in ("norms", "mlp") if draw.random() < 0.3} | {"full"})
        key = ("", f"op{index}", 0)
        operators.append(Operator(key, policies, tuple(sources), draw.choice([1.0, 2.0, 10.0, 40.0])))
        spots.append(Spot(index, draw.choice([1, 8, 8, 24])))
    saved = sorted({0, 7, *draw.sample(range(1, 7), 4)})
    return Study(tuple(operators), tuple(spots), tuple(saved))


def every_option(study):
    keys = sorted(study.everything)
    sets = [frozenset(chosen) for count in range(len(keys) + 1) for chosen in combinations(keys, count)]
    return {(costs.nbytes, costs.seconds) for costs in map(study.costs, sets)}


def total(options):
    return sum(o.costs.nbytes for o in options), sum(o.costs.seconds for o in options)


@pytest.mark.parametrize("seed", range(30))
def test_the_curve_has_the_cheapest_at_every_price(seed):
    study = made_up(seed)
    options = every_option(study)
    curve = [(option.costs.nbytes, option.costs.seconds) for option in frontier(study)]
    assert set(curve) <= options
    assert min(curve) == min(options)
    for price in (0, *(10 ** (power / 4) for power in range(-12, 12))):
        cheapest = min(seconds + price * nbytes for nbytes, seconds in options)
        assert min(seconds + price * nbytes for nbytes, seconds in curve) == pytest.approx(cheapest, rel=1e-6)


def lower_bound(study, nbytes):
    """Seconds that no mixture of layers is below, at these bytes a layer; and the longest way between two corners."""
    options = sorted(every_option(study))
    slopes = {(b[1] - a[1]) / (a[0] - b[0]) for a, b in combinations(options, 2) if a[0] != b[0]}
    corners = {price: min(options, key=lambda o: o[1] + price * o[0]) for price in slopes if price > 0}
    line = max((s + price * (n - nbytes) for price, (n, s) in corners.items()), default=0)
    seconds = sorted({s for _, s in corners.values()} | {0})
    return max(line, 0), max((b - a for a, b in pairwise(seconds)), default=0)


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_met_and_no_policy_by_name_is_faster(seed):
    study, kinds = made_up(seed), ["it"] * LAYERS
    smallest, plain = LAYERS * min(every_option(study))[0], LAYERS * study.costs(frozenset()).nbytes
    assert least({"it": study}, kinds) == smallest
    for share in (0, 0.1, 0.25, 0.5, 0.75, 1):
        budget = smallest + share * (plain - smallest)
        nbytes, seconds = total(spread({"it": study}, kinds, budget))
        assert nbytes <= budget
        for hand in by_hand(study):
            for every in range(1, LAYERS + 1):
                mixed = [hand if index % every == 0 else by_hand(study)[0] for index in range(LAYERS)]
                assert total(mixed)[0] > budget or seconds <= total(mixed)[1]
        line, step = lower_bound(study, budget / LAYERS)
        assert seconds <= LAYERS * line + step + 1e-6
    assert spread({"it": study}, kinds, smallest - 1) is None


def test_layers_that_run_most_again_come_first():
    study = made_up(3)
    plain, smallest = study.costs(frozenset()).nbytes, least({"it": study}, ["it"])
    options = spread({"it": study}, ["it"] * 4, 2 * plain + 2 * smallest)
    seconds = [option.costs.seconds for option in options]
    assert seconds == sorted(seconds, reverse=True)
