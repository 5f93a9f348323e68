"""Which backend multiplies what, on which device: only those that have just shown that they are right."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from strategies.lowbit.backends.reference import Backend, How, Reference
from strategies.lowbit.formats import E2M1, E4M3, INT4, INT8, SPLIT, TENSOR, Scaled

REFERENCE = Reference()
PROBED = (
    *(Scaled(format) for format in (INT4, INT8, SPLIT, E2M1, E4M3)),
    Scaled(INT4, multiples=32),
    *(Scaled(format, TENSOR) for format in (INT4, SPLIT, E4M3)),
    *(Scaled(E2M1, 16, square=square, scale="e4m3") for square in (False, True)),
    *(Scaled(E2M1, 32, square=square, scale="e8m0") for square in (False, True)),
)
TOLERANCE = 4e-3
"""Of what is not exact, relative to the whole: sums that are rounded to bfloat16."""


def choose(a: Scaled, b: Scaled, device: torch.device) -> tuple[Backend, How]:
    """Who multiplies such matrices, and how: the first that serves them, the reference where none does."""
    for backend in serving(device):
        how = backend.how(a, b)
        if how is not None:
            return backend, how
    return REFERENCE, "emulated"


def serving(device: torch.device) -> list[Backend]:
    """The best first."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _serving(torch.device(device.type, index))


@cache
def _serving(device: torch.device) -> list[Backend]:
    return [backend for backend in fitting(device) if not refused(backend, device)]


def fitting(device: torch.device) -> list[Backend]:
    """By what the device says it has."""
    if device.type == "cpu":
        from strategies.lowbit.backends.cpu import CpuInt8

        return [CpuInt8()] if CpuInt8.fits() else []
    if device.type == "cuda":
        from strategies.lowbit.backends.blackwell import Blackwell
        from strategies.lowbit.backends.cuda import CudaFp8, CudaInt8

        made: list[Backend] = [kind() for kind in (Blackwell, CudaFp8, CudaInt8) if kind.fits(device)]
        return made
    return []


def refused(backend: Backend, device: torch.device) -> bool:
    # Whoever follows operators, or runs them without data, has nothing to do with this.
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        off = next(_faults(backend, device), None)
    if off:
        line = f"ebbtide: {backend.name} is wrong on {device}: {off}; products are emulated there"
        print(line, file=sys.stderr, flush=True)
    return off is not None


def _faults(backend: Backend, device: torch.device) -> Iterator[str]:
    for a, b in itertools.product(PROBED, repeat=2):
        if backend.how(a, b) is not None:
            try:
                yield from _faults_of(backend, a, b, device)
            except Exception as error:
                yield f"{_named(a, b)} raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _faults_of(backend: Backend, a: Scaled, b: Scaled, device: torch.device) -> Iterator[str]:
    """Ragged sizes, both signs, rows of different size; `b` as it is and turned."""
    x_MK, y_NK = _drawn(37, 83, device), _drawn(45, 83, device)
    exact = all(scaled.by_rows and scaled.format.integers_by is not None for scaled in (a, b))
    allowed = 0 if exact else TOLERANCE
    given, drawn, other = backend.quantize(x_MK, a), backend.quantize(x_MK, a, seed=1), backend.quantize(y_NK, b)
    nearest = REFERENCE.quantize(x_MK, a).dequantize()
    off = _error(given.dequantize(), nearest)
    if not off <= allowed:
        yield f"rounding to {_named(a)} is off by {off:.2g}"
    off = _error(drawn.dequantize(), x_MK)
    # Its squares are twice those of rounding to the nearest.
    if not off <= 2 * _error(nearest, x_MK):
        yield f"rounding stochastically to {_named(a)} is off by {off:.2g}"
    others = [other, backend.quantize(y_NK.T, b).turned()] if b.turns else [other]
    for left, right, dtype in itertools.product((given, drawn), others, (torch.float32, torch.bfloat16)):
        wanted = REFERENCE.product(left, right, dtype if exact else torch.float32)
        off = _error(backend.product(left, right, dtype), wanted)
        if not off <= allowed:
            yield f"{_named(a, b)} in {str(dtype).removeprefix('torch.')} is off by {off:.2g}"


def _drawn(rows: int, columns: int, device: torch.device) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), device="cpu")
    return (x * torch.logspace(-1, 1, rows, base=4, device="cpu")[:, None]).to(device)


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def _named(*scaled: Scaled) -> str:
    return " with ".join(f"{one.format.name} ({one.block})" for one in scaled)
