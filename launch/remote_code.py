"""Code that comes with a model: run only where the recipe says so and what it is cannot change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distrib.errors import Refused
from distrib.redaction import one_line

if TYPE_CHECKING:
    from launch.recipe import Recipe


def check(recipe: Recipe, where: str) -> None:
    """Before Transformers reads the configuration or the tokenizer, and runs what they name."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = f"model_name_or_path={recipe.model_name_or_path!r}"
    revision = recipe.model_revision or "main"
    try:
        config, _ = PreTrainedConfig.get_config_dict(where, revision=revision)
        tokenizer = get_tokenizer_config(where, revision=revision)
        code = _named(config) + _named(tokenizer)
    except Exception as error:
        if recipe.trust_remote_code:
            raise Refused(f"{name}: what code it comes with cannot be read: {one_line(error, 200)}") from None
        return  # nothing is run, and who needs these files says what is wrong with them
    if not recipe.trust_remote_code:
        # Where Transformers has a class of its own for the model, it takes that.
        if code and str(config.get("model_type")) not in CONFIG_MAPPING:
            raise Refused(
                f"{name} comes with code of its own (auto_map: {code[0]}), which is not run; to run it, read it, set "
                "trust_remote_code=true and, for a hub name, model_revision to a full commit hash"
            )
        return
    for reference in code:
        repository, dashes, _ = reference.partition("--")
        if dashes and repository != recipe.model_name_or_path:
            raise Refused(
                f"{name} names code of another repository (auto_map: {reference}), whose revision is not pinned; "
                "copy the model and that code into one folder"
            )


def _named(config: Any) -> list[str]:
    found = config.get("auto_map") or {}
    values = found.values() if isinstance(found, dict) else [found]
    return [
        one_line(part, 100)
        for value in values
        for part in (value if isinstance(value, list | tuple) else [value])
        if part is not None
    ]


def check_attention(recipe: Recipe, config: Any) -> None:
    """A name with a slash would be fetched from the hub as compiled code."""
    asked = getattr(config, "_attn_implementation", None)
    if isinstance(asked, str) and "/" in asked:
        raise Refused(
            f"model_name_or_path={recipe.model_name_or_path!r}: its configuration asks for attention from the hub "
            f"({one_line(asked, 60)}), which is code that is not run; take that out of the configuration"
        )
