"""Model types of Transformers as two stages on two ranks: exact, or refused on both."""

from __future__ import annotations

import all_families
import pipeline_families
import pytest
import sweep
from pipeline_families import Case

import strategies
from distrib.errors import Refused
from strategies.pipelining.partition import partition

SOME = ("llama", "gemma3_text", "gpt_neox", "phi", "cohere", "granite", "olmo", "olmo2", "gpt_oss", "deepseek_v3")
EXPERTS = ("mixtral", "qwen3_moe")
SPLIT = {"schedule": "1f1b+2bp"}
OWN_INDEX = {"indexer_types": ["full", "full"]}
CASES = {
    **{name: Case(name, SPLIT) for name in (*SOME, *EXPERTS)},
    "tied": Case("qwen3_moe", SPLIT, {"tie_word_embeddings": True}),
    "lora": Case("qwen3_moe", SPLIT, lora=True),
    # Its last layer routes tokens by their ids, and a token has several states.
    "ids": Case("deepseek_v4", SPLIT, {"mlp_layer_types": ["moe", "hash_moe"]}),
    # Their layers give two things each, and a stage begins where the second is made anew.
    "tuples": Case("glm_moe_dsa", SPLIT, OWN_INDEX),
    "tuples of several states": Case("hy_v4", SPLIT, OWN_INDEX),
    "nothing shared": Case("gemma4_text", SPLIT, {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}),
    "nothing shared but windows": Case("gemma4_unified_text", SPLIT, {"num_kv_shared_layers": 0}),
}
REFUSED = {
    "no plan": (Case("mamba"), "model type 'mamba' declares no pipeline plan"),
    "a state of all layers": (Case("hrm_text"), "HrmTextForCausalLM: its z_L_init belongs to no stage of a pipeline"),
    "parts for each layer": (Case("gemma3n_text"), "'gemma3n_text': stage 0 cannot run alone: RuntimeError: shape"),
    "shared keys": (Case("gemma4_unified_text"), "stage 1 cannot run alone: KeyError: 'sliding_attention'"),
    "shared index": (Case("glm_moe_dsa"), "stage 1 cannot run alone: ValueError: Shared DSA layers require"),
    "a bias beside a tied weight": (
        Case("phi", changes={"tie_word_embeddings": True}),
        "PhiForCausalLM: lm_head.bias would be on two stages of the pipeline, 0 and 1",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_two_stages_are_the_whole_model(two_ranks, name):
    found = pipeline_families.verdict(two_ranks, CASES[name])
    assert found.word == "exact", found


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_on_every_rank(two_ranks, name):
    case, why = REFUSED[name]
    assert why in pipeline_families.verdict(two_ranks, case).why


def test_layers_of_two_stages_cannot_share_a_weight():
    model = all_families.build("llama", num_hidden_layers=4)
    model.model.layers[3].mlp = model.model.layers[2].mlp
    assert partition(model, 2).bounds == (0, 2, 4)
    with pytest.raises(
        Refused, match=r"layers\.3\.mlp\.gate_proj\.weight would be on two stages of the pipeline, 0 and 1"
    ):
        partition(model, 2, [3, 1])


@pytest.mark.parametrize("model_type", ["gpt2", "hrm_text"])
def test_one_stage_needs_no_plan(model_type):
    truth = sweep.true_gradients(model_type, "prompt")
    assert sweep.measure(model_type, strategies.get("twobp")(), "prompt", truth).word == "exact"


def test_the_page_has_enough_that_are_exact():
    assert len(pipeline_families.committed()) >= 75


@pytest.mark.slow
@pytest.mark.parametrize("model_type", all_families.TYPES)
def test_every_type_is_exact_or_refused_as_the_page_says(two_ranks, model_type):
    found = pipeline_families.verdict(two_ranks, Case(model_type))
    assert found.word != "WRONG", found
    said = model_type in pipeline_families.committed()
    assert (found.word == "exact") == said, f"{found}: if that is meant, write the section of docs/families.md anew"
