"""Every causal language model type of the installed Transformers against plain autograd, strategy by strategy.

`PYTHONPATH=tests python -m sweep` writes docs/families.md. A type is exact, or refused for a reason; anything else is
a defect.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import all_families
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import strategies
from distrib.errors import Refused

EXACT, OWN_CASTS = 1e-10, 1e-6
LENGTH, SECOND, CHUNK = 19, 11, 4
NAMES = ("streambp", "seco")
KINDS = ("prompt", "left", "packed")
PIPELINES = "## In a pipeline"
"""The section that pipeline_families.py writes."""
PAGE = Path(__file__).parent.parent / "docs" / "families.md"


@dataclass(frozen=True)
class Truth:
    """Gradients by parameter, and whether the family computes parts of them in float32."""

    gradients: dict[str, Tensor]
    casts: bool
    alone: bool = False
    """Whether each row was taken without its padding, since the model's own attention makes no number of it."""

    @property
    def finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in self.gradients.values())

    def difference(self, found: dict[str, Tensor]) -> float:
        """Over what is allowed: of each parameter's own gradient, or of the largest one where float32 is in it (and
        at least of a thousandth of the largest: some true gradients are zero)."""
        largest = max(x.norm().item() for x in self.gradients.values())
        worst = 0.0
        for name, right in self.gradients.items():
            scale = largest if self.casts else max(right.norm().item(), 1e-3 * largest)
            error = (found[name] - right).norm().item() / scale
            worst = max(worst, error if error == error else float("inf"))
        return worst / (OWN_CASTS if self.casts else EXACT)


@dataclass(frozen=True)
class Verdict:
    """`why` it was refused, or the largest error relative to what is allowed, and how the layers were run."""

    error: float = 0.0
    why: str = ""
    layers: int = 0
    whole: tuple[str, ...] = ()

    @property
    def word(self) -> str:
        if self.why:
            return "no number" if self.error else "refused"
        return "exact" if self.error <= 1 else "WRONG"


def make_batch(kind: str) -> dict[str, Tensor]:
    """Two rows with a prompt that is not learned: as they are, padded on the left, or of two documents each."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, all_families.PADDING, (2, LENGTH), generator=generator)
    batch = {"input_ids": ids, "labels": ids.clone()}
    batch["labels"][0, :7] = -100
    batch["labels"][1, :3] = -100
    if kind == "left":
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, :5] = 0
        batch["attention_mask"][1, :2] = 0
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(SECOND), torch.arange(LENGTH - SECOND)]).repeat(2, 1)
        batch["labels"][:, SECOND] = -100
    return batch


def true_gradients(model_type: str, kind: str) -> Truth:
    """By autograd through the model's own logits; packed documents each alone."""
    batch = make_batch(kind)
    ids, labels = batch["input_ids"], batch["labels"]
    if kind == "packed":
        pieces = [slice(0, SECOND), slice(SECOND, LENGTH)]
        return _gradients(model_type, [(ids[:, piece], labels[:, piece], None) for piece in pieces])
    padding = batch.get("attention_mask")
    truth = _gradients(model_type, [(ids, labels, padding)])
    if padding is None or truth.finite:
        return truth
    starts = [LENGTH - int(row.sum()) for row in padding]
    rows = [(ids[i : i + 1, at:], labels[i : i + 1, at:], None) for i, at in enumerate(starts)]
    return _gradients(model_type, rows, alone=True)


def _gradients(model_type: str, pieces: list[tuple[Tensor, Tensor, Tensor | None]], alone: bool = False) -> Truth:
    model = all_families.build(model_type)
    learned = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in pieces)
    kept: set[torch.dtype] = set()
    for ids, labels, padding in pieces:
        inputs = {"input_ids": ids, "use_cache": False} | ({} if padding is None else {"attention_mask": padding})
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.dtype), lambda x: x):
            model(**inputs)
        logits = model(**inputs).logits[:, :-1].double()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / learned
        loss.backward()
    return Truth(gradients(model), torch.float32 in kept, alone)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def measure(model_type: str, strategy: strategies.Strategy, kind: str, truth: Truth) -> Verdict:
    model = all_families.build(model_type)
    try:
        step = strategies.prepare(model, [strategy])
        for _ in range(2 if kind == "prompt" else 1):
            # What a step leaves behind must not reach the next one.
            model.zero_grad()
            step(make_batch(kind))
    except Refused as error:
        return Verdict(why=" ".join(str(error).split()))
    found = gradients(model)
    if truth.alone and not all(x.isfinite().all() for x in found.values()):
        return Verdict(float("inf"), "its own attention in float64 is not a number where a position sees nothing")
    layouts = [vars(x)["_ebbtide_block"].layout for x in model.modules() if "_ebbtide_block" in vars(x)]
    return Verdict(truth.difference(found), "", len(layouts), tuple(x.whole for x in layouts if x.whole))


