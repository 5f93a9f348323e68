"""Changes to single modules, as data that can be collected, checked, applied and undone.

A wrapped module is an instance of a subclass made here, with the same name, whose first base is the edit's
mixin: no module is renamed, parameters and state dict are the same, `isinstance` holds, and copies and
pickles keep the edit. What was there before is kept on the module itself, so an undo finds it after PEFT or a
copy as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from distrib.errors import Refused, UserError


class NoMatch(UserError):
    """An edit, or a strategy, that would change nothing."""


@dataclass(frozen=True)
class Swap:
    """Another module in the place of `name`. What `make` returns has the same parameter names and the very
    same trainable parameters: an optimizer or a shard may already hold them."""

    name: str
    make: Callable[[nn.Module], nn.Module]
    must_run: bool = True


@dataclass(frozen=True)
class Wrap:
    """`mixin` comes before the instance's class; it calls `super().forward`. `settings` become attributes. A mixin that
    changes what is computed has a `true_forward`, whose gradient by autograd is the one that it means."""

    name: str
    mixin: type
    settings: Mapping[str, Any] = field(default_factory=dict)
    must_run: bool = True


@dataclass(frozen=True)
class Drop:
    """The module `name`, which has no parameters, passes its input through. With `elsewhere` it may have some: another
    rank holds them."""

    name: str
    must_run: bool = False
    elsewhere: bool = False


class Elsewhere(nn.Module):
    """In the place of a module that another stage of a pipeline runs: passes on what it is given, or, where it is the
    last before this stage, what the stage before has sent. It keeps the plain attributes that a model looks at."""

    def __init__(self, before: nn.Module) -> None:
        super().__init__()
        own = {name: value for name, value in plain_attributes(before).items() if not name.startswith("_ebbtide_")}
        vars(self).update(own, received=None)
        self.values: int | None = None
        """A layer of some models gives so many things, the hidden state first."""
        # PEFT may have put something around it.
        inner: Any = getattr(before, "base_layer", getattr(before, "original_module", before))
        self.embeds = (inner.embedding_dim, inner.weight.dtype) if isinstance(inner, nn.Embedding) else None

    def forward(self, given: Any = None, *args: Any, **kwargs: Any) -> Any:
        state = self.received
        if state is None:
            state = next(iter(kwargs.values())) if given is None else given
            state = _embedded(state, *self.embeds) if self.embeds else state
        return state if self.values is None else (state, *[None] * (self.values - 1))


def whole(module: nn.Module) -> nn.Module:
    """The module, or the one that another stage has in its place."""
    before = vars(module)[SWAPPED].before if isinstance(module, Elsewhere) and SWAPPED in vars(module) else module
    assert isinstance(before, nn.Module)
    return before


def _embedded(ids_BT: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Something to try the layers of a later stage on: different from token to token."""
    number_D = torch.arange(width, dtype=torch.float32, device=ids_BT.device)
    return torch.sin(ids_BT[..., None] + 1 + number_D).to(dtype)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that are neither weights nor modules."""
    own = {name: value for name, value in vars(module).items() if name not in vars(nn.Module())}
    # Someone may have put a bound forward on the instance: it would run the real model.
    own.pop("forward", None)
    return own


Edit = Swap | Wrap | Drop


@dataclass
class Mark:
    """Left on an edited module: what it was before, whose edit it is, and whether it ran edited."""

    owner: str
    name: str
    before: Any
    must_run: bool
    settings: tuple[str, ...] = ()
    ran: bool = False
    bypassed: bool = False


SWAPPED, WRAPPED = "_ebbtide_swapped", "_ebbtide_wrapped"
_PEFT_SEGMENTS = {"base_layer", "default", "modules_to_save", "original_module"}


def original_class(module: nn.Module) -> Any:
    """The class of a module before its wrap."""
    mark = module.__dict__.get(WRAPPED)
    return type(module) if mark is None else mark.before


def base_name(name: str) -> str:
    """The name a module or parameter has in the base model, whatever PEFT put around it."""
    inner = name.removeprefix("base_model.model.")
    return ".".join(part for part in inner.split(".") if part not in _PEFT_SEGMENTS)


def apply(model: nn.Module, owned_edits: Iterable[tuple[str, Edit]]) -> None:
    """Apply every edit with its owner's name, swaps before wraps, or none of them when two conflict."""
    owned = list(owned_edits)
    _refuse_conflicts(model, owned)
    try:
        for owner, edit in sorted(owned, key=lambda pair: isinstance(pair[1], Wrap)):
            if isinstance(edit, Wrap):
                _wrap(model.get_submodule(edit.name), edit, owner)
            else:
                _replace(model, edit, owner)
    except BaseException:
        undo(model)
        raise


