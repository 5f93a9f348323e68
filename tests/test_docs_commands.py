"""Every command line of README.md, CONTRIBUTING.md and docs/ is run, as small as overrides make it.

Not run, but read by whoever would: lines for several machines or for GPUs (the launcher's options, then the recipe and
its overrides), sizes that benchmarks are given (each is run once at sizes of our own), targets of make (a dry run), and
what pip, docker, kubectl and sbatch are told (the files that they name are there).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import test_benchmarks
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from doc_pages import ROOT, Command, blocks, commands, strategy_of_the_docs

from distrib.errors import UserError
from launch import cli
from launch.recipe_file import load_recipe
from launch.sides import sides_of, strategies_of
from launch.words import OWN_FLAGS, VALUED_FLAGS, command_parser, split

PLACEHOLDERS = {
    "RECIPE": "mine.yaml", "RUN": "runs/mine", "LOCK": "docker/requirements-cpu.lock", "SHAPE": "64x2",
    "LENGTH": "64", "A,B": "plain,streambp", "BUDGET": "512MiB",
}  # fmt: skip
MODEL = {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
TINY = ("dataset=rows.jsonl", "max_length=64", *(f"config_overrides.{key}={value}" for key, value in MODEL.items()))
SHORTER = {"train": ("max_steps=2",), "bench": ("--repeats", "1", "--steps", "1")}
COSTLY = re.compile(r"nproc|^bench|--recorded|gc\+ce|twobp|recipes/(?!tiny)")
# Cheap arguments for those that tests/test_benchmarks.py does not run.
BENCHMARKS = {
    "activations": "--models llama --length 64 --steps 1 --repeats 1",
    "choose": f"{ROOT}/docs/results/choose-cpu.json choose.svg",
    "energy": "--model 64x1 --length 32 --steps 1 --repeats 2",
    "loop": "--shape 256x2 --vocabulary 128 --length 64 --steps 1 --repeats 1",
    "max_length": "32MiB --model 64x2 --vocabulary 128 --sides plain",
    "recompute": "--model 64x2 --length 128 --vocabulary 128 --steps 1 --repeats 1 --sides plain,recompute",
    "scaling": "--model 64x2 --length 32 --repeats 1",
    "spaco": "seco --seconds 1 --seeds 1 --learning-rates 1e-3 --length 128",
    "stage_costs": "--small --length 32 --repeats 2",
    "streaming": "--model 64x2 --length 128 --vocabulary 128 --steps 1 --repeats 1 --sides plain,streambp:chunk=64",
}
IN_TESTS = {
    module for module in vars(test_benchmarks) if f"{module}.__file__" in Path(test_benchmarks.__file__).read_text()
}


def ours(words: Sequence[str]) -> tuple[str, ...] | None:
    """What `ebbtide` is given, by whichever launcher."""
    for index, word in enumerate(words):
        if word == "ebbtide":
            return tuple(words[index + 1 :])
        if word == "-m":
            return tuple(words[index + 2 :]) if words[index + 1] == "launch" else None
    return None


def kind(command: Command) -> str:
    """The first word, of Python what it runs."""
    first, *rest = command.words
    if Path(first).name != "python":
        return Path(first).name
    if rest[0] != "-m":
        return str(Path(rest[0]).parent)
    return rest[1].split(".")[0]


def filled(words: Sequence[str]) -> list[str]:
    return [PLACEHOLDERS.get(word, word) for word in words]


def apart(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own words as its parser reads them, and the recipe's overrides."""
    own, overrides = split(list(words), OWN_FLAGS.get(words[0], ()), VALUED_FLAGS.get(words[0], ()))
    return command_parser().parse_args(own), overrides


def is_mention(command: Command, words: Sequence[str]) -> bool:
    """In running text, a command without what it would be about."""
    try:
        apart(filled(words))
    except UserError:
        return not command.whole
    return False


ALL = commands()
FOUND = {words: command for command in reversed(ALL) if (words := ours(command.words))}
MENTIONS = {words: command for words, command in FOUND.items() if is_mention(command, words)}
LINES = {words: command for words, command in FOUND.items() if not is_mention(command, words)}
# A whole command by itself, not by way of a launcher.
OWN = {words: command for words, command in LINES.items() if kind(command) in ("ebbtide", "launch")}


def cases(found: dict[tuple[str, ...], Command]) -> list[Any]:
    return [pytest.param(words, command, id=f"{command.where} {' '.join(words)}") for words, command in found.items()]


