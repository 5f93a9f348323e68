"""What a recipe accepts, in words: for error lines, for editors (JSON schema) and for the page of keys.

All three are read off the one schema, so none of them can drift. `python -m launch.recipe_schema FILE` renews
the tables between the markers of a page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distrib.errors import UserError, choose
from distrib.redaction import clean
from launch import recipe as sections

Node = dict[str, Any]
LONGEST_SHOWN = 60
START, END = "<!-- keys: start -->", "<!-- keys: end -->"


def schema() -> Node:
    """The recipe's JSON schema, for editors."""
    root = sections.Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}


def describe(node: Node, root: Node) -> str:
    """What a value of this node must be, in a few words."""
    node = _resolved(node, root)
    if options := node.get("anyOf") or node.get("oneOf"):
        words = [describe(option, root) for option in options]
        return ", or ".join(dict.fromkeys(words))
    if "const" in node:
        return str(node["const"])
    if "enum" in node:
        return ", ".join(str(value) for value in node["enum"])
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])}: {describe(node['prefixItems'][0], root)}"
    kind = node.get("type")
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _bounds(node)
    if kind == "array":
        return f"a list of {describe(node['items'], root)}"
    if kind == "object":
        return f"a mapping of {', '.join(node['properties'])}" if "properties" in node else "a mapping"
    return {"boolean": "true or false", "string": "text", "null": "null"}.get(str(kind), "anything")


def _bounds(node: Node) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "maximum": "<=", "exclusiveMaximum": "<"}
    found = [f"{sign} {node[key]}" for key, sign in signs.items() if key in node]
    return f" {' and '.join(found)}" if found else ""


def _resolved(node: Node, root: Node) -> Node:
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return node


def _branches(node: Node, root: Node) -> list[Node]:
    node = _resolved(node, root)
    options = node.get("anyOf") or node.get("oneOf")
    return [leaf for option in options for leaf in _branches(option, root)] if options else [node]


def locate(location: Iterable[str | int], root: Node) -> tuple[str, list[Node]]:
    """The dotted key and the schema nodes of a pydantic location (which names union branches too)."""
    names: list[str] = []
    nodes = [root]
    for part in location:
        leaves = [leaf for node in nodes for leaf in _branches(node, root)]
        if isinstance(part, int):
            names.append(str(part))
            nodes = [found for leaf in leaves for found in (leaf.get("items"), *leaf.get("prefixItems", [])) if found]
        elif inside := [leaf["properties"][part] for leaf in leaves if part in leaf.get("properties", {})]:
            names.append(part)
            nodes = inside
        elif tagged := [leaf for leaf in leaves if _tag(leaf) == part]:
            nodes = tagged
    return ".".join(names), nodes


def _tag(leaf: Node) -> object:
    return leaf.get("properties", {}).get("name", {}).get("const")


def shown(value: object) -> str:
    """The value as a user wrote it, short enough for a line."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    value = clean(value)
    plain = {True: "true", False: "false", None: "null"}
    try:
        text = plain[value] if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # an integer too long to be written in decimal
        text = "a very long number"
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def explain(error: Mapping[str, Any]) -> UserError:
    """One of pydantic's errors as one line: what, the value, what is accepted."""
    root = schema()
    kind, location, value = error["type"], error["loc"], error["input"]
    if kind == "missing" and isinstance(location[-1], int):
        location = location[:-1]
    elif kind in ("extra_forbidden", "missing"):
        above, nodes = locate(location[:-1], root)
        known = sorted(
            {name for node in nodes for leaf in _branches(node, root) for name in leaf.get("properties", {})}
        )
        return _unknown(above, str(location[-1]), known) if kind == "extra_forbidden" else _missing(above, location)
    key, nodes = locate(location, root)
    if kind.startswith("union_tag"):
        names = [tag for node in nodes for leaf in _branches(node, root) if (tag := _tag(leaf))]
        given = value.get("name") if isinstance(value, dict) else value
        return choose(f"{key}.name", given, names)
    if kind == "literal_error" and isinstance(value, str):
        return choose(key, value, [name for node in nodes for name in _resolved(node, root)["enum"]])
    accepted = ", or ".join(dict.fromkeys(describe(node, root) for node in nodes)) or error["msg"].lower()
    if kind == "string_too_short":
        accepted = "text that is not empty"
    elif kind == "finite_number":
        accepted = f"{accepted}, and finite"
    return UserError(f"{key}={shown(value)}: must be {accepted}")


def _unknown(above: str, name: str, known: list[str]) -> UserError:
    key = f"{above}.{name}" if above else name
    near = get_close_matches(name, known, n=1, cutoff=0.5) or [option for option in known if name in option][:1]
    hint = f", did you mean {near[0]}?" if near else ""
    choices = (
        f" (choose {', '.join(known)})" if above else "" if near else " (`ebbtide recipe --schema` lists the keys)"
    )
    return UserError(f"unknown key {shown(key)}{hint}{choices}")


def _missing(above: str, location: tuple[str | int, ...]) -> UserError:
    return UserError(f"{above}: {location[-1]!r} is missing; give it as {above}: {{{location[-1]}: ...}}")


def tables() -> str:
    """Every key with what it accepts, its default and its meaning, as Markdown."""
    root = sections.Recipe.model_json_schema()
    parts = [_table(root, root, sections.Recipe)]
    for title, name in (
        ("`dataset`, `eval_dataset`: a name, a section, or a list of them", "Source"),
        ("`objective`: sft", "SFT"),
        ("`objective`: dpo", "DPO"),
        ("`objective`: grpo", "GRPO"),
        ("`strategy`: a name, a section, or a list of them", "Strategy"),
        ("`engine`", "Engine"),
        ("`optimizer`", "Optimizer"),
        ("`energy`", "Energy"),
        ("`profile`", "Profile"),
    ):
        parts.append(f"### {title}\n\n{_table(root['$defs'][name], root, getattr(sections, name))}")
    return "\n".join(parts)


def _table(node: Node, root: Node, section: type[BaseModel]) -> str:
    lines = ["| key | accepts | default | meaning |", "|---|---|---|---|"]
    for key, value in node["properties"].items():
        field = section.model_fields[key]
        default = field.get_default()
        written = "required" if field.is_required() else f"`{_written(default)}`"
        accepts = (
            "a section" if isinstance(default, BaseModel | list) or key == "eval_dataset" else describe(value, root)
        )
        lines.append(f"| `{key}` | {accepts} | {written} | {value.get('description', 'Its name.')} |")
    return "\n".join(lines) + "\n"


def _written(default: Any) -> str:
    if isinstance(default, list):
        return ", ".join(_written(item) for item in default)
    named = getattr(default, "name", {} if isinstance(default, BaseModel) else default)
    if isinstance(named, tuple):
        return str(list(named))
    return named if isinstance(named, str) else shown(named)


def rewrite(page: str) -> str:
    """The page with the tables between its markers renewed."""
    before, rest = page.split(START)
    return f"{before}{START}\n{tables()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(rewrite(target.read_text()))
