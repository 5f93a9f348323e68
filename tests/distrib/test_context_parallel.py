"""One sequence over two ranks: the gradients are autograd's on each document alone, a rank keeps its part, and what
cannot be shared is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from all_families import NOT_TEXT, TYPES, configure
from context_cases import BROKEN
from contract import reference
from contract.checks import dpo_loss, grpo_loss, with_references
from contract.reference import left_padded, masked, packed, ragged
from exactness import case, differences, is_exact, precision
from ranks import Ranks
from streaming_cases import truth
from tensor_cases import plain_gradients, worst

import strategies
from distrib.contracts import Batch
from distrib.engines import Settings, check
from distrib.errors import Refused
from distrib.topology import Topology

STRATEGIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "streambp": {"chunk": 8},
    "seco": {"chunk": 8},
    "recompute": {"policy": "full"},
}
# Lengths that neither ranks nor chunks divide, and one that leaves a rank without a position to learn.
BATCHES: list[Batch] = [
    left_padded(1, [11, 4, 7], 11),
    masked(ragged(4, [19, 12], 19, prompts=5), [19, 12]),
    packed(5, [[6, 4, 3], [9, 4]]),
    ragged(7, [13, 13], 13, prompts=9),
    ragged(10, [2, 30], 30),
    ragged(9, [3], 3),
]
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"config_overrides": {"tie_word_embeddings": True}},
    # Fewer than ranks, so that both have it.
    "one key head": {"config_overrides": {"num_key_value_heads": 1}},
    "lora": {"lora_r": 4},
}
PAIRS = [
    with_references(ragged(21, [10, 7], 10, prompts=3)),
    with_references(left_padded(23, [15, 18, 9, 4], 18)),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_every_kind_of_batch_at_once(two_ranks: Ranks, engine: str, strategy: str) -> None:
    fields = STRATEGIES[strategy]
    is_exact(two_ranks, case(engine, strategy, [BATCHES], fields=fields, context_parallel=2), engine)


@pytest.mark.parametrize(
    ("engine", "strategy", "model"),
    [("ddp", "plain", "lora"), ("fsdp2", "streambp", "tied"), ("fsdp2", "seco", "one key head")],
)
def test_models(two_ranks: Ranks, engine: str, strategy: str, model: str) -> None:
    asked = case(engine, strategy, [BATCHES[:3]], fields=STRATEGIES[strategy], context_parallel=2, **MODELS[model])
    is_exact(two_ranks, asked, engine)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_every_model(two_ranks: Ranks, engine: str, strategy: str, model: str) -> None:
    fields = STRATEGIES[strategy]
    is_exact(two_ranks, case(engine, strategy, [BATCHES], fields=fields, context_parallel=2, **MODELS[model]), engine)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_groups_have_other_rows(four_ranks: Ranks, engine: str, strategy: str) -> None:
    per_rank = [BATCHES[:3], BATCHES[3:]]
    is_exact(four_ranks, case(engine, strategy, per_rank, fields=STRATEGIES[strategy], context_parallel=2), engine)


@pytest.mark.parametrize(
    ("engine", "strategy", "objective", "loss"),
    [
        ("ddp", "plain", strategies.DPO(beta=0.1, label_smoothing=0.2), dpo_loss),
        ("fsdp2", "seco", strategies.DPO(beta=0.1, label_smoothing=0.2), dpo_loss),
        ("fsdp2", "streambp", strategies.GRPO(beta=0.05, clip=0.2), grpo_loss),
    ],
)
def test_objectives_of_whole_sequences(
    two_ranks: Ranks, engine: str, strategy: str, objective: Any, loss: reference.Loss
) -> None:
    weight = 3.0 if isinstance(objective, strategies.DPO) else 6.0
    fields = STRATEGIES[strategy]
    asked = case(engine, strategy, [PAIRS], fields=fields, objective=objective, weight=weight, context_parallel=2)
    is_exact(two_ranks, asked, engine, loss)


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_would_be_noticed(two_ranks: Ranks, mistake: str) -> None:
    asked = case("ddp", "plain", [BATCHES[2:3]], context_parallel=2)
    wanted = truth(asked)
    found = two_ranks("context_cases:broken", asked, mistake)
    assert differences(found[0].gradients, wanted.gradients)[0] > 1e3 * precision("ddp")[1]


def test_positions_that_are_not_told_are_refused_before_the_first_step(two_ranks: Ranks) -> None:
    asked = case("ddp", "plain", [BATCHES[3:4]], context_parallel=2)
    for said in two_ranks("context_cases:broken", asked, "positions of a rank", True):
        assert "other log-probabilities where ranks share a sequence" in said


def test_a_rank_keeps_half(two_ranks: Ranks) -> None:
    """And attention's output twice: of its heads, and of its positions."""
    from context_cases import kept_bytes

    shared, other = two_ranks("context_cases:kept_bytes")
    alone = kept_bytes(Topology())
    assert shared == other
    assert 0.5 * alone < shared < 0.55 * alone


