"""From a recipe to a model: its structure without memory for the weights, and where each weight comes from.

A model is built with its parameters on the meta device, so that no rank ever holds what it does not own. Engines ask
`Weights.fill` for one unit (a block, an embedding, a head) at a time, and shard it before they ask for the next.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distrib.errors import Refused, UserError, choose
from distrib.redaction import one_line
from distrib.topology import Topology
from launch import remote_code
from launch.four_bit import Stored, check_stored, hold_base, stored_in
from launch.known import say_shipped, shipped
from launch.tokenizer import BYTE_VOCABULARY
from strategies.core.edits import base_name
from strategies.lowbit.frozen import Linear4bit, four_bit, quantize

if TYPE_CHECKING:
    from launch.recipe import Recipe

BUILT_IN: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def load_config(recipe: Recipe) -> Any:
    """The model's configuration, with the recipe's overrides; text models with a causal head only."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if recipe.model_name_or_path in BUILT_IN:
        known = BUILT_IN[recipe.model_name_or_path] | {
            "vocab_size": BYTE_VOCABULARY,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 256,
        }
        config = LlamaConfig(**known)
    else:
        config = _named_config(recipe)
    _override(config, recipe.config_overrides)
    if recipe.init == "shrunk":
        from launch.shrink import shrunk

        config = shrunk(recipe, config)
    remote_code.check_attention(recipe, config)
    if stored := stored_in(config):
        check_stored(recipe, stored)
    if type(config) not in AutoModelForCausalLM._model_mapping and not recipe.trust_remote_code:
        raise UserError(
            f"model_name_or_path={recipe.model_name_or_path!r}: {type(config).__name__} is not a causal language "
            "model of text; choose one that AutoModelForCausalLM loads"
        )
    _refuse_impossible(config)
    longest = getattr(config, "max_position_embeddings", None)
    if longest and recipe.max_length > longest:
        raise UserError(f"max_length={recipe.max_length}: this model takes at most {longest} tokens")
    return config


def _named_config(recipe: Recipe) -> Any:
    """Of a folder or of the hub; of a known public model as it is shipped where the hub does not answer, or where only
    its kind matters."""
    from transformers import AutoConfig

    name = recipe.model_name_or_path
    where = _local(name)
    known = shipped(name) if where == name and recipe.model_revision is None else None
    if known is not None and recipe.init == "shrunk":
        return known
    if Path(where, "adapter_config.json").is_file():
        raise UserError(
            f"model_name_or_path={name!r} holds an adapter, not a model: name the model that it adapts, or one that it "
            "was merged into"
        )
    remote_code.check(recipe, where)
    try:
        return AutoConfig.from_pretrained(where, **_hub(recipe))
    except Exception as error:  # Transformers trusts what is in a configuration's fields
        if known is not None and isinstance(error, OSError):
            say_shipped(name)
            return known
        raise UserError(
            f"model_name_or_path={name!r}: {_one_line(error)}; choose {', '.join(BUILT_IN)}, a folder with "
            "config.json, or a hub name"
        ) from None


def _override(config: Any, changes: dict[str, Any]) -> None:
    from huggingface_hub.errors import StrictDataclassError

    for key, value in changes.items():
        if not hasattr(config, key):
            raise choose("config_overrides key", key, sorted(config.to_dict()))
        try:
            setattr(config, key, value)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise UserError(f"config_overrides.{key}={value!r}: {_one_line(error)}") from None
    try:
        # Saving checks the whole, and would be the last to say so.
        config.validate()
    except StrictDataclassError as error:
        raise UserError(f"the model's configuration does not hold together: {_one_line(error)}") from None


def _refuse_impossible(config: Any) -> None:
    """What a model would be built with, and then not be one, or fail in its first step."""
    for key, value in config.to_dict().items():
        if not isinstance(value, int | float):
            continue
        if (key == "num_hidden_layers" and value < 1) or ("drop" in key and not 0 <= value <= 1):
            raise UserError(f"the model's configuration does not hold together: {key}={value}")


def check_vocabulary(config: Any, tokenizer: Any) -> None:
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocab_size={config.vocab_size}: take the "
            "tokenizer that belongs to the model"
        )


def _local(name: str) -> str:
    """A path that exists is a folder; anything that looks like a path but does not exist is the user's mistake."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise UserError(f"model_name_or_path={name!r} is a file: name the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(
            f"model_name_or_path={name!r}: no such folder; choose {', '.join(BUILT_IN)}, "
            "a folder with config.json, or a hub name"
        )
    return name


def _absolute(name: str) -> str:
    """What an adapter remembers of its model: a folder is found from anywhere."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _hub(recipe: Recipe) -> dict[str, Any]:
    return {"revision": recipe.model_revision or "main", "trust_remote_code": recipe.trust_remote_code}


def _one_line(error: Exception) -> str:
    return one_line(error, 200) or type(error).__name__


