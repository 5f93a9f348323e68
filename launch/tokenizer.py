"""The tokenizer of a recipe: bytes for the built-in models, otherwise the one that lies beside the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.errors import UserError
from distrib.redaction import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from launch.recipe import Recipe

BYTE_MODELS = ("tiny", "small")
BYTE_VOCABULARY = 264
"""256 bytes and five special tokens, rounded up to a multiple of eight."""

BYTE_TEMPLATE = """
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{- raise_exception("role '" ~ message.role ~ "': choose system, user, assistant") -}}
{%- endif -%}
{{- '<|' ~ message.role ~ '|>' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content ~ '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message.content ~ '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, always with a padding token.

    Where the model names none, its end token pads. That is safe because labels come from masks, never from a
    comparison with the padding token, so that an end token that ends a document is still learned.
    """
    if recipe.model_name_or_path in BYTE_MODELS or recipe.init == "shrunk":
        return byte_tokenizer()
    tokenizer = _pretrained(recipe)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Byte b is token b, so any UTF-8 text comes back exactly; five special tokens follow.

    It is byte-level BPE without merges, which Transformers can save and `AutoTokenizer` can load like any
    other.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(_byte_characters(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = BYTE_TEMPLATE
    return tokenizer


def _byte_characters() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte: itself where printable, else one from 256
    upwards."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(character): character for character in alphabet if ord(character) < 256}
    shifted = iter(character for character in alphabet if ord(character) >= 256)
    return {own.get(byte) or next(shifted): byte for byte in range(256)}


def _pretrained(recipe: Recipe) -> Any:
    from transformers import AutoTokenizer

    from launch import remote_code

    name = recipe.model_name_or_path
    path = Path(name).expanduser()
    remote_code.check(recipe, str(path) if path.is_dir() else name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else name,
            revision=recipe.model_revision or "main",
            trust_remote_code=recipe.trust_remote_code,
        )
    except Exception as error:
        why = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(
            f"model_name_or_path={name!r} has no tokenizer that loads ({why}); choose "
            f"{', '.join(BYTE_MODELS)}, a folder with the tokenizer's files beside config.json, or a hub name"
        ) from None
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(
            f"model_name_or_path={name!r} has no tokenizer files: copy tokenizer.json and "
            "tokenizer_config.json beside its config.json"
        )
    return tokenizer
