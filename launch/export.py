"""From a run to a folder that Transformers (or PEFT) loads."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrib import checkpoint
from distrib.contracts import Engine
from distrib.engines import Settings, make
from distrib.errors import UserError
from distrib.topology import Topology
from launch.models import Weights, build, has_random_weights, load_config
from launch.recipe_file import load_recipe
from launch.tokenizer import load_tokenizer
from strategies.lowbit.frozen import restored

if TYPE_CHECKING:
    from launch.recipe import Recipe

log = logging.getLogger("ebbtide")
LOCK = "recipe.lock.yaml"


def export(run: Path, output: Path | None, merge: bool) -> dict[str, Any]:
    """Write the newest checkpoint of `run`; with `merge`, LoRA weights are added to the ones they adapt."""
    if not (run / LOCK).exists():
        raise UserError(f"{run} is not a run: it has no {LOCK}")
    recipe = load_recipe(str(run / LOCK))
    if merge and not recipe.lora_r:
        raise UserError("--merge: this run trained the whole model (lora_r=0), there is nothing to merge")
    source, notes = checkpoint.newest(run)
    for note in notes:
        log.warning("%s", note)
    if source is None:
        raise UserError(f"{run} has no checkpoint yet: train for save_steps={recipe.save_steps} steps first")
    target = output or run / ("merged" if merge else "final")
    if os.path.lexists(target) and output is not None:
        raise UserError(f"--output {target} exists: name a folder that does not")
    model = _load(recipe, source)
    config = load_config(recipe)
    if merge:
        # Into 4 bits again what was learned could be rounded away.
        restored(model, _precision(recipe))
        vars(config).pop("quantization_config", None)
        merged = model.merge_and_unload()  # type: ignore[operator]
        write_folder(recipe.model_copy(update={"lora_r": 0}), config, merged.state_dict(), target)
    else:
        write_folder(recipe, config, model.state_dict(), target)
    step = checkpoint.read_manifest(source).progress.step
    result = {"folder": str(target), "step": step, "kind": _kind(recipe, merge)}
    if merge and recipe.load_in_4bit:
        result["base"] = f"decoded from {recipe.bnb_4bit_quant_type}, merged in {_precision(recipe)}"
    return result


def _precision(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.bf16 else torch.float32


def _kind(recipe: Recipe, merge: bool) -> str:
    return "adapter" if recipe.lora_r and not merge else "model"


def _load(recipe: Recipe, source: Path) -> nn.Module:
    """The run's model as it was at a checkpoint, whole, on the CPU."""
    model, engine = _untrained(recipe, load_config(recipe))
    if checkpoint.read_manifest(source).engine == "zero":
        from distrib.engines.zero import read_weights

        model.load_state_dict(read_weights(source / "engine"), strict=False)
    else:
        engine.load(source / "engine")
    return model


def _untrained(recipe: Recipe, config: Any) -> tuple[nn.Module, Engine]:
    topology = Topology()
    model = build(recipe, config)
    return model, make("ddp", model, Weights(recipe, config, topology).fill, topology, Settings(optimizer=None))


def write_folder(recipe: Recipe, config: Any, state: dict[str, Tensor], folder: Path) -> None:
    """`state` in Hugging Face's layout, with the tokenizer; the folder appears when it is whole.

    An adapter of random weights comes with those weights, which nobody else could make.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    model: Any = build(recipe, config, next(iter(state.values())).dtype)
    if recipe.lora_r and has_random_weights(recipe):
        plain = recipe.model_copy(update={"lora_r": 0})
        base, _ = _untrained(recipe, config)
        restored(base, _precision(recipe))
        write_folder(plain, config, base.unload().state_dict(), draft / "base")  # type: ignore[operator]
        model.peft_config["default"].base_model_name_or_path = str((folder / "base").resolve())
    model.config.use_cache = True
    # PEFT would ask the hub whether the vocabulary grew, and save the embeddings if in doubt.
    adapter = {"save_embedding_layers": False} if recipe.lora_r else {}
    model.save_pretrained(draft, state_dict=dict(state), **adapter)
    load_tokenizer(recipe).save_pretrained(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
