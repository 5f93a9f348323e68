"""What the dispatcher says of an operator, and the tensors among its arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@cache
def is_view(func: Any) -> bool:
    """Its results lie in an argument's storage, and nothing is written."""
    if func is torch.ops._c10d_functional.wait_tensor.default:
        return True
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


@cache
def written(func: Any) -> tuple[tuple[int, str], ...]:
    """Place and name of the arguments that it writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((index, a.name) for index, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def is_made_of_others(kind: type) -> bool:
    """Whether such tensors hold other tensors, as DTensor's do."""
    return hasattr(kind, "__tensor_flatten__")


@cache
def is_collective(func: Any) -> bool:
    return str(func).startswith("_c10d_functional.")


def wait(func: Any, outcome: Any) -> None:
    """A collective's results are there when they have been waited for, which is an operator of its own."""
    if is_collective(func):
        each(outcome, Tensor, torch.ops._c10d_functional.wait_tensor)


@cache
def is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return tensors([args[index] if index < len(args) else kwargs.get(name) for index, name in written(func)])


def tensors(values: Any) -> list[Tensor]:
    """Of arguments or results, which nest no deeper than lists."""
    found: list[Tensor] = []
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += tensors(value)
    return found


def each(values: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same arguments with those of a kind changed."""
    if isinstance(values, kind):
        return change(values)
    if isinstance(values, tuple | list):
        return type(values)(each(value, kind, change) for value in values)
    if isinstance(values, dict):
        return {name: each(value, kind, change) for name, value in values.items()}
    return values


@cache
def name_of(func: Any) -> str:
    return str(func)


def alias(tensor: Tensor) -> Tensor:
    """Without history, and changing with the tensor."""
    # Below autograd a view would not notice later writes.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def flat(tensor: Tensor) -> Tensor:
    """All of its storage."""
    size = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    return tensor.as_strided((size,), (1,), 0)
