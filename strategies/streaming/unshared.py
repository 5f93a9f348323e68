"""Which models cannot have their sequences shared out over ranks: told by their configuration, then by their class, and
before the first step by what they compute."""

from __future__ import annotations

import inspect
from math import gcd
from typing import Any

import torch
from torch import Tensor

from distrib.contracts import Batch, Context, Engine, Step
from distrib.errors import Refused
from distrib.topology import Topology

KINDS = {"full_attention", "sliding_attention"}
_LENGTH = 16


def refusal(ranks: int, why: str) -> Refused:
    return Refused(f"engine.context_parallel={ranks}: {why}; set engine.context_parallel=1")


def not_shared(model: Any, ranks: int) -> Refused:
    return refusal(ranks, f"in {type(model).__name__} tokens meet elsewhere than in attention that ranks can share")


def check(config: Any, topology: Topology) -> None:
    """Refuse a model whose positions meet elsewhere than in attention that goes through Transformers' interface."""
    ranks, kind = topology.context, f"model type {config.model_type!r}"
    if (heads := _heads(config)) % ranks:
        fits = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise Refused(f"engine.context_parallel={ranks} does not divide the model's {heads} heads: choose {fits}")
    if others := sorted(set(getattr(config, "layer_types", None) or ()) - KINDS):
        raise refusal(ranks, f"{kind} has layers of kind {others[0]}, and only {', '.join(sorted(KINDS))} are shared")
    if getattr(config, "output_router_logits", False):
        raise refusal(ranks, "output_router_logits=true: the router's loss is no sum over ranks")
    if not _is_served(config):
        raise refusal(ranks, f"attention of {kind} does not go through Transformers' interface")


def refuse_latents(name: str, config: Any, topology: Topology) -> None:
    """Keys and values that are recorded before they are given to heads."""
    if topology.context > 1 and getattr(config, "kv_lora_rank", None):
        raise Refused(
            f"engine.context_parallel={topology.context} with strategy {name}: model type {config.model_type!r} has "
            "latent keys, which are recorded without heads; choose plain, recompute, or set engine.context_parallel=1"
        )


def _heads(config: Any) -> int:
    """What divides the numbers of heads of all its layers; 0 if it has none."""
    found = [value for name, value in vars(config).items() if name.endswith("num_attention_heads")]
    return gcd(*(value for value in (*found, getattr(config, "num_attention_heads", 0)) if isinstance(value, int)))


def _is_served(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None:
        # A model's own code is known when it runs.
        return True
    kind = model[0] if isinstance(model, tuple) else model
    takes_positions = "position_ids" in inspect.signature(kind.forward).parameters
    return takes_positions and bool(kind._supports_attention_backend) and not kind._is_stateful


def refuse_unlike(step: Step, engine: Engine, model: Any) -> None:
    """Refused where a few tokens have other log-probabilities in parts than on one rank; every rank calls it."""
    number_BT = torch.arange(2 * _LENGTH, device=engine.topology.device).view(2, _LENGTH)
    ids_BT = (number_BT * 7 + 1) % model.config.vocab_size
    batch: Batch = {"input_ids": ids_BT, "labels": ids_BT}
    modes = [(part, part.training) for part in engine.module.modules()]
    engine.module.eval()
    try:
        (found_BT,) = step.logprobs([batch], Context(seed=0, step=0, weight=1.0))
        wanted_BT = _alone(engine, ids_BT)
    finally:
        for part, training in modes:
            part.training = training
    difference = float((found_BT - wanted_BT).norm() / wanted_BT.norm())
    # Half precision rounds otherwise in another order.
    if not difference < (5e-2 if engine.settings.bf16 else 1e-4):
        why = f"{type(model).__name__} gives other log-probabilities where ranks share a sequence, by {difference:.1e}"
        raise refusal(engine.topology.context, why)


def _alone(engine: Engine, ids_BT: Tensor) -> Tensor:
    """[B, T], by whole sequences on this rank."""
    with torch.no_grad(), engine.micro_batch(last=False):
        logits_BTV = engine.module(input_ids=ids_BT, use_cache=False, return_dict=True).logits[:, :-1]
    logprob_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).log_softmax(-1)
    found_BT = torch.zeros(ids_BT.shape, dtype=logprob_BTV.dtype, device=ids_BT.device)
    found_BT[:, 1:] = logprob_BTV.gather(-1, ids_BT[:, 1:, None])[..., 0]
    return found_BT
