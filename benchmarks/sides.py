"""What the benchmarks of long sequences compare: a model and a way to train it.

Sides are those of `launch/sides.py`, and `spaco/8`: the strategy `spaco` with a fixed draw, every eighth chunk up to
the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}


@dataclass(frozen=True)
class Case:
    """One row to measure. `model` is a name of SHAPES, or hidden size x layers of a Llama with 32,000 tokens."""

    side: str
    length: int
    model: str = "512x8"
    vocabulary: int | None = None
    kv_heads: int | None = None
    lora: int = 0
    bf16: bool = False
    steps: int = 1
    threads: int = 1
    fake: bool = False
    cap_gib: float | None = None
    attention: str = "sdpa"


def configuration(case: Case) -> Any:
    from transformers import AutoConfig

    from distrib.errors import choose

    if case.model in SHAPES:
        shape = dict(SHAPES[case.model])
    else:
        if not re.fullmatch(r"\d+x\d+", case.model):
            raise choose("model", case.model, ["HIDDENxLAYERS", *SHAPES])
        hidden, layers = (int(part) for part in case.model.split("x"))
        shape = {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": hidden // 64,
            "vocab_size": 32000,
        }
    given = {"vocab_size": case.vocabulary, "num_key_value_heads": case.kv_heads}
    shape |= {key: value for key, value in given.items() if value is not None}
    kind = shape.pop("model_type")
    common = {"tie_word_embeddings": False, "use_cache": False, "max_position_embeddings": 2**20}
    return AutoConfig.for_model(kind, **(common | shape))


def build(case: Case, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(case), dtype=dtype, attn_implementation=case.attention)
        if case.lora:
            from peft import LoraConfig, get_peft_model

            settings = LoraConfig(r=case.lora, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    return model.train()


def trainer(case: Case, model: Any) -> Callable[[Any], None]:
    """Forward and backward of a batch, as the side does it."""
    from launch.sides import prepare

    step = prepare("spaco:p=0.125" if case.side == "spaco/8" else case.side, model)
    if case.side == "spaco/8":
        step.step.draw = every_eighth

    def run(ids: Any) -> None:
        step({"input_ids": ids, "labels": ids})

    return run


def every_eighth(count: int, must: Sequence[bool], *_: Any) -> list[Any]:
    from strategies.streaming.draws import Sticky

    return Sticky(p=0.125).weighted([(count - 1 - index) % 8 == 0 for index in range(count)], must)
