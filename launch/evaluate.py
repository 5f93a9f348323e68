"""Evaluation while training: the objective over held-out rows, and texts that the model writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from distrib.contracts import Batch, Context, Engine, Step, evaluating
from launch.data import Data
from launch.data.rows import Row
from launch.reference import Annotate
from strategies.core.head import find_tokens
from strategies.core.objectives import SFT, Objective

if TYPE_CHECKING:
    from launch.recipe import Recipe

NEW_TOKENS = 64
PROMPT_TOKENS = 32


def evaluator(
    recipe: Recipe,
    tokenizer: Any,
    data: Data | None,
    engine: Engine,
    step: Step,
    objective: Objective,
    annotate: Annotate,
) -> Callable[[int], dict[str, Any]]:
    """What the loop calls every `eval_steps`. Label smoothing and z-loss shape training and are left out here."""
    if data is None:
        return lambda index: {}
    measured = SFT() if isinstance(objective, SFT) else objective

    def evaluate(index: int) -> dict[str, Any]:
        context = Context(recipe.seed, index, 1.0)
        size = recipe.per_device_train_batch_size
        with evaluating(engine.model):
            loss, weight = _total(data, size, engine, step, measured, annotate, context)
            figures: dict[str, Any] = {"eval_loss": loss / weight, "eval_rows": data.rows}
            if recipe.eval_samples:
                figures["eval_texts"] = _texts(recipe, tokenizer, engine, data)
        return figures

    return evaluate


def _total(
    data: Data,
    size: int,
    engine: Engine,
    step: Step,
    objective: Objective,
    annotate: Annotate,
    context: Context,
) -> tuple[float, float]:
    """(objective, weight) over all rows and ranks."""
    assert data.rows is not None
    topology = engine.topology
    window = data.window(0, data.rows, topology.data_rank, topology.data_world, size)
    total = torch.zeros(2, dtype=torch.float64)
    for cpu_batch in window.micro_batches:
        batch: Batch = {name: tensor.to(topology.device) for name, tensor in cpu_batch.items()}
        annotate([batch], context)
        (logprobs,) = step.logprobs([batch], context)
        tokens = find_tokens(batch["labels"], None)
        stats = tokens.stats({"logprob": logprobs.flatten()[tokens.token_n]})
        total += torch.tensor([float(objective(stats, batch)), objective.weight(batch)], dtype=torch.float64)
    if topology.world > 1:
        dist.all_reduce(total)
    loss, weight = (total / topology.copies).tolist()
    return loss, weight


def _texts(recipe: Recipe, tokenizer: Any, engine: Engine, data: Data) -> list[str]:
    """Greedy continuations of the first rows' beginnings. Every rank takes part, as sharded weights need."""
    texts = []
    model: Any = engine.model
    # Compiled code would be made anew for a cache that grows with every token.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for _, row in data.fetch(0, min(recipe.eval_samples, data.rows or 0)):
            prompt = torch.as_tensor(_prompt(row))[None].to(engine.topology.device)
            with engine.micro_batch(last=True):
                written = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    use_cache=True,
                    synced_gpus=engine.topology.world > 1,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts.append(tokenizer.decode(written[0]))
    return texts


def _prompt(row: Row) -> NDArray[np.int32]:
    """What comes before the first learned token, or the beginning of a text that is learned from its start."""
    sequence = row[0]
    asked = int(sequence.learned.argmax())
    return sequence.tokens[: asked if asked > 1 else PROMPT_TOKENS]
