"""What a model does to its head's output before it calls it logits: scaling, softcap, or nothing.

There is no table of models. The model class's own forward runs on a shell: an object of that class with the
same configuration and plain attributes, whose head returns the given logits and whose other parts return
nothing of interest. A probe then says whether the map is the identity, or acts row by row, or is refused.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from distrib.errors import Refused
from strategies.core.edits import original_class, plain_attributes
from strategies.core.statistics import LogitMap


class _Part(nn.Module):
    """Stands for a backbone: it keeps its plain attributes, and whatever is asked of its output is None,
    except for the hidden states."""

    def __init__(self, real: nn.Module, hidden_1CD: Tensor) -> None:
        super().__init__()
        vars(self).update(plain_attributes(real), output=_Output(hidden_1CD))

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return cast(_Output, vars(self)["output"])

    def __getattr__(self, name: str) -> Any:
        # `self.model.decoder(...)` is a part as well.
        return self


class _Output:
    def __init__(self, hidden_1CD: Tensor) -> None:
        self.last_hidden_state = hidden_1CD

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _Before(nn.Module):
    """Stands for what is between the backbone and the head: gives what the backbone gave."""

    def __init__(self, hidden_1CD: Tensor) -> None:
        super().__init__()
        self.hidden_1CD = hidden_1CD

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden_1CD


class _Head(nn.Module):
    """Returns the given logits, whatever it is given: what comes before the head is not part of the map."""

    def __init__(self, logits_1CV: Tensor) -> None:
        super().__init__()
        self.logits_1CV = logits_1CV
        self.weight = logits_1CV[0, :0]

    def forward(self, hidden_1CD: Tensor) -> Tensor:
        return self.logits_1CV


def logit_map(model: nn.Module, head: nn.Module) -> LogitMap:
    """The map of `model`, whose output head is `head`; logits in, logits out, both [C, V]."""

    def run(logits_CV: Tensor) -> Tensor:
        shell = _shell(model, head, logits_CV[None])
        ids_1C = torch.zeros(1, logits_CV.shape[0], dtype=torch.long, device=logits_CV.device)
        mapped: Tensor = original_class(model).forward(shell, input_ids=ids_1C, return_dict=True).logits[0]
        return mapped

    return run


def _shell(module: nn.Module, head: nn.Module, logits_1CV: Tensor, root: bool = True) -> nn.Module:
    """`module` without weights: a stub in the place of the head, and of every part that has weights and no head."""
    if module is head:
        return _Head(logits_1CV)
    if next(module.parameters(), None) is None and next(module.buffers(), None) is None:
        return module
    own = original_class(module)
    shell: nn.Module = own.__new__(own)
    nn.Module.__init__(shell)
    vars(shell).update(plain_attributes(module), training=module.training)
    for name, part in module.named_children():
        if any(inner is head for inner in part.modules()) or next(part.parameters(), None) is None:
            stub = _shell(part, head, logits_1CV, root=False)
        else:
            stub = _Part(part, logits_1CV[:, :, :1]) if root else _Before(logits_1CV[:, :, :1])
        setattr(shell, name, stub)
    return shell


def is_identity(model: nn.Module, head: nn.Module, vocabulary: int) -> bool:
    """Probe the map with logits of many sizes; Refused when a row's result depends on other rows."""
    rows = [scale * torch.randn(vocabulary, generator=torch.Generator().manual_seed(0)) for scale in (1e-3, 1, 40)]
    given_CV = torch.stack([*rows, rows[1].flip(0)])
    order = torch.tensor([2, 3, 1, 0])
    run = logit_map(model, head)
    try:
        with torch.no_grad():
            mapped_CV, turned_CV, alone_1V = run(given_CV), run(given_CV[order]), run(given_CV[:1])
    except Exception as error:
        raise Refused(f"{type(model).__name__}: cannot tell what it does after its head ({error})") from error
    rowwise = mapped_CV.shape == given_CV.shape and torch.allclose(turned_CV, mapped_CV[order], rtol=1e-6, atol=0)
    if not rowwise or not torch.allclose(alone_1V, mapped_CV[:1], rtol=1e-6, atol=0):
        raise Refused(f"{type(model).__name__}: what it does after its head mixes positions, which is not supported")
    return torch.equal(mapped_CV, given_CV)
