"""`--shrink`: the same recipe with tiny sizes, to see it run before anything is fetched, rented or waited for.

What makes a recipe what it is stays: the kind of model and its structure (shared keys and values, experts, windows,
tied embeddings, activation), strategy, engine, objective, adapter, packing. Sizes, data from the hub and numbers of
ranks and steps become small; what cannot stay is said.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from distrib.errors import Refused
from launch.recipe import BUILT_IN_SETS, Recipe, Source

if TYPE_CHECKING:
    from strategies import Strategy

RANKS, STEPS, LENGTH, CHUNK = 2, 3, 64, 16
ROWS, ACCUMULATION, PIPELINED = 2, 2, 4
"""Rows of a micro-batch; micro-batches where there are several, and in a pipeline."""
LAYERS, HEAD, MULTIPLE, WINDOW, EXPERTS = 4, 16, 32, 32, 4
MOST_PARAMETERS = 16_000_000
SCALED = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
COUNTED = ("num_local_experts", "num_experts", "n_routed_experts")
TOKENS = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}


def load_shrunk(path: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[str]]:
    """The shrunk recipe of a file, which the overrides change in turn, and what is to be said about it."""
    from launch.recipe_file import load_recipe, recipe_of

    recipe = load_recipe(path)
    changes, lost = changed(recipe)
    given, whole = recipe.model_dump(mode="json", exclude_unset=True), recipe.model_dump(mode="json")
    what = [f"{key}={_shown(value)}" for key, value in changes.items() if value not in (given.get(key), whole[key])]
    return recipe_of(given | changes, path, overrides), [f"shrunk: {', '.join(what)}", *lost]


def _shown(value: Any) -> str:
    from launch.sides import side_of

    if isinstance(value, list):
        return side_of(value)
    return side_of([value]) if isinstance(value, dict) and "name" in value else str(value)


def changed(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """The keys that shrinking changes, and what of the recipe it does not keep."""
    import strategies

    chosen = strategies.build([section.model_dump() for section in recipe.strategy])
    staged = any(strategy.pipeline(recipe.nproc) > 1 for strategy in chosen)
    split = min(recipe.engine.tensor_parallel, RANKS)
    ranks = max(min(recipe.nproc, RANKS), split * (RANKS if staged else 1))
    replicas = ranks // (split * (RANKS if staged else 1))
    lost = [_lost_replicas(recipe, chosen)] if replicas == 1 else []
    sections = [
        _section(given.model_dump(), strategy, lost) for given, strategy in zip(recipe.strategy, chosen, strict=True)
    ]
    changes: dict[str, Any] = {
        "init": "shrunk",
        "dataset": [_source(source, recipe, lost) for source in recipe.dataset],
        "max_length": min(recipe.max_length, LENGTH),
        "strategy": sections,
        "nproc": ranks,
        "max_steps": STEPS,
        "save_steps": 2,
        "output_dir": f"{recipe.output_dir.rstrip('/')}-shrunk",
    }
    if split > 1:
        changes["engine"] = recipe.engine.model_dump(exclude_unset=True) | {"tensor_parallel": split}
    changes |= _batch(recipe, replicas, staged) | _smaller(recipe, ranks)
    if recipe.eval_dataset:
        changes["eval_dataset"] = [_source(source, recipe, lost) for source in recipe.eval_dataset]
    if isinstance(recipe.resume_from_checkpoint, str):
        changes["resume_from_checkpoint"] = True
        lost.append("it starts anew, not from the checkpoint of resume_from_checkpoint")
    return changes, [line for line in dict.fromkeys(lost) if line]


def _lost_replicas(recipe: Recipe, chosen: Sequence[Strategy]) -> str:
    group = recipe.engine.tensor_parallel
    for strategy in chosen:
        group *= strategy.pipeline(recipe.nproc // group)
    if recipe.nproc // group < 2:
        return ""
    return f"its {recipe.nproc // group} replicas are one: the model itself is split over all ranks"


def _section(given: dict[str, Any], strategy: Strategy, lost: list[str]) -> dict[str, Any]:
    """A strategy's section for short sequences and few ranks."""
    if hasattr(strategy, "chunk"):
        given["chunk"] = CHUNK
    if isinstance(given.get("budget"), str):
        lost.append(f"strategy.budget={given['budget']} is half of what plain training holds")
        given["budget"] = 0.5
    if given.get("stages") is not None:
        given["stages"] = min(given["stages"], RANKS)
    if given.pop("layers", None) is not None:
        lost.append("strategy.layers is left out: layers are dealt out evenly")
    if os.path.exists(given.get("schedule", "")):
        lost.append(f"strategy.schedule={given['schedule']} is for other ranks: h1")
        given["schedule"] = "h1"
    return given


