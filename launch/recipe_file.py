"""From a recipe file and the command line's overrides to a Recipe, and back to a file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from distrib.errors import UserError
from distrib.redaction import clean, learn
from launch.recipe import BUILT_IN_SETS, ENGINE_KEYS, Recipe, Source
from launch.recipe_schema import explain, shown
from launch.strict_yaml import CONTROL, LONGEST_CHARACTERS, dump, parse

LISTS = ("dataset", "eval_dataset", "strategy")
SECTIONS = ("objective", "engine", "optimizer")
SWITCHED_BY_NAME = ("objective", "strategy", "engine")


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, changed by `key=value`, `--key=value`, or `--key` followed by its value.

    Dotted keys reach into sections and lists (`engine.stage=3`, `dataset.0.weight=2`). A data set's relative
    path is looked for in the working directory, then beside the recipe.
    """
    tree = parse(_read(path), path)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: {'is empty' if tree is None else 'is not a mapping'}; a recipe is `key: value` lines")
    return recipe_of(tree, path, overrides)


def recipe_of(tree: dict[str, Any], path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file's tree, which the overrides change."""
    for keys, text in sorted(pairs(overrides), key=_width):
        _set(tree, keys, text)
    learn(tree)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error.errors()[0])}") from None
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None
    return _beside(recipe, Path(path).parent)


def dump_recipe(recipe: Recipe) -> str:
    """Every key of the recipe as YAML that loads back to the same one, but for secrets."""
    foreign = {key for key, owner in ENGINE_KEYS.items() if owner != recipe.engine.name}
    return dump(clean(recipe.model_dump(mode="json", exclude={"engine": foreign})))


def global_batch(recipe: Recipe, world: int) -> int:
    """Rows of one step over `world` data-parallel ranks."""
    per_micro_batch = recipe.per_device_train_batch_size * world
    rows = recipe.global_batch_size
    if rows is None:
        return per_micro_batch * recipe.gradient_accumulation_steps
    steps = recipe.gradient_accumulation_steps
    if steps > 1 and rows != per_micro_batch * steps:
        raise UserError(
            f"global_batch_size={rows} with gradient_accumulation_steps={steps} and per_device_train_batch_size="
            f"{recipe.per_device_train_batch_size} on {world} ranks, which make {per_micro_batch * steps}: give one"
        )
    if rows % per_micro_batch:
        below = rows // per_micro_batch * per_micro_batch
        nearest = [str(choice) for choice in (below, below + per_micro_batch) if choice]
        raise UserError(
            f"global_batch_size={rows} with per_device_train_batch_size="
            f"{recipe.per_device_train_batch_size} on {world} ranks: "
            f"must be a multiple of {per_micro_batch}; choose {' or '.join(nearest)}"
        )
    return rows


def pairs(overrides: Sequence[str]) -> list[tuple[list[str], str]]:
    """(keys, text) of every override, in the order given."""
    found: list[tuple[list[str], str]] = []
    words = iter(overrides)
    for word in words:
        key, equals, text = word.partition("=")
        if key.startswith("--"):
            key = key[2:].replace("-", "_")
            text = text if equals else next(words, "")
        elif not equals:
            raise UserError(f"{word!r}: an override is key=value or --key value")
        keys = key.split(".")
        if not all(re.fullmatch(r"\w[\w-]*", part) for part in keys):
            raise UserError(f"{word!r}: {key!r} is not a key; dots separate the keys of sections")
        if not text:
            raise UserError(f"{key} needs a value: {key}=VALUE, or {key}=null for none")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{key}: the value is not UTF-8 text") from None
        if CONTROL.search(text):
            raise UserError(f"{key}: the value has control characters")
        found.append((keys, text))
    return found


