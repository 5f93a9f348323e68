"""The truth that strategies are held to: plain Transformers logits and torch autograd, in float64.

Nothing here knows of chunks, heads or steps. Every document is run alone, without padding and without
packing, so what leaks between documents or counts a token twice shows up as a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY = 61
IGNORE = -100
Batch = dict[str, Tensor]
Loss = Callable[[list[Tensor], Batch], Tensor]
"""Sum of an objective over one micro-batch, from each row's log-probabilities [T] (0 where not learned)."""


class Norm(LlamaRMSNorm):
    """In the precision of its weight. Transformers' is in float32 always, and who computes it otherwise than autograd
    does could not be held to more."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def tiny_model(kind: str, dropout: float = 0.0) -> nn.Module:
    """full: every parameter trains; tied: head and embedding are one; lora: adapters on a frozen model."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=kind == "tied",
        attention_dropout=dropout,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Norm
            torch.nn.init.normal_(module.weight, 1, 0.3)
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora)
    return model.double()


def ragged(seed: int, lengths: list[int], width: int, prompts: int = 0) -> Batch:
    """Rows padded on the right to `width`, their first `prompts` tokens not learned."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(lengths), width), generator=generator)
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORE
        labels[row, :prompts] = IGNORE
    return {"input_ids": ids, "labels": labels}


def left_padded(seed: int, lengths: list[int], width: int) -> Batch:
    """Rows padded on the left to `width`, with the mask that says so; a row's first token is not learned."""
    batch = ragged(seed, [width] * len(lengths), width)
    real = torch.stack([torch.arange(width) >= width - length for length in lengths])
    batch["labels"][~real] = IGNORE
    for row, length in enumerate(lengths):
        batch["labels"][row, width - length] = IGNORE
    batch["attention_mask"] = real.long()
    return batch


def masked(batch: Batch, lengths: list[int]) -> Batch:
    """With the attention mask that other people's collators add to rows padded on the right."""
    width = batch["labels"].shape[1]
    return {**batch, "attention_mask": (torch.arange(width) < torch.tensor(lengths)[:, None]).long()}


def packed(seed: int, rows: list[list[int]]) -> Batch:
    """Each row holds documents of these lengths; the first token of a document is not learned."""
    batch = ragged(seed, [sum(lengths) for lengths in rows], sum(rows[0]))
    positions = [torch.cat([torch.arange(length) for length in lengths]) for lengths in rows]
    batch["position_ids"] = torch.stack(positions)
    batch["labels"][batch["position_ids"] == 0] = IGNORE
    return batch


def cases() -> dict[str, list[Batch]]:
    """Micro-batches of a global batch, by what is difficult about them."""
    padded_tail = packed(5, [[6, 4, 3], [9, 4]])
    padded_tail["labels"][0, 10:] = IGNORE
    filler = ragged(9, [0, 0], 8)
    return {
        "one": [ragged(1, [12, 12], 12)],
        "accumulation": [ragged(1, [12, 12], 12), ragged(2, [5], 5, prompts=3), ragged(3, [9, 2, 7], 9)],
        "right padding": [ragged(4, [10, 3, 7], 10)],
        "left padding": [left_padded(10, [11, 4, 7], 11), left_padded(11, [3, 9], 9)],
        "masked padding": [masked(ragged(4, [10, 3, 7], 10), [10, 3, 7])],
        "prompt masks": [ragged(4, [10, 10], 10, prompts=6), ragged(5, [9], 9, prompts=2)],
        "packing": [padded_tail, packed(6, [[2, 11]])],
        "partial window": [ragged(8, [8, 6], 8), filler],
    }


def documents(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """(row, start, stop) of every document: position_ids restart with each, padding is cut off."""
    labels, real = batch["labels"], batch.get("attention_mask")
    for row in range(labels.shape[0]):
        width = labels.shape[1]
        positions = batch.get("position_ids")
        starts = [0] if positions is None else (positions[row] == 0).nonzero()[:, 0].tolist()
        if real is not None:
            starts = [int(real[row].argmax())]
        for start, stop in zip(starts, [*starts[1:], width], strict=True):
            learned = (labels[row, start:stop] != IGNORE).nonzero()
            if len(learned):
                yield row, start, start + int(learned.max()) + 1


def row_logprobs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """For each row [T]: the log-probability of every learned token, 0 elsewhere."""
    rows = list(torch.zeros(batch["labels"].shape, dtype=torch.float64))
    for row, start, stop in documents(batch):
        # Left padding shifts positions, and rotations are float32 whatever the model is.
        first = start if "attention_mask" in batch else 0
        positions = torch.arange(first, first + stop - start)[None]
        logits = model(input_ids=batch["input_ids"][row : row + 1, start:stop], position_ids=positions).logits[0, :-1]
        target = batch["labels"][row, start + 1 : stop]
        picked = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0] * (target != IGNORE)
        rows[row] = rows[row] + F.pad(picked, (start + 1, len(rows[row]) - stop))
    return rows


def sft(rows: list[Tensor], batch: Batch) -> Tensor:
    return -torch.stack(rows).sum()


def learned_in(row: Tensor) -> int:
    return int((row[1:] != IGNORE).sum())


@dataclass(frozen=True)
class Truth:
    loss: Tensor
    gradients: dict[str, Tensor]
    logprobs: list[Tensor]


def truth(model: nn.Module, batches: list[Batch], loss: Loss = sft, weight: float | None = None) -> Truth:
    """Loss and gradients of (the sum over all micro-batches) / W; W counts learned tokens unless it is
    given."""
    model.zero_grad(set_to_none=True)
    if weight is None:
        weight = sum(learned_in(row) for batch in batches for row in batch["labels"])
    logprobs = [row_logprobs(model, batch) for batch in batches]
    total = sum(loss(rows, batch) for rows, batch in zip(logprobs, batches, strict=True)) / weight
    total.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Truth(total.detach(), gradients, [torch.stack(rows).detach() for rows in logprobs])


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of any parameter's gradient, relative to that gradient."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in wanted.items())
