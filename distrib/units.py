"""The units that a model is filled, sharded and compiled by: its blocks, and every module outside them with weights."""

from __future__ import annotations

from collections import Counter

from torch import nn


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated layers, by the class names that the model declares unsplittable, else its longest module list.

    Class names are looked up along the inheritance, since an edit may have put a subclass in place.
    """
    declared: set[str] = set()
    for module in model.modules():
        declared.update(getattr(module, "_no_split_modules", None) or ())
    found = [(name, module) for name, module in model.named_modules() if declared & _class_names(module)]
    if not found:
        lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        if lists:
            name, longest = max(lists, key=lambda item: len(item[1]))
            found = [(f"{name}.{index}", block) for index, block in longest.named_children()]
    return [(name, module) for name, module in found if not _inside(name, [other for other, _ in found])]


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Blocks, then what is left outside them; in the order of the model, so that every rank walks the same way."""
    inside = [name for name, _ in blocks(model)]
    found = []
    for name, module in model.named_modules():
        if name in inside or (not _inside(name, inside) and next(module.parameters(recurse=False), None) is not None):
            found.append((name, module))
    return found


def ends(model: nn.Module) -> list[nn.Module | list[nn.Module]]:
    """Embedding and head, as one group when they share their weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    found = [end for end in (embedding, head) if end is not None and next(end.parameters(), None) is not None]
    if len(found) == 2 and head.weight is embedding.weight:
        return [found] if alone(model, *found) else []
    return [end for end in found if alone(model, end)]


def alone(model: nn.Module, *parts: nn.Module) -> bool:
    """Whether all places of their parameters are in these parts; BERT's head has its bias at two, in and out."""
    places = _places(model)
    return all(places[one] == count for one, count in _places(*parts).items())


def _places(*modules: nn.Module) -> Counter[nn.Parameter]:
    every = (part for module in modules for part in module.modules())
    return Counter(one for part in every for one in part._parameters.values() if one is not None)


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _inside(name: str, others: list[str]) -> bool:
    return any(name.startswith(other + ".") for other in others)
