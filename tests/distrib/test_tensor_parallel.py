"""Layers and sequences split over ranks: the gradients are one process's, what a rank keeps is its part, and what
cannot be split is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from all_families import NOT_TEXT, TYPES, configure
from engine_cases import padded, ragged_rows, recipe, reference
from ranks import Ranks
from tensor_cases import plain_gradients, worst
from transformers import LlamaConfig

import strategies
from distrib.contracts import Batch
from distrib.engines import Settings, check, tensor_parallel
from distrib.errors import Refused
from distrib.topology import Topology

TWO = {"name": "fsdp2", "tensor_parallel": 2}
MODELS: dict[str, dict[str, Any]] = {
    "full": {"config_overrides": {"tie_word_embeddings": False}},
    "tied": {"config_overrides": {"tie_word_embeddings": True}},
    "biases": {"config_overrides": {"attention_bias": True, "mlp_bias": True}},
    "lora": {"lora_r": 4},
}
# Between them: norms of single heads, LayerNorm and biases, one projection for queries, keys and values, attention and
# MLP side by side, norms after them, softcaps and windows, keys and values of other layers.
SOME = ("qwen3", "gpt_neox", "phi", "cohere", "gemma2", "starcoder2", "gemma4_unified_text")


def packed(rows: list[tuple[list[int], int]]) -> Batch:
    """One line of all rows; every token but a document's first is learned."""
    ids = [token for tokens, _ in rows for token in tokens]
    labels = [label for tokens, _ in rows for label in (-100, *tokens[1:])]
    positions = [index for tokens, _ in rows for index in range(len(tokens))]
    return {
        name: torch.tensor([x]) for name, x in (("input_ids", ids), ("labels", labels), ("position_ids", positions))
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_of_two_ranks_are_those_of_one(
    two_ranks: Ranks, model: str, dtype: torch.dtype, bound: float
) -> None:
    rows = ragged_rows(4)
    made_from = recipe(engine=TWO, **MODELS[model])
    expected = reference(recipe(**MODELS[model]), rows, dtype)
    # 17 positions, then 5 and 9: none of them even.
    for batches in ([padded(rows)], [padded(rows[:1]), padded(rows[1:2]), padded(rows[2:])]):
        for found in two_ranks("engine_cases:gradients", made_from, dtype, [batches]):
            assert worst(found, expected) < bound


def test_packed_documents_do_not_see_each_other(two_ranks: Ranks) -> None:
    rows = [(tokens, 1) for tokens, _ in ragged_rows(4)]
    expected = reference(recipe(), rows, torch.float64)
    for found in two_ranks("engine_cases:gradients", recipe(engine=TWO), torch.float64, [[packed(rows)]]):
        assert worst(found, expected) < 1e-12


def test_every_entry_counts_once_in_the_norm(two_ranks: Ranks) -> None:
    rows = ragged_rows(3)
    changes = {"tie_word_embeddings": True, "mlp_bias": True}
    expected = reference(recipe(config_overrides=changes), rows, torch.float64)
    whole = float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    made_from = recipe(engine=TWO, config_overrides=changes)
    for found in two_ranks("tensor_cases:norms", made_from, [padded(rows)]):
        assert found == pytest.approx((whole, whole), rel=1e-12)


def compare(ranks: Ranks, family: str, side: str = "plain") -> str | None:
    """Why the family is refused, or None after its gradients were found right."""
    answers = ranks("tensor_cases:of_family", family, side)
    if isinstance(answers[0], str):
        return answers[0]
    expected = plain_gradients(family)
    for found in answers:
        # Some compute their norms in float32.
        assert worst(found, expected) < 1e-6
    return None


@pytest.mark.parametrize("family", SOME)
def test_families(two_ranks: Ranks, family: str) -> None:
    assert compare(two_ranks, family) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [name for name in TYPES if name not in (*SOME, *NOT_TEXT)])
def test_every_other_family_is_exact_or_refused(two_ranks: Ranks, family: str) -> None:
    why = compare(two_ranks, family)
    assert why is None or "set engine.tensor_parallel=1" in why or "only decoder-only text models" in why


def test_checkpointing_computes_the_parts_again(two_ranks: Ranks) -> None:
    assert compare(two_ranks, "llama", "gc+ce") is None


