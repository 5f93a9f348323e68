"""YAML without its traps: what a person reads is what the program gets.

Aliases, anchors, merge keys, tags, several documents and keys given twice are refused with their line. Plain
scalars follow YAML 1.2's core schema: `1e-4` is a number; `on`, `yes`, `12:30`, `2001-01-01` are text. Size
and depth are bounded, since the parser recurses.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from distrib.errors import UserError

LONGEST_CHARACTERS = 2**16
DEEPEST = 20
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_RESOLVERS = [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,4000}|0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,3000}", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class _Surprise(Exception):
    def __init__(self, reason: str, mark: Any) -> None:
        super().__init__(f" line {mark.line + 1}: {reason}")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text = str(super().construct_scalar(node))
        if CONTROL.search(text):
            raise _Surprise("control characters", node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or key.tag != "tag:yaml.org,2002:str":
                raise _Surprise(f"a key must be text, not {name or 'a list or a mapping'}", key.start_mark)
            if name == "<<":
                raise _Surprise("merge keys (<<) are refused", key.start_mark)
            if name in seen:
                raise _Surprise(f"{name!r} is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would not read back as text; repeats shared values without aliases."""

    yaml_implicit_resolvers = {first: list(found) for first, found in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)


def _refuse_surprises(text: str) -> None:
    """Raises at the first event that a recipe may not hold; the parser that yields them does not recurse."""
    depth = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        reason = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            reason = "anchors and aliases are refused; write the value out"
        elif getattr(event, "tag", None):
            reason = f"tags are refused ({getattr(event, 'tag', '')})"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > DEEPEST:
            reason = f"nested deeper than {DEEPEST}"
        elif documents > 1:
            reason = "a second document (---); one file holds one"
        if reason:
            raise _Surprise(reason, event.start_mark)


def parse(text: str, where: str) -> Any:
    """The value that `text` holds, or one line that names the place. `where` is what the line begins with."""
    if len(text) > LONGEST_CHARACTERS:
        raise UserError(f"{where}: {len(text)} characters, at most {LONGEST_CHARACTERS} are read")
    try:
        _refuse_surprises(text)
        return yaml.load(text, Loader=_Loader)
    except _Surprise as surprise:
        raise UserError(f"{where}{surprise}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{where}: not text ({error.reason} at position {error.position})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: {' '.join(str(error.problem).split())}") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
