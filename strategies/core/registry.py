"""Strategies by name: the public files beside this package, and entry points of other distributions."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distrib.errors import Refused, UserError, choose
from distrib.topology import Topology
from strategies.core.contract import Claim, Strategy, overrides

GROUP = "ebbtide.strategies"
_BEYOND_TEXT = ("vision_config", "audio_config", "patcher_config", "is_encoder_decoder")


def _files() -> list[str]:
    import strategies

    found = pkgutil.iter_modules(strategies.__path__)
    return [module.name for module in found if not module.ispkg and not module.name.startswith("_")]


def _entries() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def names() -> list[str]:
    """Every strategy that can be asked for, `plain` first. Nothing is imported for it."""
    return sorted({*_files(), *_entries()}, key=lambda name: (name != "plain", name))


def get(name: str) -> type[Strategy]:
    """The class of a strategy by its recipe name."""
    entries = _entries()
    if name in _files():
        if name in entries:
            raise UserError(f"strategy={name!r} is built in and also comes from {entries[name].value}: rename that one")
        module = importlib.import_module(f"strategies.{name}")
        own = [x for x in vars(module).values() if _is_strategy(x) and x.__module__ == module.__name__]
        if len(own) != 1:
            raise UserError(f"strategies/{name}.py defines {len(own)} strategies: a file holds exactly one")
        found: type[Strategy] = own[0]
        return found
    if name not in entries:
        raise choose("strategy.name", name, names())
    try:
        loaded = entries[name].load()
    except Exception as error:
        raise UserError(f"strategy={name!r}: its entry point {entries[name].value} does not load ({error})") from error
    if not _is_strategy(loaded):
        raise UserError(f"strategy={name!r}: its entry point {entries[name].value} is not a Strategy class")
    return loaded  # type: ignore[no-any-return]


def _is_strategy(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy


def name_of(strategy: Strategy) -> str:
    """The name for messages: the file's, or the class's for a strategy from elsewhere."""
    package, _, file = type(strategy).__module__.rpartition(".")
    return file if package == "strategies" else type(strategy).__name__


def build(sections: Iterable[Mapping[str, Any]]) -> list[Strategy]:
    """The strategies that a recipe's sections ask for: `name` and fields, each field checked by its type."""
    built: list[Strategy] = []
    for section in sections:
        fields = dict(section)
        name = fields.pop("name")
        kind = get(name)
        if any(type(other) is kind for other in built):
            raise UserError(f"strategy={name!r} is listed twice: list it once")
        built.append(_build(name, kind, fields))
    return built


def defaults_of(kind: type[Strategy]) -> dict[str, Any]:
    """Of its fields; `dataclasses.MISSING` for those that must be given."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
    }


def _build(name: str, kind: type[Strategy], given: dict[str, Any]) -> Strategy:
    types = {key: hint for key, hint in get_type_hints(kind).items() if get_origin(hint) is not ClassVar}
    defaults = defaults_of(kind)
    for key, value in given.items():
        if key not in types:
            if not types:
                raise UserError(f"strategy.{key}={value!r}: {name} has no fields")
            raise choose(f"{name}'s field", key, types)
        given[key] = _typed(f"strategy.{key}", value, types[key], defaults[key])
    missing = [key for key, default in defaults.items() if default is dataclasses.MISSING and key not in given]
    if missing:
        raise UserError(f"strategy={name!r} needs strategy.{missing[0]}")
    try:
        return kind(**given)
    except ValueError as error:
        raise UserError(f"strategy={name!r}: {error}") from None


def _typed(key: str, value: Any, hint: Any, default: Any) -> Any:
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        hint_line = "" if default is dataclasses.MISSING else f", for example {default!r}"
        raise UserError(f"{key}={value!r}: must be {kind}{hint_line} ({error.errors()[0]['msg']})") from None


def staged(strategies: Sequence[Strategy], topology: Topology) -> Topology:
    """The same ranks with as many stages as the strategies want."""
    return dataclasses.replace(topology, stages=max(strategy.pipeline(topology.world) for strategy in strategies))


def check(strategies: Sequence[Strategy], config: Any, topology: Topology, compile: bool = False) -> None:
    """Everything that can be refused without weights, by the strategies together and each alone."""
    if not strategies:
        raise UserError(f"strategy=[]: choose at least one of {', '.join(names())}")
    beyond_text = [name for name in _BEYOND_TEXT if getattr(config, name, None)]
    if beyond_text:
        raise Refused(f"model type {config.model_type!r} has {beyond_text[0]}: only decoder-only text models train")
    if config.get_text_config(decoder=True) is not config:
        raise Refused(f"model type {config.model_type!r} wraps a text model: only decoder-only text models train")
    executors = [name_of(strategy) for strategy in strategies if overrides(strategy, "step")]
    if len(executors) > 1:
        raise Refused(f"strategies {' and '.join(executors)} each run the whole step: use one of them")
    for one, other in itertools.combinations(strategies, 2):
        for claim in (claim for claim in Claim if claim in one.claims & other.claims):
            raise Refused(f"strategies {name_of(one)} and {name_of(other)} both {claim.value}: use one of them")
    for strategy in strategies:
        if compile and not strategy.compiles:
            raise Refused(f"compile=true with strategy {name_of(strategy)}: set compile=false")
        for key, ranks in (("tensor_parallel", topology.tensor), ("context_parallel", topology.context)):
            if ranks > 1 and not getattr(strategy, key):
                able = ", ".join(name for name in names() if getattr(get(name), key))
                raise Refused(
                    f"engine.{key}={ranks} with strategy {name_of(strategy)}: choose {able}, or set engine.{key}=1"
                )
        strategy.check(config, topology)
    if topology.context > 1:
        from strategies.streaming import unshared

        unshared.check(config, topology)