RECOMPUTE = (
    "recompute",
    "recompute:policy=full",
    "recompute:policy=auto:budget=0.4",
    "recompute:policy=mlp:offload=true",
)


@pytest.mark.parametrize("side", RECOMPUTE)
def test_what_crosses_ranks_runs_again(two_ranks: Ranks, side: str) -> None:
    assert compare(two_ranks, "qwen3", side) is None


def test_ranks_drop_apart_in_blocks_and_draw_alike_outside(two_ranks: Ranks) -> None:
    (one, drawn), (other, drawn_there) = two_ranks("tensor_cases:dropped")
    assert one.shape == other.shape
    assert 0.2 < one.double().mean() < 0.8
    assert not torch.equal(one, other)
    assert torch.equal(drawn, drawn_there)


def test_a_rank_keeps_half(two_ranks: Ranks) -> None:
    """All but the rotary embedding, which every rank has for the whole sequence."""
    whole = two_ranks("tensor_cases:kept_bytes", "llama")
    from tensor_cases import kept_bytes

    alone = kept_bytes(Topology(), "llama")
    assert whole[0] == whole[1]
    assert 0.49 * alone < whole[0] < 0.52 * alone


def test_attention_and_mlp_gather_once_a_direction(two_ranks: Ranks) -> None:
    """Two sublayers in each of two layers, and the ends: q, k and v share what they gather."""
    for counts in two_ranks("tensor_cases:moves", "llama"):
        # Forward: 4 and the last block's output. Backward: 4 again, 4 of gradients and the embedding's.
        assert counts == {"gather": 5 + 9, "scatter_sum": 4 + 4}


TENSOR = Topology(world=2, tensor=2)


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("gpt2", "=2: Transformers has no tensor-parallel plan for model type 'gpt2'"),
        ("mixtral", "has layers.*.mlp.experts.gate_up_proj: packed_colwise and "),
        ("olmo2", "has layers.*.self_attn.q_proj: colwise_gather_output and 3 more, and only colwise, rowwise"),
    ],
)
def test_plans_that_are_not_served(family: str, said: str) -> None:
    with pytest.raises(Refused) as caught:
        tensor_parallel.check(configure(family), TENSOR)
    assert said in str(caught.value)
    assert str(caught.value).endswith("; set engine.tensor_parallel=1")


def test_a_layer_that_the_plan_leaves_out_is_refused(two_ranks: Ranks) -> None:
    (said, _) = two_ranks("tensor_cases:of_family", "youtu")
    assert said.startswith("engine.tensor_parallel=2: the model's plan leaves out YoutuDecoderLayer.self_attn.")


def test_figures_that_do_not_divide() -> None:
    config = LlamaConfig(num_attention_heads=12, num_key_value_heads=4, intermediate_size=48, hidden_size=24)
    with pytest.raises(Refused) as caught:
        tensor_parallel.check(config, Topology(world=6, tensor=6))
    assert (
        str(caught.value)
        == "engine.tensor_parallel=6 does not divide the model's num_key_value_heads=4: choose 1, 2, 4"
    )


@pytest.mark.parametrize(
    ("name", "settings", "topology", "said"),
    [
        ("ddp", Settings(), TENSOR, "engine.tensor_parallel=2 with engine.name='ddp': set engine.name=fsdp2"),
        ("zero", Settings(), TENSOR, "engine.tensor_parallel=2 with engine.name='zero': set engine.name=fsdp2"),
        ("fsdp2", Settings(), replace(TENSOR, world=3), "=2 with a world of 3: start a multiple of 2 ranks"),
        ("fsdp2", Settings(compile=True), TENSOR, "compile=true with engine.tensor_parallel=2: set compile=false"),
    ],
)
def test_engines_that_do_not_split(name: str, settings: Settings, topology: Topology, said: str) -> None:
    with pytest.raises(Refused) as caught:
        check(name, settings, topology)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", strategies.names())
def test_strategies_say_whether_they_take_part(name: str) -> None:
    chosen = strategies.get(name)()
    if chosen.tensor_parallel:
        strategies.check([chosen], configure("llama"), TENSOR)
        return
    with pytest.raises(
        Refused, match=rf"^engine.tensor_parallel=2 with strategy {name}: choose plain.*, or set engine"
    ):
        strategies.check([chosen], configure("llama"), TENSOR)
