"""What must not be written or said: values under names of secrets, credentials in addresses, and both wherever they
turn up again. Everything that leaves the process as text goes through here."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TextIO

HIDDEN = "(hidden)"
SHORTEST = 6
"""Characters of a value that is hidden wherever it turns up; a shorter one, only beside its name."""

_SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
# Words of tokenizers and models: `pad_token`, and the numbers of num_key_value_heads, image_token_index, key_bias.
_PUBLIC = re.compile(r"^(pad|eos|bos|unk|sep|cls|mask|(additional|extra)_special)_tokens?$", re.IGNORECASE)
_NUMERIC = re.compile(r"secret|password|(token|key)$", re.IGNORECASE)
_VALUE = r"\(hidden\)|'[^']*'|\"[^\"]*\"|[^\s,;)}\]]+"
_ASSIGNED = re.compile(
    rf"([\w.-]+)(\s*=\s*)({_VALUE})|(--[\w.-]+)(\s+)({_VALUE})|(?<=['\"])([\w.-]+)(['\"]\s*:\s*)({_VALUE})"
)
_ADDRESS = re.compile(r"(\w://)[^/\s'\"]+@")
_QUERY = re.compile(r"([?&][\w.-]*(?:token|key|secret|password)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
# where a secret lies, which is none itself: HF_TOKEN_PATH=/home/me/token
_PLACE = re.compile(r"(path|file|dir|home)$", re.IGNORECASE)
_learned: set[str] = set()


def learn(value: Any, name: str = "") -> None:
    """Remember, until the command ends, the values of a recipe that stand under names of secrets."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            learn(item, _below(name, key))
    elif isinstance(value, list):
        for item in value:
            learn(item, name)
    elif isinstance(sys.stdout, _Cleaned) and _is_secret(name, value):
        _learned.add(str(value))


def clean(value: Any, name: str = "") -> Any:
    """`value` without secrets, in mappings and in texts such as `hub_token=abc`; all else is as it was."""
    if isinstance(value, Mapping):
        return {key: clean(item, _below(name, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [clean(item, name) for item in value]
    if _is_secret(name, value):
        return HIDDEN
    return clean_text(value) if isinstance(value, str) else value


def _below(name: str, key: object) -> str:
    """What a value below `key` goes by: a secret's name holds for all that is inside."""
    return str(key) if _names_secret(key) or not _names_secret(name) else name


def _is_secret(name: str, value: Any) -> bool:
    if not _names_secret(name) or isinstance(value, bool) or value is None:
        return False
    return isinstance(value, str) or (isinstance(value, int | float) and bool(_NUMERIC.search(name)))


def clean_texts(value: Any) -> Any:
    """As `clean`, for our own figures, whose keys (`tokens_per_s`) are no secrets."""
    if isinstance(value, Mapping):
        return {key: clean_texts(item) for key, item in value.items()}
    if isinstance(value, str):
        return clean_text(value)
    return [clean_texts(item) for item in value] if isinstance(value, list | tuple) else value


def clean_text(text: str) -> str:
    return _ASSIGNED.sub(_hide, without_values(text))


def one_line(text: object, longest: int | None = None) -> str:
    """One line of a terminal: without secrets, line breaks and control characters; cut only then."""
    printable = "".join(c if c.isprintable() else " " for c in clean_text(str(text)))
    said = " ".join(printable.split())
    return said if longest is None or len(said) <= longest else f"{said[: longest - 3]}..."


def same(kept: Any, now: Any) -> bool:
    """Whether `kept` can be what is left of `now`: a hidden part may have been anything."""
    if isinstance(kept, str) and HIDDEN in kept:
        return re.fullmatch(".*".join(map(re.escape, kept.split(HIDDEN))), str(now), re.DOTALL) is not None
    if isinstance(kept, Mapping) and isinstance(now, Mapping):
        return kept.keys() == now.keys() and all(same(kept[key], now[key]) for key in kept)
    if isinstance(kept, list | tuple) and isinstance(now, list | tuple):
        return len(kept) == len(now) and all(map(same, kept, now))
    return bool(kept == now)


@contextmanager
def cleaned_output() -> Iterator[None]:
    """A command: whatever Python prints in it, tracebacks and libraries included, is without known secrets."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Cleaned(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        _learned.clear()


class _Cleaned:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(without_values(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for text in lines:
            self.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@lru_cache
def _names_secret(name: object) -> bool:
    return bool(_SECRET.search(str(name))) and not _PUBLIC.search(str(name))


def without_values(text: str) -> str:
    """As `clean_text` for text that may be a program's: nothing is concluded from `name=value`."""
    for value in sorted(_known(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _TOKEN.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", _ADDRESS.sub(rf"\1{HIDDEN}@", text)))


def _known() -> set[str]:
    """Secret values, in all their forms."""
    found = {
        value
        for name, value in os.environ.items()
        if _names_secret(name) and not (value.startswith(("/", "~")) and _PLACE.search(name))
    }
    return {form for value in found | _learned for form in _forms(value)}


@lru_cache
def _forms(value: str) -> tuple[str, ...]:
    """Also as it looks on one line, quoted by Python or in an address."""
    from urllib.parse import quote

    forms = value, " ".join(value.split()), repr(value)[1:-1], quote(value, safe="")
    return tuple(form for form in forms if len(form) >= SHORTEST)


def _hide(found: re.Match[str]) -> str:
    key, between, value = next(found.group(first, first + 1, first + 2) for first in (1, 4, 7) if found.group(first))
    plain = value.strip("'\"")
    if plain.lower() in ("true", "false", "none", "null"):
        return found.group()
    number = 0 if re.fullmatch(r"[-+.\de]+", plain) else plain
    return key + between + HIDDEN if _is_secret(key, number) else found.group()
