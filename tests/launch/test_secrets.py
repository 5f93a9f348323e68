"""Twenty secrets are planted in the environment and in a recipe; nothing that is written or said has one."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.train
from distrib.errors import UserError
from distrib.journal import Journal
from distrib.redaction import HIDDEN, clean, clean_text, cleaned_output, one_line, same
from launch import cli

ENVIRONMENT = {
    "HF_TOKEN": "hf_SEENaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "HUGGING_FACE_HUB_TOKEN": "SEEN-hub-7781",
    "AWS_SECRET_ACCESS_KEY": "SEEN/aws+7782==",
    "my_token": "SEEN 'quoted' \\ 7783",
    "Db_Password": "SEEN@7784:é",
    "SSH_PRIVATE_KEY": "-----BEGIN SEEN\n7785\nSEEN END-----",
    "WANDB_API_KEY": "0SEEN7786",
    "secret_of_mine": "SEEN7787",
}
OVERRIDES: dict[str, Any] = {
    "api_key": "SEEN7788",
    "hubToken": "SEEN 7789",
    "client_secret": "SEEN'7790",
    "USER_PASSWORD": 77917791,
    "tokens": {"hub": "SEEN7792", "others": ["SEEN7793", "SEEN7794"]},
    "endpoint": "https://user:SEEN7795@localhost/x",
    "note": "export MY_TOKEN=SEEN7796",
}
SOURCE = "https://me:SEEN@7797@localhost/grid?api_key=SEEN7798"
NAME = "hf_SEENbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
TYPED = "SEEN7799"
SECRETS = ["SEEN", "7785", "77917791", "@7797", "@7784"]


@pytest.fixture
def planted(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with secrets, of a model whose configuration has their keys."""
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(model_folder, "model")
    config = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(config | dict.fromkeys(OVERRIDES, "") | {"secret_key": ""}))
    Path("a.jsonl").write_text('{"text": "a row"}\n')
    recipe = {
        "model_name_or_path": "./model",
        "dataset": "./a.jsonl",
        "max_length": 32,
        "max_steps": 2,
        "save_steps": 1,
        "verify": False,
        "output_dir": "run",
        "config_overrides": OVERRIDES,
        "energy": {"idle_s": 0, "grams_co2_per_kwh": 1, "intensity_source": SOURCE},
    }
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path / "r.yaml"


def words(*more: str) -> list[str]:
    return [*more, f"config_overrides.secret_key={TYPED}"]


def kept(run: Path) -> dict[str, str]:
    """What a run has written, but for the model itself."""
    files = [path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] != "final"]
    return {str(path.relative_to(run)): path.read_bytes().decode("utf-8", "replace") for path in files}


def leaks(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


def test_a_run_and_all_that_is_said_of_it(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("train", "r.yaml")) == 0
    assert cli.main(words("train", "r.yaml", "max_steps=3")) == 0
    for command in (["report", "run"], ["export", "run"], ["data", "r.yaml"], words("recipe", "r.yaml")):
        assert cli.main(command) == 0, capsys.readouterr().err
        assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    assert leaks(out + err) == []
    written = kept(Path("run"))
    assert {"recipe.lock.yaml", "metrics.jsonl", "events.jsonl", "report.json", "report.md", "report.html"} <= set(
        written
    )
    assert {name: leaks(text) for name, text in written.items() if leaks(text)} == {}
    lock = yaml.safe_load(written["recipe.lock.yaml"])
    assert lock["config_overrides"]["api_key"] == HIDDEN
    assert lock["config_overrides"]["tokens"] == {"hub": HIDDEN, "others": [HIDDEN, HIDDEN]}
    assert lock["energy"]["intensity_source"] == f"https://{HIDDEN}@localhost/grid?api_key={HIDDEN}"
    assert "localhost/grid" in written["report.md"]


@pytest.mark.parametrize(
    "more",
    [
        (f"engine.name={NAME}",),
        (f"dataset={NAME}",),
        ("dataset=https://u:SEEN77@localhost/x",),
        (f"model_name_or_path=https://u:SEEN77@localhost/x/{NAME}",),
        (f"max_steps={ENVIRONMENT['HF_TOKEN']}",),
        ("max_steps={password: SEEN7, api_key: 'SEEN8'}",),
        (f"seed={ENVIRONMENT['SSH_PRIVATE_KEY']!r}",),
        (f"strategy={ENVIRONMENT['WANDB_API_KEY']}",),
        ("config_overrides.nothing_token=SEEN7",),
        (f"config_overrides.hidden_size={TYPED}",),
        (f"--{NAME}", "3"),
        (f"{NAME}=3",),
        (f"resume_from_checkpoint={NAME}",),
        ("lora_r=2", f"lora_target_modules=[{TYPED}]"),
        (f"report_to={TYPED}",),
        ("config_overrides.api_key=SEEN9", "seed=x"),
    ],
)
def test_error_lines(planted: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]) -> None:
    assert cli.main(words("train", "r.yaml", *more)) == 2
    out, err = capsys.readouterr()
    assert leaks(out + err) == [], err
    assert err.splitlines()[-1].startswith("ebbtide: ")


