"""AdamW whose two moments are held in four bits (2309.01507), in plain tensors that checkpoints store and reshard.

Each row of a matrix is cut into blocks of 128. A block has one float32 scale, its largest magnitude, and per element
the nearest entry of a table of 16: for the first moment signed and finer towards zero, for the second from 1/16 to 1 in
even steps, without zero, since that moment divides. Vectors, and matrices with rows shorter than a block, stay as they
are. A shard has whole rows, so that a state is the same however it is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

BLOCK = 128
RUN = 2**22
"""Elements of a parameter that are updated at a time, as the moments of those are decoded."""
# Of the dynamic exponent (2110.02861): the middles of 1, 2 and 4 even parts of (0.1, 1], times 0.01, 0.1 and 1.
_MAGNITUDES = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
SIGNED = (*(-value for value in reversed(_MAGNITUDES)), 0.0, *_MAGNITUDES, 1.0)
POSITIVE = tuple(step / 16 for step in range(1, 17))


def encode(values_RC: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, two in a byte with the earlier one on top, and the scales. The last block of a row is filled up."""
    rows, columns = values_RC.shape
    blocks = F.pad(values_RC.float(), (0, -columns % BLOCK)).view(rows, -(-columns // BLOCK), BLOCK)
    scales = blocks.abs().amax(-1)
    shares = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    codes = torch.bucketize(shares, (table[1:] + table[:-1]) / 2, out_int32=True).byte().flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scales


def decode(codes: Tensor, scales: Tensor, table: Tensor) -> Tensor:
    """With the columns that fill up the last block."""
    pairs = F.embedding(codes.int(), torch.cartesian_prod(table, table))
    return (pairs.view(*scales.shape, BLOCK) * scales[..., None]).flatten(1)


class AdamW4bit(Optimizer):
    """Loss and updates are near AdamW's, not the same: docs/recipe.md has figures."""

    def __init__(self, parameters: Any, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state |= _new_state(parameter)
                    state["step"] += 1
                    _step(group, state["step"].item(), _local(parameter), _local(parameter.grad), state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Torch would make the codes floats, like their parameters."""
        super().load_state_dict({**state_dict, "state": {}})
        names = (name for group in state_dict["param_groups"] for name in group["params"])
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        for name, parameter in zip(names, parameters, strict=True):
            if name in state_dict["state"]:
                self.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in state_dict["state"][name].items()
                }


def _new_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    state = {"step": torch.tensor(0.0)}
    if not is_packed(parameter.shape):
        return state | {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
    blocks = -(-parameter.shape[-1] // BLOCK)
    for name in ("exp_avg", "exp_avg_sq"):
        state[name] = _zeros(parameter, blocks * BLOCK // 2, torch.uint8)
        state[f"{name}_scale"] = _zeros(parameter, blocks, torch.float32)
    return state


def is_packed(shape: torch.Size) -> bool:
    return len(shape) > 1 and shape[-1] >= BLOCK


def _zeros(parameter: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """As many rows as the parameter has, split like its own."""
    local = _local(parameter)
    zeros = torch.zeros(*local.shape[:-1], columns, dtype=dtype, device=local.device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((*parameter.shape[:-1], columns))
    stride = tuple(math.prod(shape[dimension + 1 :]) for dimension in range(len(shape)))
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step(group: dict[str, Any], count: float, weight: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
    if "exp_avg_scale" not in state:
        _update(group, count, weight, gradient, _local(state["exp_avg"]), _local(state["exp_avg_sq"]))
        return
    names = ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale")
    signed, positive = (torch.tensor(table, device=weight.device) for table in (SIGNED, POSITIVE))
    columns, dtype = weight.shape[-1], gradient.dtype
    for weight_RC, gradient_RC, *held in _runs(weight, gradient, *(_local(state[name]) for name in names)):
        mean = decode(held[0], held[1], signed)[:, :columns].to(dtype)
        square = decode(held[2], held[3], positive)[:, :columns].to(dtype)
        _update(group, count, weight_RC, gradient_RC, mean, square)
        for old, new in zip(held, (*encode(mean, signed), *encode(square, positive)), strict=True):
            old.copy_(new)


def _runs(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time of each, as views."""
    rows = math.prod(tensors[0].shape[:-1])
    views = [tensor.view(rows, tensor.shape[-1]) for tensor in tensors]
    return zip(*(torch.split(view, max(1, RUN // tensors[0].shape[-1])) for view in views), strict=True)


def _update(
    group: dict[str, Any], count: float, weight: Tensor, gradient: Tensor, mean: Tensor, square: Tensor
) -> None:
    """AdamW's, of weight and moments in place."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    divisor = square.sqrt().div_(math.sqrt(1 - beta2**count)).add_(group["eps"])
    weight.mul_(1 - rate * group["weight_decay"]).addcdiv_(mean, divisor, value=-rate / (1 - beta1**count))
