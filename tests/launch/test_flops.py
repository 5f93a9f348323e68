"""Operations by formula against those that torch counts while a model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from launch.flops import attention_windows, peak_flops, training_flops

LENGTH = 48


def model(kind: str = "llama", **changes: Any) -> Any:
    shape = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "use_cache": False, **changes,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))


def counted(built: Any) -> int:
    """By torch, of forward and backward of one document, in products of two matrices; attention's fused kernel is
    not among them."""
    ids = torch.randint(64, (1, LENGTH))
    with FlopCounterMode(display=False) as counter:
        built(input_ids=ids, labels=ids).loss.backward()
    by_operation = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in by_operation.items() if "scaled_dot" not in str(operation))


def products(built: Any) -> float:
    attention = 12 * 4 * 8 * 3 * LENGTH**2 / 2
    total = training_flops(built, built.config, [LENGTH])
    assert total is not None
    return total - attention


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_every_product_counts_once(changes: dict[str, Any]) -> None:
    built = model(**changes)
    # Rotary angles are products too, of one column.
    assert products(built) == pytest.approx(counted(built), rel=2e-3)


def test_a_frozen_weight_has_no_gradient_of_its_own() -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    # The first layer's input needs no gradient here, which the formula counts.
    assert counted(adapted) <= products(adapted) <= 1.15 * counted(adapted)


def test_of_the_experts_those_a_token_meets_count() -> None:
    few, all_of_them = (
        training_flops(built, built.config, [8])
        for n in (2, 4)
        for built in [model("mixtral", num_local_experts=4, num_experts_per_tok=n)]
    )
    experts = 3 * 3 * 32 * 48 * 6 * 8
    assert few is not None
    assert all_of_them is not None
    assert all_of_them - few == 2 * experts


def test_attention_counts_within_documents_and_windows() -> None:
    built = model("mistral", sliding_window=None)
    whole, halves = (training_flops(built, built.config, lengths) for lengths in ([64], [32, 32]))
    assert whole is not None
    assert halves is not None
    assert whole - halves == 12 * 4 * 8 * 3 * (64**2 - 2 * 32**2) / 2
    near = model("mistral", sliding_window=16)
    windowed = training_flops(near, near.config, [64])
    assert windowed is not None
    # 16 tokens see what is before them, the other 48 see 16 each.
    assert whole - windowed == 12 * 4 * 8 * 3 * (64**2 / 2 - 16**2 / 2 - 48 * 16)


def test_what_cannot_be_counted_is_unknown() -> None:
    config = AutoConfig.for_model("qwen3_next")
    assert attention_windows(config) is None
    assert peak_flops("cpu") is None
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
