"""Input that is wrong by construction: one line says so, nothing of it runs, nothing is written elsewhere."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile_data import wrong_data
from hostile_folders import (
    CANARY,
    LINKED,
    NAMES,
    PLANTED,
    WRONG_MODELS,
    Planted,
    bomb,
    edit,
    plant_link,
    plant_names,
    put,
)
from hostile_recipes import wrong_recipe
from page_cases import run_folder
from train_cases import contents

from launch import cli
from launch.data import sources

RECIPES, DATA = 300, 100
RECIPE = "max_length: 32\nmax_steps: 1\nverify: false\ndataset: ./good.jsonl\nenergy: {idle_s: 0}\noutput_dir: runs/x\n"


def slices(count: int) -> list[object]:
    """Every third case, and the others where time allows."""
    return [range(0, count, 3), pytest.param([i for i in range(count) if i % 3], marks=pytest.mark.slow)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with a recipe and its data."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("r.yaml").write_text(RECIPE)
    Path("good.jsonl").write_text('{"text": "a row"}\n')
    Path("chat.jsonl").write_text(json.dumps({"messages": [{"role": "assistant", "content": "b"}]}) + "\n")
    return folder


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends with."""
    code = cli.main(words)
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if not line.startswith("data: ")]
    assert (code, out, len(said)) == (2, "", 1), (code, out[-300:], err[-3000:])
    assert said[0].startswith("ebbtide: ")
    assert said[0].isprintable()
    assert len(said[0]) < 1000, said[0]
    return said[0]


@pytest.mark.parametrize("seeds", slices(RECIPES), ids=["slice", "rest"])
def test_wrong_recipes(here: Path, capsys: pytest.CaptureFixture[str], seeds: list[int]) -> None:
    before = sorted(here.iterdir())
    for seed in seeds:
        wrong = wrong_recipe(seed)
        Path("r.yaml").write_bytes(wrong.text)
        said = refusal(["recipe", "r.yaml", *wrong.overrides], capsys)
        assert wrong.says in said, (seed, wrong, said)
        assert sorted(here.iterdir()) == before, seed


@pytest.mark.parametrize("seeds", slices(DATA), ids=["slice", "rest"])
def test_wrong_data(here: Path, capsys: pytest.CaptureFixture[str], seeds: list[int]) -> None:
    for seed in seeds:
        folder = here / str(seed)
        folder.mkdir()
        name, objective, says = wrong_data(seed, folder)
        before = contents(folder)
        words = ["data", "r.yaml", f"dataset=./{seed}/{name}", f"objective={objective}"]
        said = refusal(words, capsys)
        assert says in said, (seed, said)
        assert f"./{seed}/{name}" in said
        assert contents(folder) == before, seed


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "' + "b" * 80 + '"}\n', "line 2 is longer than 64 characters"),
        ("a.json", '[{"text": "' + "b" * 200 + '"}]', "the list is longer than 128 characters"),
        ("a.parquet", "b" * 80, "record 0: text has 80 characters, at most 64 are read"),
    ],
)
def test_what_is_read_at_once_is_bounded(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, text: str, says: str
) -> None:
    monkeypatch.setattr(sources, "LONGEST_CHARACTERS", 64)
    monkeypatch.setattr("launch.data.rows.LONGEST_CHARACTERS", 64)
    monkeypatch.setattr(sources, "LONGEST_LIST_CHARACTERS", 128)
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [text]}), name)
    else:
        Path(name).write_text(text)
    assert says in refusal(["data", "r.yaml", f"dataset=./{name}"], capsys)


@pytest.mark.parametrize(
    ("name", "says"), NAMES, ids=[name[:20].encode("unicode_escape").decode() for name, _ in NAMES]
)
def test_output_folders_that_cannot_be(here: Path, capsys: pytest.CaptureFixture[str], name: str, says: str) -> None:
    plant_names(here)
    before = sorted(here.parent.rglob("*"))
    said = refusal(["train", "r.yaml", f"output_dir={name}"], capsys)
    assert says in said
    assert "output_dir" in said
    assert sorted(here.parent.rglob("*")) == before


@pytest.mark.parametrize("name", LINKED)
def test_a_run_writes_nothing_through_a_link(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = plant_link(here, outside, name)
    before = contents(outside), sorted(outside.rglob("*"))
    for words in (["train", "r.yaml", f"output_dir={run}"], ["report", str(run)], ["export", str(run)]):
        said = refusal(words, capsys)
        assert str(run / name) in said
        assert "is a link to" in said
    assert (contents(outside), sorted(outside.rglob("*"))) == before
    (run / name).unlink()
    if name not in ("metrics.jsonl", "recipe.lock.yaml"):
        assert cli.main(["report", str(run)]) == 0


def test_a_comparison_writes_nothing_through_a_link(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = here / "runs" / "x-bench"
    folder.mkdir(parents=True)
    (folder / "scratch").symlink_to(tmp_path / "outside")
    assert "is a link to" in refusal(["bench", "r.yaml", "--resume"], capsys)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("cases", slices(len(WRONG_MODELS)), ids=["slice", "rest"])
def test_wrong_models(here: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], cases: list[int]) -> None:
    for name, content, says in (WRONG_MODELS[case] for case in cases):
        shutil.rmtree("model", ignore_errors=True)
        shutil.copytree(model_folder, "model")
        (edit(name, **content) if isinstance(content, dict) else put(name, content))(here / "model")
        said = refusal(["train", "r.yaml", "model_name_or_path=./model"], capsys)
        assert says in said, (name, content, said)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: planted.name)
def test_nothing_that_is_read_is_run(
    here: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], planted: Planted
) -> None:
    shutil.copytree(model_folder, "model")
    planted.plant(here / "model")
    if planted.says is None:
        assert cli.main(list(planted.words)) == 0, capsys.readouterr().err
    else:
        assert planted.says in refusal(list(planted.words), capsys)
    assert not CANARY.exists()
    pickle.loads(bomb())
    assert CANARY.exists()


def test_code_of_a_model_runs_where_the_recipe_says_so(
    here: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (planted,) = [planted for planted in PLANTED if planted.name == "a configuration's code"]
    shutil.copytree(model_folder, "model")
    planted.plant(here / "model")
    refusal([*planted.words, "trust_remote_code=true"], capsys)  # the file has no class
    assert CANARY.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", "3\n"), ("metrics.jsonl", '{"step": "x"}\n'), ("events.jsonl", "{}\n"),
        ("report.json", "[1]"), ("report.json", "{"), ("recipe.lock.yaml", "[]"), ("recipe.lock.yaml", "a: &b 1"),
        ("evaluations.jsonl", "null\n"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_reported_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    run = run_folder(here / "run", 4, finished=True)
    (run / name).write_text(text)
    assert str(run) in refusal(["report", str(run)], capsys)