def _refuse_conflicts(model: nn.Module, owned: list[tuple[str, Edit]]) -> None:
    taken: dict[tuple[int, str], str] = {}
    for owner, edit in owned:
        try:
            module = model.get_submodule(edit.name)
        except AttributeError:
            raise NoMatch(f"strategy {owner}: no module {edit.name!r} in {type(model).__name__}") from None
        kind, verb = (WRAPPED, "wrap") if isinstance(edit, Wrap) else (SWAPPED, "replace")
        if kind in module.__dict__:
            earlier = module.__dict__[kind].owner
            raise Refused(f"strategy {owner}: {edit.name!r} is already edited by {earlier}: undo that first")
        if (id(module), kind) in taken:
            other = taken[id(module), kind]
            raise Refused(f"strategies {other} and {owner} both {verb} {edit.name!r}: use one of them")
        taken[id(module), kind] = owner


def _wrap(module: nn.Module, edit: Wrap, owner: str) -> None:
    settings, before = dict(edit.settings), cast(Any, type(module))
    module.__dict__.update(settings)
    module.__dict__[WRAPPED] = Mark(owner, edit.name, before, edit.must_run, tuple(settings))
    module.__class__ = wrapped_class(before, edit.mixin)


@cache
def wrapped_class(before: Any, mixin: type) -> Any:
    """A subclass of `before` under its own name, so that Transformers writes the right architecture."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark = self.__dict__[WRAPPED]
        if mark.bypassed:
            return getattr(mixin, "true_forward", before.forward)(self, *args, **kwargs)
        mark.ran = True
        return mixin.forward(self, *args, **kwargs)  # type: ignore[attr-defined]

    def reduce(self: Any, protocol: int) -> Any:
        return _blank, (before, mixin), self.__getstate__()

    # Trainers look at the signature of forward to learn which columns a model takes.
    forward.__signature__ = inspect.signature(before.forward)  # type: ignore[attr-defined]
    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": before.__module__}
    made = type(before.__name__, (mixin, before), body)
    made.__qualname__ = before.__qualname__
    return made


def _blank(before: Any, mixin: type) -> Any:
    made = wrapped_class(before, mixin)
    return made.__new__(made)


def _replace(model: nn.Module, edit: Swap | Drop, owner: str) -> None:
    if not edit.name:
        raise Refused(f"strategy {owner}: the model itself cannot be replaced; wrap it")
    before = model.get_submodule(edit.name)
    after = _successor(before, edit)
    if not isinstance(after, Elsewhere):
        _refuse_other_parameters(before, after, edit, owner)
    after.train(before.training)
    after.__dict__[SWAPPED] = Mark(owner, edit.name, before, edit.must_run)
    after.register_forward_pre_hook(_note_run)
    _place(model, edit.name, after)


def _successor(before: nn.Module, edit: Swap | Drop) -> nn.Module:
    if isinstance(edit, Swap):
        return edit.make(before)
    return Elsewhere(before) if edit.elsewhere else nn.Identity()


def _refuse_other_parameters(before: nn.Module, after: nn.Module, edit: Swap | Drop, owner: str) -> None:
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    if old.keys() != new.keys() or before.state_dict().keys() != after.state_dict().keys():
        raise Refused(f"strategy {owner}: replacing {edit.name!r} would change its parameter names")
    lost = [name for name, kept in old.items() if kept.requires_grad and new[name] is not kept]
    if lost:
        raise Refused(f"strategy {owner}: replacing {edit.name!r} would lose its trainable {lost[0]!r}")


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _note_run(module: nn.Module, _: Any) -> None:
    module.__dict__[SWAPPED].ran = True


def undo(model: nn.Module) -> None:
    """Every module as it was before its edits, wraps first; a model without edits is left alone."""
    for name, module in list(model.named_modules()):
        mark = module.__dict__.get(WRAPPED)
        if mark is None:
            continue
        if type(module).__bases__[-1] is not mark.before:
            raise Refused(f"{name or 'the model'} was sharded or changed after its edit: undo that first")
        module.__class__ = mark.before
        for key in (WRAPPED, *mark.settings):
            del module.__dict__[key]
    for name, module in list(model.named_modules()):
        mark = module.__dict__.get(SWAPPED)
        if mark is not None:
            mark.before.train(module.training)
            _place(model, name, mark.before)


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Every edited module runs as it was before its edit, on the weights that it has now; right under any engine, also
    where one has put shards in the place of the edited module's parameters."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        for module in parts(model):
            if WRAPPED in vars(module):
                stack.enter_context(_unwrapped(module))
            if SWAPPED in vars(module):
                stack.enter_context(_put_back(module, device))
        yield


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """Its modules, those that an edit has replaced among them."""
    for module in model.modules():
        yield module
        if SWAPPED in vars(module):
            yield from parts(vars(module)[SWAPPED].before)


@contextmanager
def _unwrapped(module: nn.Module) -> Iterator[None]:
    mark: Mark = vars(module)[WRAPPED]
    settings = {} if hasattr(module, "true_forward") else {name: vars(module).pop(name) for name in mark.settings}
    mark.bypassed = True
    try:
        yield
    finally:
        mark.bypassed = False
        vars(module).update(settings)


@contextmanager
def _put_back(after: nn.Module, device: Any) -> Iterator[None]:
    """The module that was replaced runs inside the other one's call, whose hooks gather its weights."""
    mark: Mark = vars(after)[SWAPPED]
    before, ran = mark.before, mark.ran

    def forward(*args: Any, **kwargs: Any) -> Any:
        before.train(after.training)
        with _lent(before, after, device):
            return before(*args, **kwargs)

    vars(after)["forward"] = forward
    try:
        yield
    finally:
        del vars(after)["forward"]
        mark.ran = ran