def test_ranks_drop_apart(two_ranks: Ranks) -> None:
    one, other = two_ranks("context_cases:drawn")
    assert not torch.equal(one, other)


# Between them: other ways to tell positions, softcaps, windows, experts, sinks, heads of two sizes, one key for all.
SOME = [("gpt2", "plain"), ("gemma2", "streambp:chunk=4"), ("gpt_oss", "plain"), ("deepseek_v3", "plain")]


def compare(ranks: Ranks, family: str, side: str) -> str | None:
    """Why the family is refused, or None after its gradients were found right."""
    answers = ranks("context_cases:of_family", family, side)
    if isinstance(answers[0], str):
        return answers[0]
    expected = plain_gradients(family)
    for found in answers:
        # Some compute their norms in float32, and some weights do not train.
        assert worst(found, {name: expected[name] for name in found}) < 1e-6
    return None


@pytest.mark.parametrize(("family", "side"), SOME)
def test_families(two_ranks: Ranks, family: str, side: str) -> None:
    assert compare(two_ranks, family, side) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", ["plain", "streambp:chunk=4", "seco:chunk=4"])
@pytest.mark.parametrize("family", [name for name in TYPES if name not in NOT_TEXT])
def test_every_family_is_exact_or_refused(two_ranks: Ranks, family: str, side: str) -> None:
    why = compare(two_ranks, family, side)
    known = "choose 1", "set engine.context_parallel=1", "only decoder-only", "gives other hidden states in chunks"
    assert why is None or any(words in why for words in known), why


TWO = Topology(world=2, context=2)


@pytest.mark.parametrize(
    ("name", "settings", "topology", "said"),
    [
        ("zero", Settings(), TWO, "engine.context_parallel=2 with engine.name='zero': choose ddp or fsdp2"),
        (
            "fsdp2",
            Settings(),
            replace(TWO, tensor=2),
            "engine.context_parallel=2 with engine.tensor_parallel=2: set one",
        ),
        ("ddp", Settings(), replace(TWO, stages=2), "=2 with a pipeline of 2 stages: set engine.context_parallel=1"),
        ("ddp", Settings(), replace(TWO, world=3), "=2 with a world of 3: start a multiple of 2 ranks"),
        ("ddp", Settings(compile=True), TWO, "compile=true with engine.context_parallel=2: set compile=false"),
    ],
)
def test_engines_that_do_not_share(name: str, settings: Settings, topology: Topology, said: str) -> None:
    with pytest.raises(Refused) as caught:
        check(name, settings, topology)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"num_attention_heads": 1}, "=2 does not divide the model's 1 heads: choose 1"),
        ("lfm2", {}, "=2: model type 'lfm2' has layers of kind conv, and only full_attention, sliding_attention are"),
        ("bloom", {}, "=2: attention of model type 'bloom' does not go through Transformers' interface; set"),
        ("mixtral", {"output_router_logits": True}, "=2: output_router_logits=true: the router's loss is no sum over"),
    ],
)
def test_models_that_are_not_shared(family: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused) as caught:
        strategies.check([strategies.get("plain")()], configure(family, **changes), TWO)
    assert f"engine.context_parallel{said}" in str(caught.value)


def test_latent_keys_are_not_recorded() -> None:
    with pytest.raises(
        Refused, match=r"^engine.context_parallel=2 with strategy seco: .* latent keys, .* choose plain"
    ):
        strategies.check([strategies.get("seco")()], configure("deepseek_v3"), TWO)


@pytest.mark.parametrize("name", strategies.names())
def test_strategies_say_whether_they_take_part(name: str) -> None:
    chosen = strategies.get(name)()
    if chosen.context_parallel:
        strategies.check([chosen], configure("llama"), TWO)
        return
    with pytest.raises(Refused, match=rf"^engine.context_parallel=2 with strategy {name}: choose plain.*, or set"):
        strategies.check([chosen], configure("llama"), TWO)
