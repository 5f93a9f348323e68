"""What engines send, from the sizes of a model alone: every exchange of a step, and between which of its computations.

A script is what an engine does in one step: passes over the model's parts, each a turn of computing with what crosses
ranks before and after it, and what the update exchanges. Bytes are added up along it, and times are laid out along it
(`launch/scaling_time.py`). Messages are as they are asked for: `payload_bytes` is the whole tensor that an all-reduce
sums, an all-gather makes, a reduce-scatter takes, a send carries.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.shares import REDUCE_BUCKET, SINGLE

if TYPE_CHECKING:
    from torch import nn

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "send")
# DDP's buckets; then DeepSpeed's defaults of stage 3, in elements.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20
PREFETCH = 50_000_000
REUSE_DISTANCE = 1_000_000_000
PERSISTENT = 100_000


class Group(NamedTuple):
    """Ranks that exchange something, over how many nodes; `beside` such groups leave a node by the same link."""

    ranks: int
    nodes: int = 1
    beside: int = 1


class Message(NamedTuple):
    kind: str
    payload_bytes: int
    group: Group
    times: int = 1


Messages = tuple[Message, ...]


class Turn(NamedTuple):
    """A part of the model computes; `before` must be there by then, `after` leaves as soon as it is done."""

    part: str
    before: Messages = ()
    after: Messages = ()


class Pass(NamedTuple):
    backward: bool
    turns: tuple[Turn, ...]
    times: int = 1


@dataclass(frozen=True)
class Script:
    """One step of one rank. `hides`: what a pass exchanges goes on while it computes."""

    passes: tuple[Pass, ...]
    update: Messages = ()
    hides: bool = False

    def messages(self) -> Iterator[Message]:
        for one in self.passes:
            for turn in one.turns:
                yield from (message._replace(times=message.times * one.times) for message in turn.before + turn.after)
        yield from self.update


class Weight(NamedTuple):
    """A parameter of `rows` x `columns` elements. `packed_bytes` is an element's size where that does not follow the
    precision."""

    rows: int
    columns: int
    trained: bool
    matrix: bool = True
    packed_bytes: int | None = None

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Part:
    """Weights that stand together: of `root`, `embedding`, `layer` or `head`; `tied` is the embedding that is the head
    as well. `root` has what is in no other part."""

    role: str
    weights: tuple[Weight, ...]
    ids: tuple[int, ...] = field(default=(), compare=False)
    """Of the parameters."""

    @property
    def trained(self) -> tuple[Weight, ...]:
        return tuple(weight for weight in self.weights if weight.trained)

    def of(self, ids: set[int]) -> Part:
        """With these parameters alone."""
        kept = [(weight, key) for weight, key in zip(self.weights, self.ids, strict=True) if key in ids]
        return Part(self.role, tuple(weight for weight, _ in kept), tuple(key for _, key in kept))


def parts_of(model: Any) -> list[Part]:
    """Of a whole model, in the order of a forward."""
    from distrib.units import blocks, ends

    outer = [end if isinstance(end, list) else [end] for end in ends(model)]
    seen: set[int] = set()
    layers = [_part("layer", [block], seen) for _, block in blocks(model)]
    first = _part("tied" if len(outer[0]) > 1 else "embedding", outer[0], seen)
    after = [_part("head", modules, seen) for modules in outer[1:]]
    return [_part("root", [model], seen), first, *layers, *after]


def _part(role: str, modules: Sequence[nn.Module], seen: set[int]) -> Part:
    found = {id(p): p for module in modules for p in module.parameters() if id(p) not in seen}
    seen.update(found)
    weights = [
        Weight(
            p.shape[0] if p.ndim else 1,
            math.prod(p.shape[1:]),
            p.requires_grad,
            p.ndim > 1,
            None if p.is_floating_point() else p.itemsize,
        )
        for p in found.values()
    ]
    return Part(role, tuple(weights), tuple(found))


def wire_bytes(kind: str, payload_bytes: float, ranks: int, gloo: bool = False) -> float:
    """That a rank sends, on a ring. Gloo reduces for all ranks where it should reduce and scatter."""
    if kind == "send":
        return payload_bytes
    twice = kind == "all_reduce" or (gloo and kind == "reduce_scatter")
    return (2 if twice else 1) * (ranks - 1) / ranks * payload_bytes


def sent_bytes(messages: Iterable[Message], gloo: bool = False) -> dict[str, float]:
    """By class, of one rank and step."""
    found = dict.fromkeys(KINDS, 0.0)
    for kind, payload, group, times in messages:
        found[kind] += times * wire_bytes(kind, payload, group.ranks, gloo)
    return found


def together(groups: Sequence[Sequence[int]], per_node: int) -> Group:
    """Groups of ranks that exchange alike and at once; as the one that is spread furthest."""
    homes = [{rank // per_node for rank in ranks} for ranks in groups]
    leaving = Counter(node for nodes in homes if len(nodes) > 1 for node in nodes)
    return Group(len(groups[0]), max(map(len, homes)), max(leaving.values(), default=1))


def ddp(parts: Sequence[Part], group: Group, micro_batches: int, hides: bool) -> Script:
    """Gradients cross in float32 buckets, in the last backward alone."""
    reduced = _buckets(parts, "all_reduce", group, lambda w: SINGLE * w.elements, FIRST_BUCKET_BYTES, BUCKET_BYTES)
    forward, quiet = _turns(parts), _turns(parts, backward=True)
    return _script(forward, quiet, _turns(parts, after=reduced, backward=True), micro_batches, hides=hides)


def zero(parts: Sequence[Part], stage: int, element: int, group: Group, micro_batches: int, hides: bool) -> Script:
    """Stages 1 and 2 sum whole gradients, in the precision of the products; stage 1 in the last backward, 2 in every
    one. A rank keeps its share of them, and the update gathers the weights."""
    if stage == 3:
        return _zero3(parts, element, group, micro_batches, hides)
    most = REDUCE_BUCKET * element
    reduced = _buckets(parts, "all_reduce", group, lambda w: element * w.elements, most, most)
    last = _turns(parts, after=reduced, backward=True)
    quiet = last if stage == 2 else _turns(parts, backward=True)
    update = []
    for matrix in (True, False):
        elements = sum(w.elements for part in parts for w in part.trained if w.matrix is matrix)
        # The optimizer's two groups, padded.
        update += [Message("all_gather", element * _whole(elements, 2 * group.ranks), group)] * bool(elements)
    return _script(_turns(parts), quiet, last, micro_batches, tuple(update), hides)


def _zero3(parts: Sequence[Part], element: int, group: Group, micro_batches: int, hides: bool) -> Script:
    """Small weights are everywhere, and gathered by the update. Others are in the forward, and in the backward those
    that DeepSpeed let go, since it is far from one to the other."""

    def held(weight: Weight) -> int:
        return _whole(weight.elements, group.ranks) * (weight.packed_bytes or element)

    sizes = [sum(held(w) for w in part.weights if w.elements > PERSISTENT) for part in parts]
    later = [sum(w.elements for part in parts[index + 1 :] for w in part.weights) for index in range(len(parts))]
    again = [size * (2 * distance > REUSE_DISTANCE) for size, distance in zip(sizes, later, strict=True)]
    most = REDUCE_BUCKET * element
    reduced = _buckets(parts, "reduce_scatter", group, held, most, most)
    forward = _turns(parts, before=_fetched(sizes, PREFETCH * element, group))
    fetched = _fetched(again[::-1], PREFETCH * element, group)[::-1]
    backward = _turns(parts, before=fetched, after=reduced, backward=True)
    update = [Message("all_gather", held(w), group) for part in parts for w in part.weights if w.elements <= PERSISTENT]
    return _script(forward, backward, backward, micro_batches, tuple(update), hides)


def fsdp2(parts: Sequence[Part], element: int, group: Group, micro_batches: int, hides: bool) -> Script:
    """A part is gathered in the forward and, except the root, in the backward; its gradients leave in float32 when they
    are there, beside frozen weights in the last backward alone."""
    frozen = any(not weight.trained for part in parts for weight in part.weights)
    gathers = [gathered(part, element, group) for part in parts]
    again = [() if part.role == "root" else one for part, one in zip(parts, gathers, strict=True)]
    scatters = [scattered(part, group) for part in parts]
    last = _turns(parts, before=again, after=scatters, backward=True)
    quiet = _turns(parts, before=again, backward=True) if frozen else last
    script = _script(_turns(parts, before=gathers), quiet, last, micro_batches, hides=hides)
    # A frozen embedding, which a backward fetches in vain, stays until the next forward.
    if micro_batches == 1 or parts[1].role != "embedding" or parts[1].trained:
        return script
    first, *others = script.passes
    stays = [turn._replace(before=()) if turn.part == "embedding" else turn for turn in first.turns]
    later = Pass(False, tuple(stays), micro_batches - 1)
    return replace(script, passes=(first._replace(times=1), later, *others))


def gathered(part: Part, element: int, group: Group) -> Messages:
    """Every weight is padded to whole rows a rank."""
    padded = sum(_whole(w.rows, group.ranks) * w.columns * (w.packed_bytes or element) for w in part.weights)
    return (Message("all_gather", padded, group),) * bool(padded)


def scattered(part: Part, group: Group) -> Messages:
    padded = sum(_whole(w.rows, group.ranks) * w.columns * SINGLE for w in part.trained)
    return (Message("reduce_scatter", padded, group),) * bool(padded)


def replicated(parts: Sequence[Part], sharded: bool, element: int, replicas: Group) -> tuple[Messages, Messages]:
    """Of a stage of a pipeline, whose `parts` these are: before its first operation, and after the last."""
    if replicas.ranks == 1:
        return (), ()
    if sharded:
        before = [message for part in parts for message in gathered(part, element, replicas)]
        return tuple(before), tuple(message for part in parts for message in scattered(part, replicas))
    after = [Message("all_reduce", SINGLE * w.elements, replicas) for part in parts for w in part.trained]
    return (), tuple(after)


def shared(parts: Sequence[Part], replicas: int, group: Group) -> Messages:
    """The gradient of a weight that the first stage and the last one have, of which each of `replicas` has a part."""
    tied = [w for part in parts if part.role == "tied" for w in part.trained if w.matrix]
    return tuple(Message("all_reduce", SINGLE * -(-w.rows // replicas) * w.columns, group) for w in tied)


def _whole(number: int, ranks: int) -> int:
    return -(-number // ranks) * ranks


def _turns(
    parts: Sequence[Part],
    before: Sequence[Messages] | None = None,
    after: Sequence[Messages] | None = None,
    backward: bool = False,
) -> Pass:
    """A tied embedding is the head at the other end, where a backward begins."""
    nothing: Sequence[Messages] = [()] * len(parts)
    roles = [part.role for part in parts]
    turns = [Turn(*one) for one in zip(roles, before or nothing, after or nothing, strict=True)]
    if "tied" in roles:
        place = roles.index("tied")
        turns.append(Turn("head", turns[place].before if backward else ()))
        if backward:
            turns[place] = turns[place]._replace(before=())
    return Pass(backward, tuple(turns[::-1] if backward else turns))


def _script(
    forward: Pass, quiet: Pass, last: Pass, micro_batches: int, update: Messages = (), hides: bool = False
) -> Script:
    passes = (forward._replace(times=micro_batches), quiet._replace(times=micro_batches - 1), last)
    return Script(tuple(one for one in passes if one.times), update, hides)


def _buckets(
    parts: Sequence[Part], kind: str, group: Group, size: Callable[[Weight], int], first: int, most: int
) -> list[Messages]:
    """By the part whose gradients fill one, backwards; the rest leaves at the end."""
    found: list[Messages] = []
    held, bound = 0, first
    for part in reversed(parts):
        full: list[Message] = []
        for weight in reversed(part.trained):
            held += size(weight)
            if held >= bound:
                full.append(Message(kind, held, group))
                held, bound = 0, most
        found.append(tuple(full))
    found[-1] += (Message(kind, held, group),) * bool(held)
    return found[::-1]


def _fetched(sizes: Sequence[int], most: int, group: Group) -> list[Messages]:
    """Parts are gathered some at a time, when the first of them is needed."""
    found: list[Messages] = [()] * len(sizes)
    start = held = 0
    for index, size in enumerate(sizes):
        held += size
        if held >= most or index == len(sizes) - 1:
            found[start] = (Message("all_gather", held, group),) * bool(held)
            start, held = index + 1, 0
    return found
