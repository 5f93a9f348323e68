"""Whether a model keeps the documents of a packed row apart, found out by running it.

Transformers builds the mask between documents from `position_ids`, but not in every family, and layers with a
recurrent state read straight across. Either would train on silently wrong gradients, so the first packed
batch is preceded by a tiny forward: does a document's first neighbour change its log-probabilities?
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distrib.contracts import Batch, Context, Step
from distrib.errors import Refused

_LENGTH = 8


def is_packed(batch: Batch) -> bool:
    """Whether some row of it holds more than one document."""
    return bool((batch["position_ids"][:, 1:] == 0).any())


def refuse_leaks(step: Step, module: nn.Module, name: str, vocabulary: int, like: Batch) -> None:
    """Refused when the second of two packed documents sees the first; every rank calls it.

    What is masked has weight zero, so models that keep documents apart differ by nothing here; the bound
    leaves room for float32's rounding alone. Rows go one by one when the batches do: some attention kernels
    tell documents apart in batches of one row only.
    """
    rows = _probe(vocabulary, like["input_ids"].device)
    modes = [(part, part.training) for part in module.modules()]
    singly = like["input_ids"].shape[0] == 1
    # In both forms, as ranks may differ in this and wait for each other in every forward.
    batches = [*({k: v[i : i + 1] for k, v in rows.items()} for i in range(2)), rows]
    module.eval()
    try:
        *alone, together = step.logprobs(batches, Context(seed=0, step=0, weight=1.0))
    finally:
        for part, training in modes:
            part.training = training
    one, other = (torch.cat(alone) if singly else together)[:, _LENGTH + 1 :]
    if (one - other).abs().max() > 1e-6 * one.abs().max():
        raise Refused(f"packing=true: packed documents see each other in {name}; use packing=false for it")


def _probe(vocabulary: int, device: torch.device) -> dict[str, Tensor]:
    """Two rows of two documents each: different first ones, the same second one."""
    first, other, second = (torch.arange(1, 3 * _LENGTH + 1) % vocabulary).view(3, _LENGTH)
    ids = torch.stack([torch.cat([first, second]), torch.cat([other, second])])
    positions = torch.arange(_LENGTH).repeat(2, 2)
    made = {"input_ids": ids, "labels": ids, "position_ids": positions}
    return {name: value.to(device) for name, value in made.items()}
