"""One call of a layer, taken down so that what its backward needs can be had again instead of being kept.

A dispatch mode sees every operator below autograd and autocast. Operators that a policy asks for are taken down with
their arguments; when autograd saves one of their results it is given a reference instead, and the backward runs just
the operators between what is kept and what it asks for. The same kernels run on the same values, so nothing changes
by a bit: not under autocast, not with dropout (the random state is taken down too), not where an engine moves weights.

Torch's selective checkpointing works at the same level, but runs the whole layer again: also the operators whose
results nobody saved, and with random numbers that go on behind a draw it had cached.

A place is one storage, as it is between two writes to it; views of it are told apart by their geometry.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from strategies.recomputation.operators import (
    address,
    alias,
    each,
    flat,
    is_made_of_others,
    is_random,
    is_view,
    name_of,
    targets,
    tensors,
    wait,
    written,
)
from strategies.streaming.offload import Away
from strategies.streaming.replay import random_state, set_random_state

Key = tuple[str, str, int]
"""An operator of a layer: path of the module it ran in, its name, how many of these ran there before."""


class Kept:
    """A storage that lives until the backward, here or away."""

    def __init__(self, tensor: Tensor, activation: bool) -> None:
        self.tensor: Tensor | Away = alias(tensor)
        self.version = tensor._version
        self.activation = activation
        self.nbytes = tensor.untyped_storage().nbytes()

    def value(self) -> Tensor:
        if isinstance(self.tensor, Away):
            self.tensor = self.tensor.back()
            self.version = self.tensor._version
        elif self.tensor._version != self.version:
            raise RuntimeError("a tensor that the backward needs was changed in place behind its layer")
        return flat(self.tensor)

    def freeze(self) -> None:
        """Its storage is about to be written."""
        assert isinstance(self.tensor, Tensor)
        self.tensor = flat(self.tensor).clone()
        self.version = self.tensor._version


class Live:
    """A parameter: what it holds when it is asked for, wherever its engine has put it by then."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def value(self) -> Tensor:
        return flat(self.parameter.detach())


@dataclass(eq=False)
class Call:
    """An operator that can run again; `number` is its turn."""

    number: int
    key: Key
    policies: frozenset[str]
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[Place]
    """Where its arguments lie."""
    state: list[Tensor] | None = None
    device: Any = None
    results: list[weakref.ref[Result]] = field(default_factory=list)
    """Weak, as results know their call: nothing may have to wait for Python's collector."""

    def filled(self, made: list[Tensor]) -> Iterator[tuple[Result, Tensor]]:
        """Results that somebody still knows, with what it made of them."""
        for reference, tensor in zip(self.results, made, strict=True):
            if result := reference():
                yield result, tensor

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        if self.state is None:
            outcome = self.func(*args, **kwargs)
            wait(self.func, outcome)
            return yields(self.func, args, kwargs, outcome)
        before = random_state(self.device)
        set_random_state(self.state, self.device)
        try:
            return yields(self.func, args, kwargs, self.func(*args, **kwargs))
        finally:
            set_random_state(before, self.device)


def yields(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Any) -> list[Tensor]:
    """The tensors that an operator made or filled."""
    return targets(func, args, kwargs) or tensors(outcome)


@dataclass(eq=False)
class Result:
    """A storage that its call can fill again. `asked` counts the references of autograd to it."""

    call: Call
    nbytes: int
    storage: StorageWeakRef
    """Held, so that no other storage is given its address."""
    asked: int = 0
    again: Tensor | None = None

    def value(self) -> Tensor:
        made = self.again if self.again is not None else rebuild(self)
        self.asked -= 1
        self.again = made if self.asked > 0 else None
        return made


Place = Kept | Live | Result