@pytest.mark.slow
def test_a_comparison(planted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--strategies", "plain", "--repeats", "1", "--steps", "1", "--output", "compared"]
    assert cli.main(words("bench", "r.yaml", *options)) == 0
    out, err = capfd.readouterr()
    assert leaks(out + err) == []
    written = kept(Path("compared"))
    assert {"bench.jsonl", "bench.json", "bench.md", "bench.html", "recipe.yaml"} <= written.keys()
    assert {name: leaks(text) for name, text in written.items() if leaks(text)} == {}
    assert HIDDEN in written["bench.json"]


def test_another_recipe_is_still_told_apart(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words("train", "r.yaml")) == 0
    assert cli.main(words("train", "r.yaml", "config_overrides.rms_norm_eps=1e-3")) == 2
    said = capsys.readouterr().err
    assert "holds the run of another recipe: config_overrides was" in said
    assert leaks(said) == []


def test_tracebacks_logs_and_warnings(
    planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = [*ENVIRONMENT.values(), TYPED, "SEEN7788", SOURCE, NAME]

    def fail(*_: Any) -> None:
        logging.getLogger("ebbtide").info("; ".join(secrets))
        sys.stdout.writelines(secrets)
        print(*secrets, file=sys.stderr)
        raise RuntimeError("\n".join(secrets))

    monkeypatch.setattr(launch.train, "_train", fail)
    assert cli.main(words("train", "r.yaml")) == 1
    out, err = capsys.readouterr()
    assert "Traceback" in err
    assert leaks(out + err) == [], [line for line in (out + err).splitlines() if "SEEN" in line]


def test_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "SEEN7800")
    journal = Journal(tmp_path / "events.jsonl", 0)
    journal.write({"step": 1, "event": "stop", "detail": "at SEEN7800 with --hub-key abc", "tokens_per_s": 3.0})
    journal.close()
    assert json.loads((tmp_path / "events.jsonl").read_text()) == {
        "step": 1,
        "event": "stop",
        "detail": f"at {HIDDEN} with --hub-key {HIDDEN}",
        "tokens_per_s": 3.0,
    }


def test_what_is_no_secret_stays() -> None:
    known = {
        "num_key_value_heads": 2,
        "pad_token": "<pad>",
        "pad_token_id": 0,
        "suppress_tokens": [1, 2],
        "key_bias": True,
        "max_new_tokens": 64,
        "key_multiplier": 0.5,
        "tokens_per_second": 3,
        "mask_token": None,
    }
    assert clean(known) == known
    for text in (
        "tokens_per_s=3 num_key_value_heads=2 use_mask_token=true",
        "hf_transfer",
        "a@b.c",
        "unknown key 'x': 3",
    ):
        assert clean_text(text) == text
    said = clean_text(f"{SOURCE} --hub-token abc {{'api_key': 'x'}} my_key=3")
    assert clean_text(said) == said
    assert said.count(HIDDEN) == 5


def test_where_a_secret_lies_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("TOKEN_PATH_", "/SEEN/me")
    assert clean_text("/home/me/token and /SEEN/me") == f"/home/me/token and {HIDDEN}"


def test_a_cut_line_shows_no_beginning_of_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "SEEN" * 10)
    assert leaks(one_line("x" * 50 + "SEEN" * 10, 60)) == []
    assert one_line("a\x1b[2J\nb\u202e c") == "a [2J b c"


def test_a_hidden_part_may_have_been_anything_and_the_rest_may_not() -> None:
    assert same({"a": [f"x{HIDDEN}y", 1]}, {"a": ["x?y", 1]})
    assert not same({"a": [f"x{HIDDEN}y", 1]}, {"a": ["x?z", 1]})
    assert not same({"a": HIDDEN}, {"a": "x", "b": 1})
    assert not same(["a"], ["b"])


def test_what_a_command_learned_ends_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("config_overrides: {api_key: SEEN7801}")
    assert cli.main(["recipe", str(tmp_path / "r.yaml")]) == 0
    assert clean_text("SEEN7801") == "SEEN7801"
    with cleaned_output(), pytest.raises(UserError):
        raise UserError("x")
