"""One data cache for all tests of this folder, and the data sets and models that many of them train on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from train_cases import answers, pretrained, write_rows


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = os.environ.get("EBBTIDE_CACHE")
    os.environ["EBBTIDE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("EBBTIDE_CACHE")
    if before is not None:
        os.environ["EBBTIDE_CACHE"] = before


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """14 rows: not a multiple of the global batch of 4, so that windows lie across the edges of epochs."""
    return write_rows(tmp_path_factory.mktemp("data") / "answers.jsonl", answers(14))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that Transformers saved, with a head of its own."""
    return pretrained(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