def build(recipe: Recipe, config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """The model with parameters on the meta device and real buffers, with LoRA when the recipe asks for it.

    Trainable parameters are fp32 (they are the master weights); under `bf16` the frozen ones are bf16.
    `dtype` overrides both. Under `load_in_4bit` the frozen layers' matrices are bytes in any case.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    frozen = recipe.lora_r > 0
    base = dtype or (torch.bfloat16 if recipe.bf16 and frozen else torch.float32)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=base, trust_remote_code=recipe.trust_remote_code)
    except Exception as error:  # of any kind, where a configuration does not fit its model
        raise UserError(
            f"model_name_or_path={recipe.model_name_or_path!r}: no model can be built from its configuration "
            f"({type(error).__name__}: {_one_line(error)})"
        ) from error
    model.tie_weights()
    model.config.use_cache = False
    model.name_or_path = _absolute(recipe.model_name_or_path)
    built = _with_lora(recipe, model, dtype or torch.float32) if frozen else model
    if frozen and recipe.load_in_4bit:
        hold_base(recipe, config, built)
    return built


def _with_lora(recipe: Recipe, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=recipe.lora_target_modules,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        adapted = get_peft_model(model, settings, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UserError(f"lora_target_modules={recipe.lora_target_modules!r}: {_one_line(error)}") from None
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return adapted  # type: ignore[no-any-return]


def has_random_weights(recipe: Recipe) -> bool:
    return recipe.model_name_or_path in BUILT_IN or recipe.init != "pretrained"


def refuse_packing(config: Any) -> None:
    """What is known to carry a state from one packed document to the next; the rest is tried on the model itself."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    kind = mapping.get(type(config), None)
    layers = set(getattr(config, "layer_types", None) or ())
    recurrent = sorted(layers - {"full_attention", "sliding_attention", "chunked_attention"})
    if recurrent or getattr(kind, "_is_stateful", False):
        names = ", ".join(recurrent) or "recurrent"
        raise Refused(
            f"packing=true: the {names} layers of {type(config).__name__} carry a state from one document into the "
            "next; set packing=false"
        )


class Weights:
    """Where every parameter of a model on the meta device comes from: a seed, a folder of safetensors, or the hub.

    Random weights are drawn unit by unit from (seed, the unit's name), so they do not depend on the engine or the
    number of ranks. A checkpoint whose names are the model's own is read tensor by tensor; any other goes through
    Transformers' own conversion on rank 0, which then holds one whole copy in host memory, and is broadcast.
    """

    def __init__(self, recipe: Recipe, config: Any, topology: Topology) -> None:
        self._recipe = recipe
        self._topology = topology
        self._blueprint = build(recipe.model_copy(update={"lora_r": 0}), config)
        self._files: dict[str, Path] = {}
        self._buffers: set[str] = set()
        self._converted: Mapping[str, Tensor] | None = None
        self._random = has_random_weights(recipe)
        self._stored = Stored(self._files, self._tensor, f"model_name_or_path={recipe.model_name_or_path!r}")
        if not self._random:
            self._open()

    def _open(self) -> None:
        folder = self._download()
        index = folder / "model.safetensors.index.json"
        names = _shards(index) if index.exists() else ["model.safetensors"]
        for file in (folder / name for name in names):
            self._files |= dict.fromkeys(self._tensors(file), file)
        needed = {name for name, _ in self._blueprint.named_parameters()}
        buffers = {name for name, _ in self._blueprint.named_buffers()} & self._blueprint.state_dict().keys()
        if needed <= self._files.keys():
            self._buffers = buffers & self._files.keys()
        elif stored_in(self._blueprint.config):
            raise self._refused(f"{min(needed - self._files.keys())} is not in it under this name")
        else:
            self._convert(folder)
            self._buffers = buffers

    def _tensors(self, file: Path) -> list[str]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, "pt") as tensors:
                return list(tensors.keys())
        except FileNotFoundError:
            raise UserError(
                f"model_name_or_path={self._recipe.model_name_or_path!r} has no {file.name}: give a folder "
                "with its weights as safetensors, or `init: random`"
            ) from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read: {_one_line(error)}") from None

    def _download(self) -> Path:
        where = _local(self._recipe.model_name_or_path)
        if Path(where).is_dir():
            return Path(where)
        from huggingface_hub import snapshot_download

        try:
            patterns = ["*.json", "*.safetensors", "*.model", "*.txt"]
            return Path(snapshot_download(where, revision=self._recipe.model_revision, allow_patterns=patterns))
        except OSError as error:
            raise UserError(f"model_name_or_path={where!r}: {_one_line(error)}") from None

    def _convert(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        # The ranks of a pipeline ask for different weights, so each converts by itself.
        if self._topology.main or self._topology.stages > 1:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=self._blueprint.config,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                use_safetensors=True,
                **_hub(self._recipe),
            )
            for name, saved, wanted in sorted(report["mismatched_keys"]):
                raise self._misshapen(name, saved, wanted)
            if report["missing_keys"]:
                raise UserError(
                    f"model_name_or_path={self._recipe.model_name_or_path!r} lacks {len(report['missing_keys'])} "
                    f"weights, the first is {min(report['missing_keys'])}"
                )
            self._converted = model.state_dict()
        else:
            self._converted = {}

    def fill(self, model: nn.Module, unit_name: str) -> None:
        """Give every meta parameter below `unit_name` its values, on the CPU; shared parameters stay shared."""
        unit = model.get_submodule(unit_name)
        drawn = self._draw(unit_name) if self._random else {}
        for name, held in four_bit(unit, unit_name):
            self._fill_4bit(held, base_name(f"{name}.weight"), drawn)
        owners = _owners(model)
        for name, old in list(unit.named_parameters(prefix=unit_name)):
            if old.device.type != "meta":
                continue
            if "lora_" in name:
                value = _lora(name, old, self._recipe.seed)
            else:
                value = drawn[base_name(name)] if self._random else self._read(base_name(name), old)
            new = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
            for owner, leaf in owners[id(old)]:
                owner._parameters[leaf] = new
        for name, buffer in unit.named_buffers(prefix=unit_name):
            if base_name(name) in self._buffers:
                buffer.copy_(self._read(base_name(name), buffer))

    def _fill_4bit(self, held: Linear4bit, name: str, drawn: Mapping[str, Tensor]) -> None:
        """Codes that are there are taken as they are, anything else is quantized from the precision that it has."""
        if name in self._stored:
            stored = self._stored.layer(name)
            if stored.form != held.form:
                raise self._refused(f"{name} is {stored.form} there, the configuration wants {held.form}")
            held.weight, held.scales = stored.weight, stored.scales
        elif not self._random and stored_in(self._blueprint.config):
            raise self._refused(f"{name} is not in 4 bits there")
        else:
            like = torch.empty(held.out_features, held.in_features, device="meta")
            value = drawn[name] if self._random else self._read(name, like)
            held.hold(quantize(value, held.kind, held.double_quant))

    def _refused(self, why: str) -> UserError:
        return Refused(
            f"model_name_or_path={self._recipe.model_name_or_path!r} holds 4-bit weights that cannot be taken as they "
            f"are: {why}; name the model that it was made from"
        )

    def _draw(self, unit_name: str) -> dict[str, Tensor]:
        name = base_name(unit_name)
        unit = copy.deepcopy(self._blueprint.get_submodule(name))
        for module in unit.modules():
            for leaf, old in module._parameters.items():
                if old is not None:
                    module._parameters[leaf] = nn.Parameter(torch.empty_like(old, device="cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_key(self._recipe.seed, name))
            with torch.no_grad():
                unit.apply(self._blueprint._init_weights)  # type: ignore[arg-type]
        return {key: value.data for key, value in unit.named_parameters(prefix=name)}

    def _read(self, name: str, like: Tensor) -> Tensor:
        if name in self._stored:
            value = self._stored.layer(name).dequantized(torch.float32)
        elif self._converted is None:
            value = self._tensor(name)
        else:
            value = self._broadcast(name, like)
        if value.shape != like.shape:
            raise self._misshapen(name, value.shape, like.shape)
        return value

    def _tensor(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            value: Tensor = file.get_tensor(name)
        return value

    def _misshapen(self, name: str, saved: torch.Size, wanted: torch.Size) -> UserError:
        return UserError(
            f"model_name_or_path={self._recipe.model_name_or_path!r}: {name} has shape {tuple(saved)}, the "
            f"configuration wants {tuple(wanted)}"
        )

    def _broadcast(self, name: str, like: Tensor) -> Tensor:
        assert self._converted is not None
        if self._topology.world == 1 or self._topology.stages > 1:
            return self._converted[name].data
        import torch.distributed as dist

        value = self._converted[name].data if self._topology.main else torch.empty(like.shape)
        value = value.to(self._topology.device, like.dtype)
        dist.broadcast(value, src=0)
        return value.cpu()


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not names or any(Path(name).name != name or name == ".." for name in names):
            raise ValueError(f"weight_map must name files beside it, not {names}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read: {_one_line(error)}") from None
    return names


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (module, attribute) that holds a parameter, by the parameter's identity."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, leaf))
    return owners


def _lora(name: str, like: Tensor, seed: int) -> Tensor:
    """LoRA as its paper starts it: A uniform as a linear layer's weight, B zero."""
    value = torch.zeros(like.shape)
    if "lora_A" in name or "lora_embedding_A" in name:
        generator = torch.Generator().manual_seed(_key(seed, name))
        nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
    return value


def _key(seed: int, name: str) -> int:
    from hashlib import blake2b

    return int.from_bytes(blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little") >> 1