def of(*kinds: str) -> Any:
    named = {str(command): command for command in ALL if kind(command) in kinds}
    assert named, kinds
    return pytest.mark.parametrize("command", [pytest.param(c, id=f"{c.where} {c}") for c in named.values()])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the README's first recipe, the repository's, rows to train on, and runs of two recipes."""
    folder = tmp_path_factory.mktemp("docs")
    (recipe,) = (block.text for block in blocks() if block.text.startswith("# mine.yaml"))
    (folder / "mine.yaml").write_text(recipe)
    rows = [{"text": f"{i * 7919 % 1000} green bottles hanging on the wall. " * 3} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    shutil.copytree(ROOT / "docs", folder / "docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe in ("mine.yaml", "recipes/tiny.yaml"):
            assert cli.main(tiny(("train", recipe))) == 0
    (folder / "strategies").mkdir()
    with strategy_of_the_docs(folder / "strategies"):
        yield folder


@pytest.fixture
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def tiny(words: Sequence[str]) -> list[str]:
    """The words with a small model, little data, short lengths, two ranks and two compared strategies at most."""
    words = [re.sub(r"^nproc=\d+", "nproc=2", word) for word in filled(words)]
    if words[0] not in cli.WITH_RECIPE or words[0] == "timeline" or not apart(words)[0].recipe:
        return words
    if real := re.match(r"recipes/(?!tiny)", words[1]):
        words = [re.sub(r"^device\.count=\d+", "device.count=2", word) for word in words]
    more = [*(["--shrink"] if "--shrink" not in words else [])] if real else [*TINY, *SHORTER.get(words[0], ())]
    if words[0] == "train" and (real or "nproc=2" in words):
        # Another model, engine or number of ranks is another run.
        more.append(f"output_dir=runs/of-{crc32(' '.join(words).encode()):x}")
    if words[0] in ("plan", "bench") and "--strategies" not in words:
        more += ["--strategies", "plain"]
    for flag, least in (("--lengths", "64"), ("--max-length", "16MiB")):
        if flag in words:
            words[words.index(flag) + 1] = least
    if words[0] == "bench" and "--strategies" in words:
        at = words.index("--strategies") + 1
        words[at] = ",".join(words[at].split(",")[:2])
    return [*words, *more]


def test_every_line_is_of_a_known_kind() -> None:
    known = {
        *("ebbtide", "launch", "benchmarks", "make", "pip", "pytest", "torchrun", "srun", "accelerate"),
        *("sweep", "pipeline_families", "docker", "kubectl", "sbatch", "bash", "recipes/loops"),
    }
    unknown = [f"{command.where}: {command}" for command in ALL if kind(command) not in known]
    assert not unknown, "say in tests/test_docs_commands.py how these are run"
    assert len(LINES) > 30


@pytest.mark.parametrize(("words", "command"), cases(MENTIONS))
def test_what_is_mentioned_exists(words: tuple[str, ...], command: Command) -> None:
    name, *flags = words
    value = ["1"] if flags and flags[-1] in VALUED_FLAGS.get(name, ()) else []
    apart([name, "mine.yaml", *flags, *value])


@pytest.mark.parametrize(("words", "command"), cases(LINES))
def test_words_and_overrides_are_understood(words: tuple[str, ...], command: Command, here: Path) -> None:
    arguments, overrides = apart(filled(words))
    if words[0] in ("train", "verify", "data", "bench", "timeline", "recipe") and arguments.recipe and not command.says:
        load_recipe(arguments.recipe, overrides)
    for side in sides_of(getattr(arguments, "strategies", None) or "plain"):
        strategies_of(side)


def run(words: tuple[str, ...], command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    messages = [line for line in command.says.splitlines() if line.startswith("ebbtide: ")]
    expected = 2 if messages else 0
    for fitted in Path().glob("fitted.*"):
        fitted.unlink()
    code = cli.main(filled(words) if messages else tiny(words))
    said = capsys.readouterr()
    assert code == expected, said.err
    assert all(message in said.err for message in messages)


def costly(words: Sequence[str]) -> bool:
    return bool(COSTLY.search(" ".join(words)))


@pytest.mark.parametrize(("words", "command"), cases({w: c for w, c in OWN.items() if not costly(w)}))
def test_a_line_runs(words: tuple[str, ...], command: Command, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(words, command, capsys)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "command"), cases({w: c for w, c in OWN.items() if costly(w)}))
def test_a_costly_line_runs(
    words: tuple[str, ...], command: Command, here: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Two ranks, comparisons, and what goes on from them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    if "--resume" in words:
        words = (*words, "--output", "resumed")
        run(tuple(word for word in words if word != "--resume"), command, capsys)
    if "--recorded" in words:
        assert cli.main(["train", "recipes/tiny-pipeline.yaml", *TINY, "max_steps=2"]) == 0
    run(words, command, capsys)


@of("torchrun", "accelerate", "srun")
def test_a_launcher_understands_its_options(command: Command) -> None:
    """And `test_words_and_overrides_are_understood` has what it starts; tests/launch/test_launchers.py starts it."""
    words = command.words[command.words.index("torchrun") :] if "torchrun" in command.words else command.words
    script = [] if "-m" in words or "ebbtide" in words else ["script.py"]
    if words[0] == "torchrun":
        torch.distributed.run.get_args_parser().parse_args([*words[1:], *script])
    elif words[0] == "accelerate":
        assert launch_command_parser().parse_args(words[2:]).module
    else:
        assert words[0] == "srun"
        assert "ebbtide" in words
        assert all(word.startswith("-") or word.isdecimal() for word in words[1 : words.index("ebbtide")])


@pytest.mark.slow
def test_torchrun_starts_two_ranks_as_the_docs_say(here: Path) -> None:
    for command in {str(c): c for c in ALL if kind(c) == "torchrun" and "--standalone" in c.words}.values():
        launcher = list(command.words[1 : command.words.index("-m")])
        launcher[launcher.index("--nproc-per-node") + 1] = "2"
        run_folder = here / f"torchrun-{len(launcher)}"
        given = [*tiny(ours(command.words) or ()), f"output_dir={run_folder}", "global_batch_size=8"]
        start = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "launch", *given]
        done = subprocess.run(start, cwd=here, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        assert json.loads((run_folder / "report.json").read_text())["world"] == 2


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


class Parsed(Exception):
    pass


@of("benchmarks")
def test_a_benchmark_understands_its_arguments(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(parse(parser, *given))

    script, *arguments = filled(command.words[1:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


def test_every_benchmark_of_the_docs_is_run_here_or_by_its_tests() -> None:
    named = {Path(command.words[1]).stem for command in ALL if kind(command) == "benchmarks"}
    assert named <= BENCHMARKS.keys() | IN_TESTS


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs(name: str, tmp_path: Path) -> None:
    start = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *BENCHMARKS[name].split()]
    done = subprocess.run(start, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout


@of("recipes/loops")
def test_loops_of_others_are_run_by_their_tests(command: Command) -> None:
    """tests/strategies/test_other_loops.py runs all of that folder."""
    assert (ROOT / command.words[1]).is_file()


@of("make")
def test_make_has_the_target(command: Command) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(command.words[1:]) <= targets
    # Lines that call make are run even in a dry run, which would audit.
    for target in set(command.words[1:]) - {"check", "audit"}:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@of("pip", "pytest")
def test_pip_and_pytest_name_what_is_there(command: Command) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    words = filled(command.words)
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag in ("-c", "-r", "--constraint", "--requirement"):
            assert (ROOT / value).is_file(), value
        if flag == "-m":
            assert f"{value}: " in (ROOT / "pyproject.toml").read_text() or value == "pytest"
        if flag.startswith("tests"):
            assert (ROOT / flag).exists(), flag
        if named := re.match(r"\.\[(.*)\]", flag):
            assert set(named[1].split(",")) <= extras.keys(), flag


@of("sweep", "pipeline_families")
def test_makers_of_pages_are_there(command: Command) -> None:
    """What they write is held to the page by tests/strategies/test_every_family.py and test_pipeline_families.py."""
    assert importlib.util.find_spec(command.words[2])


def test_the_maker_of_the_recipe_page_runs(here: Path) -> None:
    (command,) = {str(c): c for c in ALL if kind(c) == "launch" and c.words[2] == "launch.recipe_schema"}.values()
    done = subprocess.run(
        [sys.executable, *command.words[1:]], cwd=here, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert (here / "docs/recipe.md").read_text() == (ROOT / "docs/recipe.md").read_text()


def test_files_that_clusters_are_given_are_there() -> None:
    for command in ALL:
        if kind(command) in ("docker", "kubectl", "sbatch", "bash"):
            for word in command.words[1:]:
                if "/" in word[1:] and not word.startswith("/") and (ROOT / word.split("/")[0]).is_dir():
                    assert (ROOT / word).exists(), f"{command.where}: {word}"