@dataclass(frozen=True)
class Reference:
    """A tensor, as what lies in a place."""

    place: Place
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def to(cls, place: Place, tensor: Tensor) -> Reference:
        return cls(place, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def of(self, whole: Tensor) -> Tensor:
        return whole.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class Replay:
    """Runs calls in their order. `uses` says how often each result is taken by them; it is let go of with the last."""

    def __init__(self, uses: dict[Result, int]) -> None:
        self.uses = uses
        self.here: dict[Result, Tensor] = {}

    def arguments(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # What is written to may be asked for as it was.
        take = self._copied if written(call.func) else self._taken
        return each(call.args, Reference, take), each(call.kwargs, Reference, take)

    def keep(self, call: Call, made: list[Tensor]) -> None:
        for result, tensor in call.filled(made):
            if self.uses.get(result):
                self.here[result] = flat(tensor)

    def _taken(self, reference: Reference) -> Tensor:
        return reference.of(self._whole(reference.place))

    def _copied(self, reference: Reference) -> Tensor:
        return reference.of(self._whole(reference.place).clone())

    def _whole(self, place: Place) -> Tensor:
        if not isinstance(place, Result):
            return place.value()
        if place.again is not None:
            return place.again
        whole = self.here[place]
        self.uses[place] -= 1
        if not self.uses[place]:
            del self.here[place]
        return whole


def rebuild(wanted: Result) -> Tensor:
    """Run the calls between it and what is there; what autograd will ask for as well stays there."""
    needed: dict[Call, None] = {wanted.call: None}
    uses: dict[Result, int] = {wanted: 1}
    waiting = [wanted.call]
    while waiting:
        for source in waiting.pop().sources:
            if isinstance(source, Result) and source.again is None:
                uses[source] = uses.get(source, 0) + 1
                if source.call not in needed:
                    needed[source.call] = None
                    waiting.append(source.call)
    replay = Replay(uses)
    with torch.no_grad(), below_autocast():
        for call in sorted(needed, key=lambda call: call.number):
            made = call.run(*replay.arguments(call))
            replay.keep(call, made)
            for result, tensor in call.filled(made):
                if result.asked > 0 and result is not wanted:
                    result.again = flat(tensor)
    return replay.here[wanted]


@contextmanager
def below_autocast() -> Iterator[None]:
    """What was taken down has its casts in it."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@dataclass
class Operation:
    """What a policy is asked about: an operator that is about to run in the innermost of `modules`."""

    key: Key
    func: Any
    modules: list[nn.Module]
    given: list[Tensor]
    _places: dict[int, Place]

    def follows(self, policy: str) -> bool:
        """Whether one of its arguments is to be had again by this policy."""
        return any(self._is_had_again(tensor, policy) for tensor in self.given)

    def is_made_of(self, policy: str) -> bool:
        """Whether all of its arguments are, single numbers aside."""
        several = [tensor for tensor in self.given if tensor.numel() > 1]
        return bool(several) and all(self._is_had_again(tensor, policy) for tensor in several)

    def _is_had_again(self, tensor: Tensor, policy: str) -> bool:
        place = self._places.get(address(tensor))
        return isinstance(place, Result) and policy in place.call.policies


Policy = Callable[[Operation], frozenset[str]]
"""The names of the policies by which the operator's results are to be had again; none, and they are not."""
NONE: frozenset[str] = frozenset()


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Around one call of a layer; after it only what autograd's references reach is there. To `watch` is to leave
    autograd the tensors themselves, and to note them: what runs again must come out as they are."""

    def __init__(self, policy: Policy, modules: list[nn.Module], paths: dict[int, str], watch: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.policy = policy
        self.watch = watch
        self.noted: dict[Result, list[tuple[Reference, Tensor]]] = {}
        self.modules = modules
        self.paths = paths
        self.places: dict[int, Place] = {}
        self.saved: dict[Place, None] = {}
        self.calls: list[Call] = []
        self._born: set[int] = set()
        self._weights: set[int] = set()
        self._ran: dict[tuple[str, str], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(map(is_made_of_others, types)):
            # What it does to those comes by here as well.
            return NotImplemented
        if is_view(func):
            self._is_weight(args[0])
            return func(*args, **kwargs)
        given = tensors((*args, *kwargs.values()))
        operation = Operation(self._key(func), func, self.modules, given, self.places)
        policies, changed = self.policy(operation), targets(func, args, kwargs)
        if any(not isinstance(self.places.get(address(tensor)), Result) for tensor in changed):
            policies = NONE
        call = self._call(operation.key, policies, func, args, kwargs, given) if policies else None
        for tensor in changed:
            place = self.places.pop(address(tensor), None)
            if isinstance(place, Kept):
                place.freeze()
        outcome = func(*args, **kwargs)
        of_weights = bool(given) and all(self._is_weight(tensor) for tensor in given)
        made, others = (self._weights, self._born) if of_weights else (self._born, self._weights)
        where = set(map(address, tensors(outcome)))
        made |= where
        # The address may be that of something that is gone.
        others -= where
        if call is not None:
            before = {address(tensor) for tensor in given}
            for tensor in yields(func, args, kwargs, outcome):
                storage = tensor.untyped_storage()
                result = Result(call, storage.nbytes(), StorageWeakRef(storage))  # type: ignore[no-untyped-call]
                call.results.append(weakref.ref(result))
                if changed or storage._cdata not in before:
                    self.places[storage._cdata] = result
        return outcome

    def _key(self, func: Any) -> Key:
        path, name = self.paths.get(id(self.modules[-1]), ""), name_of(func)
        number = self._ran.get((path, name), 0)
        self._ran[path, name] = number + 1
        return path, name, number

    def _call(
        self,
        key: Key,
        policies: frozenset[str],
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
    ) -> Call:
        sources: list[Place] = []

        def refer(tensor: Tensor) -> Reference:
            reference = self._reference(tensor)
            sources.append(reference.place)
            return reference

        args, kwargs = each(args, Tensor, refer), each(kwargs, Tensor, refer)
        call = Call(len(self.calls), key, policies, func, args, kwargs, sources)
        if is_random(func):
            call.device = given[0].device
            call.state = random_state(call.device)
        self.calls.append(call)
        return call

    def _reference(self, tensor: Tensor) -> Reference:
        place = self.places.get(address(tensor))
        if place is None:
            place = Live(tensor) if isinstance(tensor, nn.Parameter) else Kept(tensor, self._is_activation(tensor))
            self.places[address(tensor)] = place
        return Reference.to(place, tensor)

    def count_in(self, hidden: Tensor) -> None:
        """The hidden states that are handed in are the layer's to keep, also where nothing below them is trained."""
        self._born.add(address(hidden))

    def _is_activation(self, tensor: Tensor) -> bool:
        """Made here, or handed in with a gradient to come: neither weights nor what every layer is given."""
        return not self._is_weight(tensor) and (tensor.requires_grad or address(tensor) in self._born)

    def _is_weight(self, tensor: Tensor) -> bool:
        where = address(tensor)
        if where not in self._born and where not in self._weights and isinstance(tensor, nn.Parameter):
            self._weights.add(where)
        return where in self._weights

    def pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter):
            return tensor
        if is_made_of_others(type(tensor)):
            return tensor.detach()
        reference = self._reference(tensor)
        self.saved[reference.place] = None
        if self.watch:
            kept = alias(tensor)
            if isinstance(reference.place, Result):
                self.noted.setdefault(reference.place, []).append((reference, kept))
            return kept
        if isinstance(reference.place, Result):
            reference.place.asked += 1
        return reference


def unpack(packed: Any) -> Tensor:
    if not isinstance(packed, Reference):
        return packed  # type: ignore[no-any-return]
    with torch.no_grad():
        return packed.of(packed.place.value())


def reached(places: Iterable[Place]) -> set[Place]:
    """These, and what they are made of."""
    found: set[Place] = set()
    waiting = list(places)
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            if isinstance(place, Result):
                waiting += place.call.sources
    return found
