"""Scaling on paper: formulas against calculation by hand, messages and memory against real ranks, the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

import strategies
from distrib.errors import UserError
from launch import cli
from launch.device import Device, device_of
from launch.models import build, load_config
from launch.plan_pipeline import PipelinePlanner
from launch.plan_scaling import Scale, links_of, nodes_of, plan_scaling, script_of
from launch.recipe import Engine, Recipe
from launch.scaling import (
    Group,
    Message,
    Part,
    Pass,
    Script,
    Turn,
    Weight,
    ddp,
    fsdp2,
    parts_of,
    sent_bytes,
    together,
    wire_bytes,
    zero,
)
from launch.scaling_pipeline import Pipeline
from launch.scaling_time import Link, Links, pass_s, spent
from launch.settings import settings_of
from launch.shares import share_of, sizes_of

SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 384,
    "intermediate_size": 500,
    "head_dim": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 301,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
}
"""Matrices on both sides of the size from which ZeRO-3 shards, and rows that do not divide."""
CONTROL_BYTES = 8
"""Norms, losses and flags are numbers: messages of no more than this are not in a script."""
ENGINES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "zero1": {"name": "zero", "stage": 1},
    "zero2": {"name": "zero", "stage": 2},
    "zero3": {"name": "zero", "stage": 3},
}
PIPELINE = {"strategy": {"name": "twobp", "stages": 2}, "gradient_accumulation_steps": 3}
LORA = {"lora_r": 4, "gradient_accumulation_steps": 3}
UNTIED = {"config_overrides": {"tie_word_embeddings": False}}


def recipe(engine: Any, **changes: Any) -> Recipe:
    shape = SHAPE | changes.pop("config_overrides", {})
    return Recipe(engine=engine, config_overrides=shape, max_length=16, **changes)


Bytes = Counter[tuple[str, int]]
"""Of whole tensors, by kind and ranks."""


def predicted(made_from: Recipe, world: int) -> Bytes:
    parts = parts_of(build(made_from, load_config(made_from)))
    count = made_from.gradient_accumulation_steps
    return added(script_of(made_from.engine, made_from, parts, Group(world), count, hides=False).messages())


def added(messages: Any) -> Bytes:
    found: Bytes = Counter()
    for kind, payload_bytes, group, times in messages:
        found[kind, group.ranks] += times * payload_bytes
    return found


def counted(seen: Counter[tuple[str, int, int]]) -> Bytes:
    found: Bytes = Counter()
    for (kind, payload_bytes, ranks), times in seen.items():
        if payload_bytes > CONTROL_BYTES:
            found[kind, ranks] += times * payload_bytes
    return found


def lasts(made_from: Recipe, world: int) -> dict[str, float]:
    """What a plan says that a rank keeps."""
    model, spec = build(made_from, load_config(made_from)), settings_of(made_from).optimizer
    assert spec is not None
    sizes = sizes_of(model)
    share = share_of(made_from.engine, made_from, sizes, spec, world, "cpu")
    masters = 0.0
    if made_from.engine.name == "zero":
        # Float32 copies of what a rank updates, beside the weights.
        masters = 4 * -(-sizes.trainable // world)
    return {"weights": share.weights - masters, "optimizer": share.optimizer}


@pytest.mark.parametrize("engine", ENGINES)
def test_what_two_ranks_exchange_and_keep(two_ranks: Ranks, engine: str) -> None:
    made_from = recipe(ENGINES[engine], gradient_accumulation_steps=2)
    for seen, kept in two_ranks("scaling_cases:step", made_from):
        assert counted(seen) == predicted(made_from, 2)
        # Small weights stay whole under stage 3, which a plan leaves out; shards are padded.
        assert kept == pytest.approx(lasts(made_from, 2), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True, "gradient_accumulation_steps": 2},
        LORA,
        UNTIED,
        LORA | UNTIED,
        LORA | UNTIED | {"bf16": True},
        LORA | UNTIED | {"load_in_4bit": True},
    ],
    ids=["once", "bf16", "lora", "untied", "lora untied", "lora bf16", "4 bits"],
)
def test_what_four_ranks_exchange(four_ranks: Ranks, engine: str, changes: dict[str, Any]) -> None:
    made_from = recipe(ENGINES[engine], **changes)
    for seen, _ in four_ranks("scaling_cases:step", made_from):
        assert counted(seen) == predicted(made_from, 4)


def pipeline(made_from: Recipe, world: int) -> Pipeline:
    chosen = strategies.build([section.model_dump() for section in made_from.strategy])
    return Pipeline(PipelinePlanner(made_from, Device("cpu", 2**33, world, None, here=False), chosen), world)


def is_what_they_exchange(pool: Ranks, made_from: Recipe) -> None:
    on_paper = pipeline(made_from, pool.world)
    for rank, (seen, kept) in enumerate(pool("scaling_cases:step", made_from)):
        place = rank // on_paper.planner.replicas
        paper = added(sum(on_paper.messages(place), ()))
        if rank % on_paper.planner.replicas == 0:
            assert counted(seen) == paper
        # Another replica may have a row less of a tied weight.
        assert counted(seen).total() == pytest.approx(paper.total(), rel=0.01)
        # AdamW has two moments of float32, and a step's count a parameter.
        mine = sum(w.elements for part in on_paper.weights(place) for w in part.trained)
        width = on_paper.planner.replicas if on_paper.sharded else 1
        assert kept["optimizer"] == pytest.approx(8 * mine / width, rel=0.01)


def test_what_two_stages_exchange(two_ranks: Ranks) -> None:
    is_what_they_exchange(two_ranks, recipe("ddp", **PIPELINE))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("changes", [{}, UNTIED, LORA], ids=["tied", "untied", "lora"])
def test_what_two_stages_on_two_ranks_each_exchange(four_ranks: Ranks, engine: str, changes: dict[str, Any]) -> None:
    is_what_they_exchange(four_ranks, recipe(engine, **(changes | PIPELINE)))


@pytest.mark.slow
def test_what_four_stages_exchange(four_ranks: Ranks) -> None:
    four = {"name": "twobp", "stages": 4}
    made_from = recipe("ddp", config_overrides={"num_hidden_layers": 4}, **(PIPELINE | {"strategy": four}))
    is_what_they_exchange(four_ranks, made_from)


def test_a_ring_by_hand() -> None:
    assert wire_bytes("all_reduce", 1000, 4) == 1500
    assert wire_bytes("all_gather", 1000, 4) == wire_bytes("reduce_scatter", 1000, 4) == 750
    assert wire_bytes("reduce_scatter", 1000, 4, gloo=True) == 1500
    assert wire_bytes("send", 1000, 2) == 1000
    assert wire_bytes("all_reduce", 1000, 1) == 0
    messages = [Message("all_gather", 100, Group(2), 3), Message("send", 10, Group(2))]
    assert sent_bytes(messages) == {"all_reduce": 0, "all_gather": 150, "reduce_scatter": 0, "send": 10}


WITHIN, BETWEEN = Link(100.0, 1.0), Link(10.0, 8.0)


def seconds(kind: str, *group: int, links: Links | None = None, payload_bytes: int = 1200) -> float | None:
    return (links or Links(WITHIN, BETWEEN)).seconds(Message(kind, payload_bytes, Group(*group)))


def test_times_of_messages_by_hand() -> None:
    # Three hops of a second, three quarters of the bytes at 100 a second.
    assert seconds("all_gather", 4) == pytest.approx(3 + 9)
    assert seconds("all_reduce", 4) == pytest.approx(6 + 18)
    # Of the four edges of the ring two lie between nodes: 4.5 s a hop, and the slow link carries everything.
    assert seconds("all_gather", 4, 2) == pytest.approx(3 * 4.5 + 90)
    # One device a node; another group that shares the node's link halves it.
    assert seconds("all_gather", 4, 4, links=Links(None, BETWEEN)) == pytest.approx(3 * 8 + 90)
    assert seconds("all_gather", 4, 4, 2) == pytest.approx(3 * 8 + 180)
    assert seconds("send", 2) == pytest.approx(1 + 12)
    assert seconds("send", 2, 2) == pytest.approx(8 + 120)
    # Small sums over 64 nodes of 8 climb a tree: 7 hops in a node and 6 between, twice.
    assert seconds("all_reduce", 512, 64, payload_bytes=0) == pytest.approx(2 * (7 * 1 + 6 * 8))
    assert Links(WITHIN).seconds(Message("all_reduce", 1, Group(4), 5)) == pytest.approx(5 * (6 + 0.015))


def test_what_is_not_known_has_no_time() -> None:
    assert seconds("all_reduce", 4, links=Links(None, BETWEEN)) is None
    assert seconds("all_reduce", 4, 2, links=Links(WITHIN, None)) is None
    assert seconds("all_reduce", 1, links=Links()) == 0
    assert links_of(Device("cuda", 1, 8, None, False, link=1e9)) == Links()


def test_groups_over_nodes() -> None:
    assert together([range(16)], 8) == Group(16, 2, 1)
    assert together([range(4)], 8) == Group(4, 1, 1)
    # Two stages of six ranks on nodes of eight: the second one lies on two nodes.
    assert together([range(6), range(6, 12)], 8) == Group(6, 2, 1)
    # Every rank of a node sends to another one.
    assert together([(rank, rank + 8) for rank in range(8)], 8) == Group(2, 2, 8)
    assert together([(rank, rank + 2) for rank in range(2)], 8) == Group(2, 1, 1)


def turns(*seconds: tuple[float, float, float]) -> tuple[Pass, dict[str, tuple[float, float]]]:
    """Of what is gathered before, computed, and sent after; a byte takes a second."""
    made = [
        Turn(str(index), (Message("send", int(before), Group(2)),), (Message("send", int(after), Group(2)),))
        for index, (before, _, after) in enumerate(seconds)
    ]
    return Pass(False, tuple(made)), {str(index): (one, 0.0) for index, (_, one, _) in enumerate(seconds)}


def test_exchanges_behind_computing_by_hand() -> None:
    def price(message: Message) -> float:
        return float(message.payload_bytes)

    # Gathers of 2 s behind layers of 5 s: only the first is waited for.
    assert pass_s(*turns((2, 5, 0), (2, 5, 0), (2, 5, 0)), price) == 2 + 15
    # Gathers of 5 s before layers of 2 s: only the last layer is not behind one.
    assert pass_s(*turns((5, 2, 0), (5, 2, 0), (5, 2, 0)), price) == 15 + 2
    # What leaves goes behind the next layer; the last one's is waited for.
    assert pass_s(*turns((0, 5, 3), (0, 5, 3)), price) == 10 + 3
    # Over one link: the second layer's weights (6 s) come behind the first layer, then both leave in their order.
    assert pass_s(*turns((1, 2, 4), (6, 2, 4)), price) == 1 + 6 + 4 + 4
    one, computes = turns((2, 5, 0), (2, 5, 0))
    hidden = spent(Script((one,), hides=True), computes, price)
    assert (hidden.compute_s, hidden.exchange_s, hidden.exposed_s, hidden.hidden_s) == (10, 4, 2, 2)
    shown = spent(Script((one,), update=(Message("send", 3, Group(2)),)), computes, price)
    assert (shown.exposed_s, shown.hidden_s) == (7, 0)


def llama() -> list[Part]:
    """32 layers of 200 million weights, and ends of 500 million."""
    layer, end = (Weight(20_000, 10_000, True),), (Weight(50_000, 10_000, True),)
    return [Part("root", ()), Part("embedding", end), *[Part("layer", layer)] * 32, Part("head", end)]


def test_engines_by_hand() -> None:
    parts, group, elements = llama(), Group(8), 32 * 200_000_000 + 1_000_000_000

    def sums(script: Script) -> Bytes:
        return added(script.messages())

    assert sums(ddp(parts, group, 4, True)) == {("all_reduce", 8): 4 * elements}
    # Twice gathered in bf16, scattered in float32, in every micro-batch.
    twice = {("all_gather", 8): 4 * 2 * 2 * elements, ("reduce_scatter", 8): 4 * 4 * elements}
    assert sums(fsdp2(parts, 2, group, 4, True)) == twice
    once = {("all_reduce", 8): 2 * elements, ("all_gather", 8): 2 * elements}
    assert sums(zero(parts, 1, 2, group, 4, True)) == once
    assert sums(zero(parts, 2, 2, group, 4, True)) == once | {("all_reduce", 8): 4 * 2 * elements}
    # The head and the last layer lie no more than a billion weights from their backward, and stay gathered.
    gathered = 2 * (2 * elements - 700_000_000)
    found = sums(zero(parts, 3, 2, group, 1, True))
    assert found == {("all_gather", 8): gathered, ("reduce_scatter", 8): 2 * elements}


def scale(**changes: Any) -> Scale:
    links = {"link": 4e11, "latency": 5e-6, "node_link": 5e10, "node_latency": 15e-6, "power": 700.0}
    node = Device("cuda", 80 * 2**30, 8, 4e14, here=False, **links)
    return Scale(recipe("fsdp2", **changes), node)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_nodes_are_never_more_efficient(engine: str) -> None:
    found, kind = scale(), Engine.model_validate(recipe(ENGINES[engine]).engine.model_dump(exclude_unset=True))
    rows = [found.row(nodes, "plain", kind) for nodes in (1, 2, 16, 512)]
    assert [row["devices"] for row in rows] == [8, 16, 128, 4096]
    exposed = [row["exposed_s"] for row in rows]
    assert exposed == sorted(exposed)
    assert exposed[0] > 0
    efficiencies = [row["efficiency"] for row in rows]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert all(0 < one < 1 for one in efficiencies)
    totals = [row["total_bytes"] for row in rows]
    assert totals == sorted(totals, reverse=True)
    for row in rows:
        assert row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_s"])
        assert row["hidden_s"] >= 0
        assert row["joules_per_token"] == pytest.approx(700 * row["devices"] / row["tokens_per_s"])
        assert sum(row["bytes"].values()) == pytest.approx(row["total_bytes"], abs=10)


def test_a_pipeline_over_nodes() -> None:
    found = scale(strategy={"name": "twobp", "stages": 2}, gradient_accumulation_steps=4)
    inside, across = (found.row(nodes, "twobp:stages=2", Engine(name="ddp")) for nodes in (1, 2))
    assert inside["stages"] == {"count": 2, "across_nodes": False}
    assert across["stages"] == {"count": 2, "across_nodes": True}
    assert across["idle_s"] > inside["idle_s"] > 0
    assert inside["sent_bytes"]["send"] == across["sent_bytes"]["send"] == 4 * 16 * SHAPE["hidden_size"] * 4
    assert inside["step_s"] == pytest.approx(inside["compute_s"] + inside["exposed_s"] + inside["idle_s"])


def test_a_batch_that_does_not_divide_is_said() -> None:
    found = scale(global_batch_size=16)
    fits, not_whole = (found.row(nodes, "plain", Engine(name="ddp")) for nodes in (2, 3))
    assert (fits["global_batch"], fits["micro_batches"]) == (16, 1)
    assert not_whole["status"] == "refused"
    assert "global_batch_size=16" in not_whole["why"]


@pytest.mark.parametrize("side", ["gc", "seco"])
def test_exchanges_that_are_not_predicted_are_refused(side: str) -> None:
    row = scale().row(1, side, Engine(name="ddp"))
    assert row["status"] == "refused"
    assert "not predicted" in row["why"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"config_overrides: {json.dumps(SHAPE)}\nmax_length: 16\nnproc: 2\n")
    words = ["plan", str(file), "--nodes", "1,4", "--engines", "ddp", "device.memory=1GiB", "device.flops=1T"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "give device.link=" in shown
    assert "give device.node_link=" in shown
    assert cli.main([*words, "--json", "device.link=1GB", "device.latency=1ms"]) == 0
    result = json.loads(capsys.readouterr().out)
    one, four = result["rows"]
    assert one["step_s"] > 0
    assert (four["step_s"], four["tokens_per_s"], four["efficiency"]) == (None, None, None)
    assert four["sent_bytes"]["all_reduce"] == pytest.approx(one["sent_bytes"]["all_reduce"] * (7 / 8) / (1 / 2))
    assert cli.main([*words, "--fit", str(tmp_path / "out.yaml")]) == 2


@pytest.mark.parametrize("key", ["tensor_parallel", "context_parallel"])
def test_ranks_that_share_a_layer_or_a_sequence_are_refused(key: str) -> None:
    recipe = Recipe.model_validate({"engine": {"name": "fsdp2", key: 2}})
    with pytest.raises(UserError, match=rf"^engine\.{key}=2: a plan does not count"):
        plan_scaling(recipe, device_of({"memory": "80GiB"}, 2), "2", None, None)


@pytest.mark.parametrize("text", ["0", "1,", "two", "1,1", "-1"])
def test_nodes_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UserError, match="--nodes"):
        nodes_of(text)


def test_words_of_links() -> None:
    given = {"memory": "80GiB", "latency": "5us", "node_link": "50GB", "node_latency": "0.02ms", "power": "0.7kW"}
    found = device_of(given, 8)
    assert (found.node_link, found.power) == (5e10, 700)
    assert (found.latency, found.node_latency) == (pytest.approx(5e-6), pytest.approx(2e-5))
    with pytest.raises(UserError, match=r"device\.latency='5'"):
        device_of({"memory": "80GiB", "latency": "5"}, 8)