def _width(override: tuple[list[str], str]) -> int:
    """Whole sections are set first, then names (which drop fields), then fields; else as given."""
    keys, _ = override
    return 0 if len(keys) == 1 else 1 if keys[-1] == "name" else 2


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(4 * LONGEST_CHARACTERS + 1).decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the recipe file in it") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not a text file; a recipe is YAML in UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _set(tree: dict[str, Any], keys: list[str], text: str) -> None:
    here: Any = tree
    walked: list[str] = []
    for key in keys[:-1]:
        here, walked = _enter(here, walked, key)
    last = keys[-1]
    if isinstance(here, list):
        here, walked = _entry(here, walked, last)
        if walked[-1] == last:
            raise UserError(f"{'.'.join(keys)}: name the key to set, as {'.'.join(keys)}.name")
    if not isinstance(here, dict):
        raise _no_keys(keys, walked, here)
    value = _typed([*walked, last], text)
    if last == "name" and keys[0] in SWITCHED_BY_NAME and here.get("name") != value:
        here.clear()
    here[last] = value


def _no_keys(keys: list[str], walked: list[str], here: Any) -> UserError:
    return UserError(f"{'.'.join(keys)}: {'.'.join(walked)}={shown(here)} has no keys inside")


def _enter(here: Any, walked: list[str], key: str) -> tuple[Any, list[str]]:
    """The section or entry that `key` names, spelled out in the tree where it was short or absent."""
    if isinstance(here, list):
        entry, walked = _entry(here, walked, key)
        return (entry, walked) if walked[-1] == key else _enter(entry, walked, key)
    if not isinstance(here, dict):
        raise _no_keys([*walked, key], walked, here)
    if here.get(key) is None:
        here[key] = {} if walked or key not in LISTS + SECTIONS else _default(key)
    if not walked and key in LISTS and not isinstance(here[key], list):
        here[key] = [here[key]]
    if not walked and key in SECTIONS and isinstance(here[key], str):
        here[key] = {"name": here[key]}
    return here[key], [*walked, key]


def _entry(here: list[Any], walked: list[str], key: str) -> tuple[Any, list[str]]:
    """The list's entry at `key`; a list of one needs no index."""
    name = walked[-1]
    if not key.isdecimal() and len(here) != 1:
        raise UserError(f"{name}.{key}: {name} has {len(here)} entries; choose one by its index, as {name}.0.{key}")
    index = int(key) if key.isdecimal() and len(key) < 10 else 0
    if index >= len(here):
        raise UserError(f"{name}.{key}: {name} has {len(here)} entries, counted from 0")
    if isinstance(here[index], str):
        here[index] = {"name": here[index]}
    return here[index], [*walked, key if key.isdecimal() else "0"]


def _default(key: str) -> Any:
    """A section as it stands when the recipe does not give it: by name, for the override to build on."""
    value = Recipe.model_fields[key].get_default()
    if isinstance(value, list):
        return [_default_entry(item) for item in value]
    return _default_entry(value) if isinstance(value, BaseModel) else {}


def _default_entry(section: BaseModel) -> dict[str, Any]:
    return section.model_dump(include={"name"})


def _typed(keys: list[str], text: str) -> Any:
    """The override's value: as YAML where the schema takes that, else as text (a name may look like 007)."""
    try:
        value = parse(text, ".".join(keys))
    except UserError:
        return text
    if isinstance(value, str) and "\n" in text and text[0] not in "\"'|>":
        value = text  # YAML would fold its lines into one
    for field in _fields(keys):
        adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
        for candidate in (value,) if isinstance(value, str | list | dict) else (value, text):
            try:
                adapter.validate_python(candidate)
            except (ValidationError, UserError):
                continue
            return candidate
    return value


def _fields(keys: list[str]) -> list[FieldInfo]:
    """The schema's fields that a dotted key may mean: several where a section is one of several kinds."""
    models: list[type[BaseModel]] = [Recipe]
    fields: list[FieldInfo] = []
    for key in keys:
        if not key.isdecimal():
            fields = [model.model_fields[key] for model in models if key in model.model_fields]
            models = [model for field in fields for model in _models(field.annotation)]
    return fields


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _beside(recipe: Recipe, folder: Path) -> Recipe:
    def found(source: Source) -> Source:
        beside = str(folder / source.name)
        if source.name in BUILT_IN_SETS or os.path.exists(source.name) or not os.path.exists(beside):
            return source
        return source.model_copy(update={"name": beside})

    changed: dict[str, Any] = {"dataset": [found(source) for source in recipe.dataset]}
    if recipe.eval_dataset:
        changed["eval_dataset"] = [found(source) for source in recipe.eval_dataset]
    return recipe.model_copy(update=changed)
