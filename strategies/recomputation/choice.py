"""The cheapest operators to run again so that what the layers hold until the backward fits a budget.

At a price for a byte, the operators of one layer that cost least, seconds and bytes together, are a minimum cut: what
autograd asks for is needed; what is needed is kept at its price, or its operator runs; and that needs what it reads.
The prices between the fastest choice and the smallest give the curve of bytes against seconds, and the policies by name
lie on or above it. Then each layer takes a point of its curve (`spread`): a knapsack whose items are the steps along
the curves, largest saving a second first, and what is left of the budget is spent on single layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from strategies.recomputation.cost import NOTHING, Costs, Study
from strategies.recomputation.tape import Key

UNITS_A_SECOND = 1e12
_NEEDED, _FREE = ("needed", 0), ("free", 0)
HAND = ("attention", "norms", "activations", "mlp")


@dataclass(frozen=True)
class Option:
    """Operators of one layer that run again."""

    again: frozenset[Key]
    costs: Costs


def by_hand(study: Study) -> list[Option]:
    """Every union of the policies by name, in the same order for every kind of layer."""
    unions = [names for count in range(len(HAND) + 1) for names in combinations(HAND, count)]
    sets = [frozenset[Key]().union(*(study.picked(name) for name in names)) for names in unions]
    return [Option(again, study.costs(again)) for again in (*sets, study.everything)]


def frontier(study: Study) -> list[Option]:
    """The options that no other beats in both, fastest first."""
    curve = [Option(again, study.costs(again)) for again in (NOTHING, _cheapest(study, None))]
    return _undominated([*by_hand(study), *curve, *_between(study, *curve)])


def _between(study: Study, fast: Option, small: Option) -> Iterator[Option]:
    """The corners of the curve between two of its points."""
    saved = fast.costs.nbytes - small.costs.nbytes
    if saved <= 0:
        return
    price = (small.costs.seconds - fast.costs.seconds) / saved
    again = _cheapest(study, price)
    found = Option(again, study.costs(again))
    gain = fast.costs.seconds - found.costs.seconds + price * (fast.costs.nbytes - found.costs.nbytes)
    if gain > 1e-6 * small.costs.seconds and small.costs.nbytes < found.costs.nbytes < fast.costs.nbytes:
        yield from _between(study, fast, found)
        yield found
        yield from _between(study, found, small)


def _cheapest(study: Study, price: float | None) -> frozenset[Key]:
    """At so many seconds a byte; without a price a byte is dearer than all operators."""
    import networkx

    # Whole numbers: with others a maximum flow may not end.
    seconds = [round(operator.seconds * UNITS_A_SECOND) for operator in study.operators]
    a_byte = 1 + sum(seconds) if price is None else price * UNITS_A_SECOND
    graph: Any = networkx.DiGraph()
    graph.add_nodes_from([_NEEDED, _FREE])
    bytes_of: Counter[int] = Counter()
    for number, spot in enumerate(study.spots):
        cost = round(spot.nbytes * a_byte)
        graph.add_edge(("spot", number), _FREE, capacity=cost)
        if spot.maker is not None:
            bytes_of[spot.maker] += cost
            graph.add_edge(("run", spot.maker), ("spot", number))
    for number in study.saved:
        graph.add_edge(_NEEDED, ("spot", number))
    for index, operator in enumerate(study.operators):
        # What it makes is paid for as if it were kept, and given back here.
        cost = seconds[index] - bytes_of[index]
        if operator.fixed:
            graph.add_edge(("run", index), _FREE)
        elif cost >= 0:
            graph.add_edge(("run", index), _FREE, capacity=cost)
        else:
            graph.add_edge(_NEEDED, ("run", index), capacity=-cost)
        for source in operator.sources:
            graph.add_edge(("run", index), ("spot", source))
            spot = study.spots[source]
            if spot.overwritten and spot.maker is not None:
                # What is written onto must be made again first.
                graph.add_edge(("run", index), ("run", spot.maker))
    _, (chosen, _) = networkx.minimum_cut(graph, _NEEDED, _FREE)
    run = {node[1] for node in chosen if node[0] == "run"}
    return frozenset(operator.key for index, operator in enumerate(study.operators) if index in run)


def _saved_a_second(before: Costs, after: Costs) -> float:
    return (before.nbytes - after.nbytes) / max(after.seconds - before.seconds, 1e-12)


def _undominated(options: Iterable[Option]) -> list[Option]:
    found: list[Option] = []
    for option in sorted(options, key=lambda option: (option.costs.seconds, option.costs.nbytes)):
        if not found or option.costs.nbytes < found[-1].costs.nbytes:
            found.append(option)
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """Those that no mixture of two others beats."""
    found: list[Option] = []
    for option in options:
        while len(found) > 1 and _saved_a_second(found[-2].costs, found[-1].costs) < _saved_a_second(
            found[-2].costs, option.costs
        ):
            found.pop()
        found.append(option)
    return found


def least(studies: Mapping[str, Study], kinds: Sequence[str]) -> int:
    """The smallest budget that can be met."""
    curves = {kind: frontier(study) for kind, study in studies.items()}
    return sum(curves[kind][-1].costs.nbytes for kind in kinds)


def spread(studies: Mapping[str, Study], kinds: Sequence[str], budget: float) -> list[Option] | None:
    """An option for each layer, given their kinds; None where nothing fits.

    Layers that run most again come first: their turn in the backward is when the others' memory is free again.
    """
    curves = {kind: frontier(study) for kind, study in studies.items()}
    counts = Counter(kinds)
    chosen = {kind: [curve[0]] * counts[kind] for kind, curve in curves.items()}
    total = sum(option.costs.nbytes for options in chosen.values() for option in options)
    steps = [
        (_saved_a_second(before.costs, after.costs), kind, before, after)
        for kind, curve in curves.items()
        for before, after in pairwise(_hull(curve))
    ]
    for _, kind, before, after in sorted(steps, key=lambda step: -step[0]):
        for index in range(counts[kind]):
            if total <= budget:
                break
            assert chosen[kind][index] is before
            chosen[kind][index] = after
            total += after.costs.nbytes - before.costs.nbytes
    if total > budget:
        return None
    _spend(chosen, curves, budget - total)
    mixed = _in_order(chosen, kinds)
    hand = [options for options in _hands(studies, kinds) if _bytes(options) <= budget]
    return min([mixed, *hand], key=lambda options: sum(option.costs.seconds for option in options))


def _spend(chosen: dict[str, list[Option]], curves: Mapping[str, list[Option]], left: float) -> None:
    """What is left of the budget makes single layers faster."""
    while True:
        gains = [
            (option.costs.seconds - faster.costs.seconds, kind, index, faster)
            for kind, options in chosen.items()
            for index, option in enumerate(options)
            if index == 0 or option is not options[index - 1]
            for faster in curves[kind]
            if faster.costs.seconds < option.costs.seconds and faster.costs.nbytes - option.costs.nbytes <= left
        ]
        if not gains:
            return
        _, kind, index, faster = max(gains, key=lambda gain: gain[0])
        left -= faster.costs.nbytes - chosen[kind][index].costs.nbytes
        chosen[kind][index] = faster


def _in_order(chosen: Mapping[str, list[Option]], kinds: Sequence[str]) -> list[Option]:
    heaviest = {
        kind: iter(sorted(options, key=lambda option: -option.costs.seconds)) for kind, options in chosen.items()
    }
    return [next(heaviest[kind]) for kind in kinds]


def _hands(studies: Mapping[str, Study], kinds: Sequence[str]) -> list[list[Option]]:
    """Every policy by name on every n-th layer."""
    options = {kind: by_hand(study) for kind, study in studies.items()}
    count = len(next(iter(options.values())))
    return [
        [options[kind][number if index % every == 0 else 0] for index, kind in enumerate(kinds)]
        for number in range(count)
        for every in range(1, len(kinds) + 1)
    ]


def _bytes(options: Sequence[Option]) -> int:
    return sum(option.costs.nbytes for option in options)