@contextmanager
def _lent(before: nn.Module, after: nn.Module, device: Any) -> Iterator[None]:
    """`before` with the parameters and buffers of the same names that `after` has at this moment."""
    theirs, kept = dict(after.named_modules()), []
    for name, module in before.named_modules():
        other = vars(theirs.get(name, nn.Identity()))
        for kind in ("_parameters", "_buffers"):
            mine = vars(module)[kind]
            kept.append((mine, dict(mine)))
            mine.update({leaf: other[kind].get(leaf, value) for leaf, value in mine.items()})
        module._buffers.update({leaf: x if x is None else x.to(device) for leaf, x in module._buffers.items()})
    try:
        yield
    finally:
        for mine, own in kept:
            mine.update(own)


@contextmanager
def resettled(model: nn.Module, owner: str, edits: Iterable[Edit]) -> Iterator[bool]:
    """What `owner` has edited runs under the settings of these edits; False, and as before, where they are not the same
    wraps."""
    settings = {edit.name: dict(edit.settings) if isinstance(edit, Wrap) else None for edit in edits}
    edited = {name: module for name, module in model.named_modules() if _owned(module, owner)}
    same = edited.keys() == settings.keys() and all(
        (given := settings[name]) is not None and WRAPPED in vars(module) and given.keys() == _settings(module).keys()
        for name, module in edited.items()
    )
    kept = {name: _settings(edited[name]) for name in edited if same}
    for name in kept:
        vars(edited[name]).update(settings[name] or {})
    try:
        yield same
    finally:
        for name, own in kept.items():
            vars(edited[name]).update(own)


def _owned(module: nn.Module, owner: str) -> bool:
    return any(kind in vars(module) and vars(module)[kind].owner == owner for kind in (SWAPPED, WRAPPED))


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in vars(module)[WRAPPED].settings}


def assert_ran(model: nn.Module) -> None:
    """Raise when an edit was bypassed: another library may overwrite a forward or a hook without a word."""
    for name, module in model.named_modules():
        for kind in (SWAPPED, WRAPPED):
            mark = module.__dict__.get(kind)
            if mark is not None and mark.must_run and not mark.ran:
                raise RuntimeError(
                    f"strategy {mark.owner}: {name or 'the model'} did not run as edited in the first step:"
                    " something replaced its forward (gradient checkpointing switched on elsewhere?)"
                )