def verdicts(model_type: str) -> dict[tuple[str, str], Verdict]:
    """By strategy and kind of batch."""
    found: dict[tuple[str, str], Verdict] = {}
    for kind in KINDS:
        truth = true_gradients(model_type, kind)
        for name in NAMES:
            first = found.get((name, "prompt"))
            strategy = strategies.get(name)(chunk=CHUNK)
            found[name, kind] = first if first and first.why else measure(model_type, strategy, kind, truth)
    return found


HEADER = ("type", "streambp", "layers in chunks", "padded left", "packed", "seco", "padded left", "packed", "why not")
WORDS = (1, 3, 4, 5, 6, 7)
"""The columns with a word, in the order of `words`."""


def words(found: dict[tuple[str, str], Verdict]) -> list[str]:
    return [found[name, kind].word for name in NAMES for kind in KINDS]


def row(model_type: str) -> list[str]:
    try:
        all_families.build(model_type)
    except Refused as error:
        return [model_type, *["refused", "", *["refused"] * 5], _short(error)]
    found = verdicts(model_type)
    said = words(found)
    streambp = found["streambp", "prompt"]
    chunks = "" if streambp.why else f"{streambp.layers - len(streambp.whole)} of {streambp.layers}"
    reasons = [*streambp.whole, *(x.why for x in found.values())]
    return [model_type, said[0], chunks, *said[1:], "; ".join(dict.fromkeys(_short(x) for x in reasons if x))]


def _short(reason: object) -> str:
    return " ".join(str(reason).split()).replace("|", "/")[:150]


def committed() -> dict[str, list[str]]:
    """The words of the page, by type."""
    lines = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: [cells[i] for i in WORDS] for cells in lines[2:]}


def page(rows: list[list[str]]) -> str:
    exact = {name: sum(cells[column] == "exact" for cells in rows) for name, column in (("streambp", 1), ("seco", 5))}
    streamed = sum(cells[2].partition(" of ")[0] == cells[2].partition(" of ")[2] != "" for cells in rows)
    reasons = Counter(cells[-1] for cells in rows if cells[1] == "refused")
    lines = [" | ".join(["", *cells, ""]).strip() for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    return INTRODUCTION.format(
        types=len(rows), transformers=transformers.__version__, torch=torch.__version__, streamed=streamed,
        length=LENGTH, chunk=CHUNK, text=sum(count for why, count in reasons.items() if "only decoder-only" in why),
        **exact,
    ) + "\n".join(lines) + "\n"  # fmt: skip


INTRODUCTION = """# Families

Every causal language model type of Transformers {transformers}, under torch {torch}, each as a tiny random model in
float64: its gradients under `streambp` and `seco` (chunks of {chunk} positions) against plain autograd through the
model's own logits, on two rows of {length} tokens with prompts that are not learned, the same padded on the left, and
two documents packed into each row. *exact* is a relative error of at most 1e-10, or 1e-6 of the largest gradient where
the family itself computes in float32. What is not exact is refused, with the reason, before the first step. *no
number* is what plain autograd in float64 gives as well: in a few families a masked score overflows there.

Of {types} types `streambp` is exact for {streambp} (for {streamed} of them every layer runs in chunks) and `seco` for
{seco}; {text} are no text decoders and train with no strategy. Under `streambp` layers that cannot run in chunks are
recomputed whole; those that hand keys and values to later layers (the last two before the shared ones in Gemma 3n and
4, which is half of the tiny model here) keep their activations.

No list of families stands behind this: at the first batch a model is tried on a few tokens. So an unknown one is
either exact or refused as well. The command that made this page, and must be run after a change of version:

    PYTHONPATH=tests python -m sweep

"""


def main() -> None:
    logging.getLogger("ebbtide").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for model_type in all_families.TYPES:
        rows.append(row(model_type))
        print(" | ".join(rows[-1]), flush=True)
    _, title, pipelines = PAGE.read_text().partition(PIPELINES)
    PAGE.write_text(f"{page(rows)}\n{title}{pipelines}")


if __name__ == "__main__":
    main()
