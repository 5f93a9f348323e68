"""What a layer's recomputation costs and saves, from one call of the layer that was taken down whole.

Every operator is timed on the values that it had. What is kept follows from the set of operators that run again: what
autograd asks for and is not one of their results, and what they are made from.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry

from strategies.recomputation.operators import flat, is_collective, tensors, written
from strategies.recomputation.tape import Call, Kept, Key, Place, Replay, Result, Tape, below_autocast

REPEATS = 3
FLOPS_PER_BYTE = 100.0
"""Where nothing can be timed: how many of them take a device as long as a byte of its memory does, about."""
BYTES_PER_SECOND = 1e12
NOTHING: frozenset[Key] = frozenset()


@dataclass(frozen=True)
class Costs:
    """What a set of operators that run again holds until the backward, and costs in it."""

    nbytes: int
    seconds: float


@dataclass(frozen=True)
class Operator:
    """Of a layer. `sources` are places by number."""

    key: Key
    policies: frozenset[str]
    sources: tuple[int, ...]
    seconds: float
    fixed: bool = False
    """Never runs again by choice: what crosses ranks, since others might choose otherwise."""


@dataclass(frozen=True)
class Spot:
    """A place, with the number of the operator that fills it, if any. `nbytes` is 0 for what is there in any case."""

    maker: int | None
    nbytes: int
    overwritten: bool = False


@dataclass(frozen=True)
class Study:
    """One layer, as numbers; `saved` are the places that autograd asks for."""

    operators: tuple[Operator, ...]
    spots: tuple[Spot, ...]
    saved: tuple[int, ...]
    wrong: frozenset[Key] = frozenset()
    """Operators whose results came out otherwise when they ran again."""

    @property
    def everything(self) -> frozenset[Key]:
        return frozenset(operator.key for operator in self.operators if not operator.fixed)

    def picked(self, policy: str) -> frozenset[Key]:
        return frozenset(operator.key for operator in self.operators if policy in operator.policies) - self.wrong

    def costs(self, again: frozenset[Key]) -> Costs:
        run, kept = self.walk(again)
        return Costs(
            sum(self.spots[number].nbytes for number in kept), sum(self.operators[number].seconds for number in run)
        )

    def walk(self, again: frozenset[Key]) -> tuple[set[int], set[int]]:
        """The operators that run again and the places that are kept."""
        run: set[int] = set()
        kept: set[int] = set()
        seen: set[int] = set()
        waiting = list(self.saved)
        while waiting:
            number = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            maker = self.spots[number].maker
            if maker is None or self.operators[maker].key not in again:
                kept.add(number)
            elif maker not in run:
                run.add(maker)
                waiting += self.operators[maker].sources
        return run, kept


def study(tape: Tape) -> Study:
    """Of a call that was taken down whole, while its values are there."""
    numbers: dict[Place, int] = {}

    def number(place: Place) -> int:
        return numbers.setdefault(place, len(numbers))

    times, wrong = _run_again(tape)
    operators = tuple(
        Operator(
            call.key,
            call.policies,
            tuple(number(place) for place in call.sources),
            seconds,
            is_collective(call.func) or call.key in wrong,
        )
        for call, seconds in zip(tape.calls, times, strict=True)
    )
    saved = tuple(number(place) for place in tape.saved)
    makers = {call: index for index, call in enumerate(tape.calls)}
    lost = {place for call in tape.calls if written(call.func) for place in _overwritten(call)}
    spots = tuple(_spot(place, makers, place in lost) for place in numbers)
    return Study(operators, spots, saved, wrong)


def _spot(place: Place, makers: dict[Call, int], overwritten: bool) -> Spot:
    if isinstance(place, Result):
        return Spot(makers[place.call], place.nbytes, overwritten)
    return Spot(None, place.nbytes if isinstance(place, Kept) and place.activation else 0)


def _overwritten(call: Call) -> list[Result]:
    made = {result.storage.cdata for reference in call.results if (result := reference())}
    return [source for source in call.sources if isinstance(source, Result) and source.storage.cdata in made]


def _run_again(tape: Tape) -> tuple[list[float], frozenset[Key]]:
    """How long each operator takes, and those that do not make again what autograd was given: a kernel that the
    dispatcher does not know of has written there."""
    uses = Counter(place for call in tape.calls for place in call.sources if isinstance(place, Result))
    replay = Replay(uses)
    times, wrong = [], set()
    with torch.no_grad(), below_autocast():
        for call in tape.calls:
            args, kwargs = replay.arguments(call)
            made = call.run(args, kwargs)
            if written(call.func):
                # To take its time is to write there again.
                made = [_copy(tensor) for tensor in made]
            times.append(_seconds(call, args, kwargs, made))
            replay.keep(call, made)
            for result, tensor in call.filled(made):
                for reference, right in tape.noted.get(result, ()):
                    if not _alike(reference.of(flat(tensor)), right):
                        wrong.add(call.key)
                        if result in replay.here:
                            replay.here[result] = flat(right)
    return times, frozenset(wrong)


def _copy(tensor: Tensor) -> Tensor:
    """With all of its storage."""
    return flat(tensor).clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _alike(again: Tensor, right: Tensor) -> bool:
    """But for the order of sums, which some kernels do not fix."""
    if isinstance(right, FakeTensor):
        return True
    if not right.is_floating_point() or not right.numel():
        return torch.equal(again, right)
    largest = right.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    return torch.allclose(again.double(), right.double(), 1e-2, 1e-5 + 1e-3 * largest, equal_nan=True)


def _seconds(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> float:
    given = tensors((*args, *kwargs.values()))
    if any(isinstance(tensor, FakeTensor) for tensor in (*given, *made)):
        return _supposed(call, args, kwargs, given, made)
    if any(tensor.is_cuda for tensor in given):
        return min(_on_gpu(call, args, kwargs) for _ in range(REPEATS))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call.run(args, kwargs)
        times.append(time.perf_counter() - begin)
    return min(times)


def _on_gpu(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    call.run(args, kwargs)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _supposed(
    call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor], made: list[Tensor]
) -> float:
    count = flop_registry.get(call.func.overloadpacket)
    flops = count(*args, **kwargs, out_val=made[0] if len(made) == 1 else tuple(made)) if count else 0
    moved = sum(tensor.numel() * tensor.dtype.itemsize for tensor in (*given, *made))
    return float(max(moved, flops / FLOPS_PER_BYTE)) / BYTES_PER_SECOND