def _source(source: Source, recipe: Recipe, lost: list[str]) -> dict[str, Any]:
    """What is on this machine stays; of the hub's, a stream for sft counts as text, anything else as additions."""
    from launch.data.sources import looks_like_a_path

    if source.name in BUILT_IN_SETS or os.path.exists(source.name) or looks_like_a_path(source.name):
        return source.model_dump(exclude_unset=True)
    name = "stdlib" if recipe.streaming and recipe.objective.name == "sft" else "additions"
    lost.append(f"{source.name} is not fetched: dataset {name} takes its place")
    return {"name": name} | source.model_dump(include={"weight"}, exclude_defaults=True)


def _batch(recipe: Recipe, replicas: int, staged: bool) -> dict[str, Any]:
    rows = min(recipe.per_device_train_batch_size, ROWS)
    steps = recipe.gradient_accumulation_steps
    several = steps > 1 or (recipe.global_batch_size or 0) > recipe.per_device_train_batch_size * recipe.nproc
    micro_batches = (PIPELINED if staged else ACCUMULATION) if several else 1
    changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}
    if recipe.global_batch_size is not None:
        changes["global_batch_size"] = rows * replicas * micro_batches
    return changes


def _smaller(recipe: Recipe, ranks: int) -> dict[str, Any]:
    """Keys that say how much or how often, where they are given."""
    smaller: dict[str, Any] = {
        "lora_r": 4,
        "warmup_steps": 1,
        "logging_steps": 1,
        "eval_steps": 2,
        "eval_rows": 4,
        "eval_samples": 1,
        "min_nproc": ranks,
    }
    found = {key: min(value, most) for key, most in smaller.items() if (value := getattr(recipe, key))}
    if recipe.profile:
        found["profile"] = {"steps": [2, 2]}
    return {key: value for key, value in found.items() if key in recipe.model_fields_set}


def shrunk(recipe: Recipe, config: Any) -> Any:
    """The configuration of a model of the same kind with tiny sizes; layers enough for one of each kind."""
    from launch.forecast import shallow

    full = config.num_hidden_layers
    lists = [value for value in config.to_dict().values() if isinstance(value, list) and len(value) == full]
    layers = next(n for n in range(1, full + 1) if all(set(map(str, x[:n])) == set(map(str, x)) for x in lists))
    made = shallow(config, full, min(full, max(layers, LAYERS)))
    for key, value in _sizes(config).items():
        if getattr(config, key, None) is not None or key in TOKENS:
            setattr(made, key, value)
    made.validate()
    _refuse_large(recipe, made)
    return made


def _sizes(config: Any) -> dict[str, Any]:
    from launch.tokenizer import BYTE_VOCABULARY

    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise Refused(f"init='shrunk': {config.model_type} has no attention heads, by which its sizes would be made")
    shared = getattr(config, "num_key_value_heads", None) or heads
    few = min(shared, 2)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    small = few * (heads // shared)
    ratio = config.hidden_size / (heads * width)
    hidden = small * HEAD if ratio == 1 else _rounded(small * HEAD * ratio)
    sizes = {"num_attention_heads": small, "num_key_value_heads": few, "head_dim": HEAD, "hidden_size": hidden}
    for key in SCALED:
        if isinstance(size := getattr(config, key, None), int):
            sizes[key] = _rounded(size * hidden / config.hidden_size)
    sizes |= {key: min(getattr(config, key, None) or 0, EXPERTS) for key in COUNTED}
    sizes["num_experts_per_tok"] = min(getattr(config, "num_experts_per_tok", None) or 0, EXPERTS // 2)
    sizes["sliding_window"] = min(getattr(config, "sliding_window", None) or 0, WINDOW)
    return sizes | {"vocab_size": BYTE_VOCABULARY} | TOKENS


def _rounded(size: float) -> int:
    return max(1, round(size / MULTIPLE)) * MULTIPLE


def _refuse_large(recipe: Recipe, config: Any) -> None:
    """Of a family whose sizes have other names."""
    from launch.models import build

    count = sum(parameter.numel() for parameter in build(recipe, config).parameters())
    if count > MOST_PARAMETERS:
        raise Refused(
            f"init='shrunk': {config.model_type} still has {count / 1e6:.0f} million parameters, since some of its "
            "sizes have names of their own; make those small with config_overrides"
        )
