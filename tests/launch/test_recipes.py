"""Every recipe of `recipes/`: its parts go together, it runs shrunk on two ranks, and its plan is on the page."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import lines, trained

import strategies
from distrib.engines import check as check_engine
from distrib.errors import Refused, UserError
from distrib.topology import Topology
from launch import cli, known, recipe_tables, shrink
from launch.device import Device, split_words
from launch.models import load_config, refuse_packing
from launch.plan import Planner
from launch.recipe import Engine, Recipe
from launch.recipe_file import global_batch, load_recipe
from launch.settings import settings_of
from launch.shrink import changed, load_shrunk

ROOT = Path(__file__).parents[2]
PATHS = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
TABLED = [path.stem for path in recipe_tables.tabled(ROOT / "recipes")]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
DIFFERENT = ("gemma-2-9b-lora", "qwen3-30b-a3b-lora", "qwen3-14b-twobp-8", "llama-8b-dpo")
KEPT = (
    "objective",
    "packing",
    "bf16",
    "load_in_4bit",
    "lora_target_modules",
    "optimizer",
    "streaming",
    "learning_rate",
)


def ranks_of(name: str, recipe: Recipe) -> int:
    """As many as its plan is for."""
    plans = [line for line in recipe_tables.comments(PATHS[name])[1] if line.startswith(recipe_tables.PLAN)]
    words = split_words(plans[0].split()[3:])[0] if plans else {}
    return int(words.get("count", recipe.nproc))


@pytest.mark.parametrize("name", PATHS)
def test_what_it_asks_for_goes_together(name: str) -> None:
    recipe = load_recipe(str(PATHS[name]))
    chosen = strategies.build([section.model_dump() for section in recipe.strategy])
    topology = strategies.staged(chosen, Topology(world=ranks_of(name, recipe), tensor=recipe.engine.tensor_parallel))
    config = load_config(recipe)
    strategies.check(chosen, config, topology, recipe.compile)
    check_engine(recipe.engine.name, settings_of(recipe), topology)
    if recipe.packing:
        refuse_packing(config)
    assert global_batch(recipe, topology.data_world) >= 1
    assert recipe.output_dir == f"runs/{name}"


def kinds(config: Any) -> dict[str, Any]:
    """What makes a model what it is."""
    experts = next((key for key in ("num_local_experts", "num_experts") if getattr(config, key, None)), None)
    shared = {key: getattr(config, key) for key in ("tie_word_embeddings", "hidden_act", "hidden_activation")
              if hasattr(config, key)}  # fmt: skip
    return shared | {
        "type": config.model_type,
        "group": config.num_attention_heads // config.num_key_value_heads,
        "window": getattr(config, "sliding_window", None) is not None,
        "layers": set(getattr(config, "layer_types", None) or ()),
        "experts": experts,
        "rope": getattr(config, "rope_parameters", None),
    }


@pytest.mark.parametrize("name", PATHS)
def test_shrunk_it_is_the_same_with_tiny_sizes(name: str) -> None:
    recipe, (shrunk, notes) = load_recipe(str(PATHS[name])), load_shrunk(str(PATHS[name]))
    assert kinds(load_config(shrunk)) == kinds(load_config(recipe))
    assert [one.name for one in shrunk.strategy] == [one.name for one in recipe.strategy]
    assert shrunk.engine == recipe.engine
    assert {key: getattr(shrunk, key) for key in KEPT} == {key: getattr(recipe, key) for key in KEPT}
    assert bool(shrunk.lora_r) == bool(recipe.lora_r)
    assert shrunk.output_dir == f"runs/{name}-shrunk"
    assert shrunk.nproc == min(recipe.nproc, 2)
    gone = [source.name for source in recipe.dataset if source not in shrunk.dataset]
    assert all(any(source in note for note in notes) for source in gone)
    assert load_shrunk(str(PATHS[name]), ["max_steps=7", "output_dir=x"])[0].model_dump() == shrunk.model_dump() | {
        "max_steps": 7,
        "output_dir": "x",
    }


@pytest.mark.parametrize(
    "name", [name if name in DIFFERENT else pytest.param(name, marks=pytest.mark.slow) for name in PATHS]
)
def test_shrunk_it_trains_on_two_ranks(tmp_path: Path, name: str) -> None:
    run = tmp_path / name
    recipe, _ = load_shrunk(str(PATHS[name]), ["energy.idle_s=0", f"output_dir={run}"])
    trained(recipe, 2)
    losses = [line["loss"] for line in lines(run)]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert (run / "final").is_dir()


def test_what_cannot_stay_is_said(tmp_path: Path) -> None:
    schedule = tmp_path / "mine.schedule"
    schedule.write_text("")
    strategy = {"name": "twobp", "stages": 4, "layers": [1, 1, 1, 1], "schedule": str(schedule)}
    changes, lost = changed(
        Recipe(nproc=8, strategy=[strategy, {"name": "recompute", "policy": "auto", "budget": "9GiB"}])
    )
    assert changes["strategy"][0] == {"name": "twobp", "stages": 2, "schedule": "h1"}
    assert changes["strategy"][1]["budget"] == 0.5
    said = "\n".join(lost)
    for what in ("2 replicas", "layers", str(schedule), "budget=9GiB"):
        assert what in said
    changes, lost = changed(Recipe(nproc=8, engine=Engine(name="fsdp2", tensor_parallel=8)))
    assert (changes["nproc"], changes["engine"]["tensor_parallel"], lost) == (2, 2, [])


def test_ranks_shrink_as_the_command_does(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    started: list[Any] = []
    monkeypatch.setattr(cli, "spawn", lambda words, ranks, *_: started.append((words, ranks)) or 0)
    path = str(PATHS["llama-8b-lora"])
    assert cli.main(["train", path, "--shrink", "lora_r=2"]) == 0
    assert started == [(["train", path, "--shrink", "lora_r=2"], 2)]
    assert "HuggingFaceH4/ultrachat_200k is not fetched" in capsys.readouterr().err


def test_data_of_a_shrunk_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", str(PATHS["llama-8b-dpo"]), "--shrink", "--count", "1", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["samples"]


def test_a_family_with_other_names_for_its_sizes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(Refused, match="mamba has no attention heads"):
        load_config(Recipe(model_name_or_path=str(tmp_path), init="shrunk"))
    monkeypatch.setattr(shrink, "MOST_PARAMETERS", 100_000)
    with pytest.raises(Refused, match="config_overrides"):
        load_config(Recipe(init="shrunk"))


def test_shipped_sizes_stand_in_for_the_hub_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    known.say_shipped.cache_clear()
    with caplog.at_level(logging.WARNING, "ebbtide.known"):
        config = load_config(Recipe(model_name_or_path="Qwen/Qwen3-8B"))
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 36)
    assert "Qwen/Qwen3-8B: the hub does not give its configuration" in caplog.text
    for other in (
        {"model_name_or_path": "Qwen/Qwen3-9B"},
        {"model_name_or_path": "Qwen/Qwen3-8B", "model_revision": "a"},
    ):
        with pytest.raises(UserError, match="hub name"):
            load_config(Recipe(**other))


SIZES = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2-9b": 9_241_705_984,
}


@pytest.mark.parametrize("name", SIZES)
def test_shipped_sizes_make_the_published_number_of_parameters(name: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known.shipped(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]


@pytest.mark.slow
def test_packed_rows_stream_as_long_ones_do() -> None:
    """A plan must not take whole masks for layers that run in chunks."""
    totals = []
    for packing in (False, True):
        strategy = {"name": "streambp", "chunk": 1024}
        recipe = Recipe(max_length=4096, packing=packing, strategy=strategy, config_overrides={"num_hidden_layers": 2})
        row = Planner(recipe, Device("cuda", 2**36, 1, 1e12, here=False)).row("streambp:chunk=1024", recipe.engine)
        totals.append(row["total_bytes"])
    assert totals[1] == pytest.approx(totals[0], rel=0.05)


@pytest.mark.parametrize("name", TABLED)
def test_the_page_has_its_section(name: str) -> None:
    text, commands = recipe_tables.comments(PATHS[name])
    section = PAGE.split(f"## {name}\n")[1].split("\n## ")[0]
    assert text in section
    assert all(command in section for command in commands)
    assert "| fits |" in section


def test_a_section_is_renewed_and_the_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_tables, "section", lambda path: f"## {path.stem}\n\nnew\n")
    name = TABLED[3]
    again = recipe_tables.rewrite(PAGE, [PATHS[name]])
    assert f"## {name}\n\nnew\n" in again
    assert [line for line in again.splitlines() if line.startswith("## ")] == [
        line for line in PAGE.splitlines() if line.startswith("## ")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLED)
def test_the_page_is_what_plan_says(name: str) -> None:
    assert recipe_tables.rewrite(PAGE, [PATHS[name]]) == PAGE, "run: python -m launch.recipe_tables docs/recipes.md"
