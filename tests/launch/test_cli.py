"""The command line: what is said, where, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from distrib.errors import Interrupted, UserError
from distrib.topology import Topology
from launch import cli
from launch.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "recipes" / "tiny.yaml")


@pytest.fixture(autouse=True)
def untouched_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    yield
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)


def command(*words: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    known = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(
        [sys.executable, "-P", "-m", "launch", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=known,
        timeout=60,
    )


def stub(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    made = ModuleType(module)
    for name, value in names.items():
        setattr(made, name, value)
    monkeypatch.setitem(sys.modules, module, made)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"], ["recipe", "--schmea"]])
def test_help_and_mistakes_answer_without_heavy_imports(words: list[str]) -> None:
    heavy = ("torch", "transformers", "datasets", "numpy", *(["pydantic"] if "recipe" not in words else []))
    code = f"import sys; from launch import cli; cli.main(sys.argv[1:]); print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_help_lists_only_commands_that_work() -> None:
    done = command("--help")
    assert done.returncode == 0
    for name in cli.COMMANDS:
        assert f"\n    {name}" in done.stdout
    assert set(cli.COMMANDS) >= {"train", "bench", "verify", "data", "strategies", "export"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], f"no command: choose {', '.join(cli.COMMANDS)}"),
        (["trian"], f"command='trian': choose {', '.join(cli.COMMANDS)} (did you mean train?)"),
        (["--versoin"], "did you mean --version?"),
        (["train"], "the following arguments are required: RECIPE"),
        (["train", "nix.yaml"], "nix.yaml: no such recipe file"),
        (["train", str(ROOT)], "is a folder"),
        (["train", TINY, "--jsn"], "unknown argument --jsn, did you mean --json?"),
        (["train", TINY, "-x"], "unrecognized arguments: -x"),
        (["train", TINY, "other.yaml"], "unrecognized arguments: other.yaml"),
        (["train", TINY, "max_step=5"], "unknown key 'max_step', did you mean max_steps?"),
        (["train", TINY, "--max_step", "5"], "unknown key 'max_step', did you mean max_steps?"),
        (["train", TINY, "--max_steps"], "max_steps needs a value"),
        (["train", TINY, "nproc=two"], "nproc='two': must be a whole number > 0"),
        (["train", TINY, "objective=dpo"], "packing=true with objective=dpo"),
        (["train", TINY, "engine.name=fsdp"], "choose ddp, fsdp2, zero (did you mean fsdp2?)"),
        (["data"], "the following arguments are required: RECIPE"),
        (["data", TINY, "--count"], "argument --count: expected one argument"),
        (["data", TINY, "--count", "many"], "argument --count: invalid int value: 'many'"),
        (["data", TINY, "--count=0"], "--count 0: must be at least 1"),
        (["data", TINY, "max_length=0"], "max_length=0: must be a whole number > 0"),
        (["export"], "the following arguments are required: RUN"),
        (["export", "runs/nix"], "runs/nix: no such run folder"),
        (["export", TINY], "no such run folder"),
        (["export", "x", "--mrege"], "unrecognized arguments: --mrege"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "runs/nix"], "runs/nix: no such run folder"),
        (["report", str(ROOT)], "is not a run: it has no recipe.lock.yaml"),
        (["bench"], "the following arguments are required: RECIPE"),
        (["bench", TINY, "--repeats=0"], "--repeats 0: must be at least 1"),
        (["bench", TINY, "--lengths=64,x"], "--lengths 64,x: must be whole numbers divided by commas"),
        (["bench", TINY, "--max-length", "big"], "--max-length='big': a number above 0 with one of"),
        (["bench", TINY, "--strategies", "plian"], "strategy.name='plian': choose"),
        (["bench", TINY, "--strategies", "plain,gc,plain"], "--strategies: plain is listed twice"),
        (["bench", TINY, "--lengths", "64,64"], "--lengths: 64 is listed twice"),
        (["bench", TINY, "--resume"], "--resume: there is no"),
        (["bench", TINY, "--reume"], "unknown argument --reume, did you mean --resume?"),
        (["bench", TINY, "--max_length", "0"], "max_length=0: must be a whole number > 0"),
        (["recipe"], "give a RECIPE to check, or --schema"),
        (["recipe", TINY, "seed=x"], "seed='x': must be a whole number"),
        (["recipe", TINY, "--schmea"], "unknown argument --schmea, did you mean --schema?"),
        (["strategies", "plain"], "unrecognized arguments: plain"),
        (["strategies", "--jsonn"], "unrecognized arguments: --jsonn"),
        (["data", TINY, "model_name_or_path=./nowhere"], "nowhere"),
        (["data", TINY, "dataset=./nowhere.jsonl"], "nowhere.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("EBBTIDE_CACHE", str(tmp_path))
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ebbtide: ")
    assert err.count("\n") == 1
    assert said in err


def test_a_mistake_is_one_line_in_a_real_process() -> None:
    done = command("train", TINY, "max_steps=soon", "nproc=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"ebbtide: {TINY}: max_steps='soon': must be a whole number > 0, or null\n"


def test_the_resolved_recipe_and_the_schema_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", TINY, "seed=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7
    assert cli.main(["recipe", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"
    assert cli.main(["recipe", TINY, "--seed", "7"]) == 0
    assert "\nseed: 7\n" in capsys.readouterr().out


def test_strategies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["strategies", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["strategies"]}
    assert rows["plain"]["fidelity"] == "exact"
    assert rows["spaco"]["fidelity"] == "unbiased"
    assert rows["spaco_published"]["idea"].startswith("BIASED.")
    assert cli.main(["strategies"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("plain            exact\n    The model's own forward")
    assert "\n    BIASED. " in listed


def trained(monkeypatch: pytest.MonkeyPatch, train: Any) -> None:
    stub(monkeypatch, "launch.train", train=train)


def test_train_prints_results_on_stdout_and_the_rest_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Recipe, topology: Topology) -> dict[str, Any]:
        print("a library's chatter")
        return {"final": recipe.output_dir, "joules": None, "strategy": ["plain"], "world": topology.world}

    trained(monkeypatch, train)
    assert cli.main(["train", TINY, "--json", "output_dir=here"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"final": "here", "joules": None, "strategy": ["plain"], "world": 1}
    assert err == "a library's chatter\n"
    assert cli.main(["train", TINY, "--output_dir", "here"]) == 0
    assert capsys.readouterr().out == "final: here\nstrategy: plain\nworld: 1\n"


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (UserError("two\nlines"), 2, ["ebbtide: two lines"]),
        (Interrupted("stopped after step 3"), 75, ["ebbtide: stopped after step 3"]),
        (KeyboardInterrupt(), 1, ["ebbtide: interrupted"]),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(recipe: Recipe, topology: Topology) -> dict[str, Any]:
        raise error

    trained(monkeypatch, train)
    assert cli.main(["train", TINY]) == code
    assert capsys.readouterr().err.splitlines() == lines


def test_a_defect_shows_its_traceback_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(recipe: Recipe, topology: Topology) -> dict[str, Any]:
        raise ZeroDivisionError("oh")

    trained(monkeypatch, train)
    assert cli.main(["train", TINY]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ZeroDivisionError: oh"


def test_data_and_export_hand_over_what_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stub(monkeypatch, "launch.tokenizer", load_tokenizer=lambda recipe: "tokenizer")
    stub(
        monkeypatch,
        "launch.data",
        open_data=lambda recipe, tokenizer, topology: (tokenizer, topology.world),
        show=lambda recipe, tokenizer, data, count, as_json: {
            "data": data,
            "count": count,
            "as_json": as_json,
        },
    )
    assert cli.main(["data", TINY, "--count", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"data": ["tokenizer", 1], "count": 5, "as_json": True}
    stub(
        monkeypatch,
        "launch.export",
        export=lambda run, output, merge: {"final": str(output), "merged": merge},
    )
    assert cli.main(["export", str(tmp_path), "--output", "there", "--merge"]) == 0
    assert capsys.readouterr().out == "final: there\nmerged: True\n"


def test_a_launcher_that_started_another_number_of_ranks_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", TINY, "nproc=3"]) == 2
    assert "nproc=3, but the launcher started 1 ranks" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["strategies", "distrib"])
def test_another_package_of_our_name_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = command("recipe", TINY, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ebbtide: the package '{name}' in {tmp_path} is not Ebbtide's")
    assert done.stderr.count("\n") == 1


def test_output_that_nobody_reads_is_no_traceback() -> None:
    code = "import sys; from launch import cli; sys.exit(cli.main(['recipe', '--schema']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
