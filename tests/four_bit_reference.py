"""4-bit matrices by the definition of their format, in NumPy: slow, and nothing of the code that is tested but its
tables of float32 numbers, which a test holds to their definition."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from strategies.lowbit.frozen import CODES, scale_table

Array = NDArray[Any]


def nf4() -> Array:
    """Quantiles of a normal distribution, 8 below zero, 7 above it, and zero."""
    normal = NormalDist().inv_cdf
    above = [normal(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    below = [-normal(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    found = np.sort(np.array([*above, 0.0, *below]))
    return (found / np.abs(found).max()).astype(np.float32)


def fp4() -> Array:
    """A sign, two bits of exponent that counts down, one of mantissa; without exponent, 0 or 1/16. The largest is 1."""
    found = []
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = 2.0 ** (4 - exponent) * (1 + mantissa / 2) if exponent else mantissa / 16
        found.append((-size if sign else size) / 12)
    return np.array(found, np.float32)


TABLES = {kind: np.array(table, np.float32) for kind, table in CODES.items()}


def scale_codes() -> Array:
    """8 bits: a sign, zeros that count decades down, a one, and what is left cuts the decade evenly."""
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade
        for index in range(count):
            middle = 0.1 + 0.9 * (index + 0.5) / count
            found += [middle * 10.0 ** (decade - 6), -middle * 10.0 ** (decade - 6)]
    return np.sort(np.array(found)).astype(np.float32)


SCALES = scale_table(torch.device("cpu")).numpy()


def _nearest(values: Array, table: Array) -> Array:
    return np.abs(values.astype(np.float64)[:, None] - table.astype(np.float64)).argmin(1)


def _in_blocks(values: Array, table: Array, block: int) -> tuple[Array, Array]:
    codes, scales = [], []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = np.abs(part).max()
        scales.append(scale)
        codes.append(_nearest(part / (scale or 1), table))
    return np.concatenate(codes), np.array(scales, np.float32)


def quantized(matrix: Tensor, kind: str, double: bool) -> dict[str, Array]:
    """Codes of each number, scales of each block as they are decoded, and what they are decoded from."""
    values = matrix.detach().float().numpy().reshape(-1)
    codes, scales = _in_blocks(values, TABLES[kind], 64)
    found = {"codes": codes, "scales": scales}
    if double:
        mean = torch.from_numpy(scales).mean().numpy()
        indices, nested = _in_blocks(scales - mean, SCALES, 256)
        again = SCALES[indices] * np.repeat(nested, 256)[: len(indices)] + mean
        found |= {"scales": again, "mean": mean, "indices": indices, "nested": nested}
    return found


def decoded(matrix: Tensor, kind: str, double: bool) -> Tensor:
    """What is left of a matrix, in float32."""
    found = quantized(matrix, kind, double)
    scales = np.repeat(found["scales"], 64)[: matrix.numel()]
    return torch.from_numpy((TABLES[kind][found["codes"]] * scales).astype(np.float32)).view(matrix.shape)


def state_of(name: str, matrix: Tensor, kind: str, double: bool) -> dict[str, Tensor]:
    """The tensors that bitsandbytes has in a checkpoint in the place of `name`."""
    import json

    found = quantized(matrix, kind, double)
    padding = _nearest(np.zeros(len(found["codes"]) % 2), TABLES[kind])
    codes = np.append(found["codes"], padding).astype(np.uint8)
    about = {"quant_type": kind, "blocksize": 64, "dtype": "float32", "shape": list(matrix.shape)}
    state = {"": codes[::2] * 16 + codes[1::2], "quant_map": TABLES[kind], "absmax": found["scales"]}
    state[""] = state[""][:, None]
    if double:
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(found["mean"])}
        state |= {"absmax": found["indices"].astype(np.uint8), "nested_absmax": found["nested"]}
        state["nested_quant_map"] = SCALES
    state[f"quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return {f"{name}.{key}".rstrip("."): torch.from_numpy(np.array(value)) for key, value in state.items()}


def decode_base(model: nn.Module, kind: str, double: bool) -> None:
    """Every frozen linear layer of its blocks, by the names that they have in Llama, in place."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and ".layers." in name and not module.weight.requires_grad:
            module.weight.data = decoded(module.weight, kind, double).to(module.weight.dtype)
