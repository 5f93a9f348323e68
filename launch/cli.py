"""The command line. Help and errors answer at once: what a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from distrib.errors import UserError, choose
from launch.rank import exit_code, follow_supervisor, report_alone, run_ranked, stoppable
from launch.spawn import launched, spawn

if TYPE_CHECKING:
    from launch.recipe import Recipe

OVERRIDES = "key=value and --key value change the recipe; dots reach into sections: engine.name=zero"
FLAGS = ("--json", "--schema", "--help", "-h")
VALUED_FLAGS = ("--count",)
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows the usage)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 2 the user's mistake, 75 stopped early and can go on, 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(words)
    except SystemExit as end:
        return int(end.code or 0)
    except BrokenPipeError:
        # whoever read our output has seen enough; keep the interpreter from writing to it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (Exception, KeyboardInterrupt) as error:
        report_alone(error, os.environ)
        return exit_code(error)


def _run(words: list[str]) -> int:
    parser = _parser()
    if words[:1] == ["--version"]:
        print(f"ebbtide {_version()}")
        return 0
    if not words:
        raise UserError(f"no command: choose {', '.join(COMMANDS)}")
    if words[0].startswith("-") and words[0] not in FLAGS:
        raise choose("argument", words[0], ["--help", "--version"])
    if not words[0].startswith("-") and words[0] not in COMMANDS:
        raise choose("command", words[0], COMMANDS)
    overrides: list[str] = []
    if words[0] in WITH_RECIPE:
        words, overrides = _split(words)
    arguments = parser.parse_args(words)
    arguments.overrides = overrides
    return COMMANDS[words[0]](arguments)


def _parser() -> Parser:
    parser = Parser(prog="ebbtide", description="Train large language models with memory-efficient backpropagation.")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, help: str, epilog: str | None = None) -> Parser:
        made: Parser = commands.add_parser(name, help=help, description=help, epilog=epilog, allow_abbrev=False)
        made.add_argument("--json", action="store_true", help="print one JSON object for machines")
        return made

    train = command("train", "train a model as a recipe says, or go on with its unfinished run", OVERRIDES)
    data = command("data", "show the first samples' tokens with their loss mask", OVERRIDES)
    data.add_argument("--count", type=int, default=3, metavar="N", help="samples to show (3)")
    command("strategies", "list the ways to compute gradients")
    export = command("export", "write a run's model as a folder that Transformers or PEFT loads")
    export.add_argument("run", metavar="RUN", type=Path, help="the run's output folder")
    export.add_argument("--output", type=Path, metavar="FOLDER", help="where to (RUN/final, or RUN/merged)")
    export.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its model")
    recipe = command("recipe", "check a recipe and show every key of it", OVERRIDES)
    recipe.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")
    for needs, made in ((None, train), (None, data), ("?", recipe)):
        made.usage = f"{made.prog} [options] RECIPE [key=value ...]"
        made.add_argument("recipe", metavar="RECIPE", nargs=needs, help="a YAML file")
    return parser


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the recipe's overrides among them."""
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        name = word.partition("=")[0]
        if word in FLAGS or name in VALUED_FLAGS:
            own.append(word)
            if word in VALUED_FLAGS:
                own.extend([value for value in [next(rest, None)] if value is not None])
        elif word.startswith("--"):
            _refuse_misspelt(name)
            overrides.append(word)
            if "=" not in word:
                overrides.extend([value for value in [next(rest, None)] if value is not None])
        elif re.match(r"[A-Za-z_][\w.-]*=", word):
            overrides.append(word)
        else:
            own.append(word)
    return own, overrides


def _refuse_misspelt(flag: str) -> None:
    near = get_close_matches(flag, [*FLAGS, *VALUED_FLAGS], n=1, cutoff=0.7)
    if near:
        from launch.recipe import Recipe

        if flag[2:].split(".")[0].replace("-", "_") not in Recipe.model_fields:
            raise UserError(f"unknown argument {flag}, did you mean {near[0]}?")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ebbtide")
    except PackageNotFoundError:
        return "(not installed)"


def _train(arguments: argparse.Namespace) -> int:
    follow_supervisor()
    with stoppable():
        recipe = _recipe(arguments)
        if recipe.nproc > 1 and not launched(os.environ):
            json_flag = ["--json"] if arguments.json else []
            return spawn(["train", arguments.recipe, *json_flag, *arguments.overrides], recipe.nproc)
        _quieten()
        # what libraries print is no result
        with redirect_stdout(sys.stderr):
            summary = _train_rank(recipe)
    if _is_first_rank():
        _show(summary, arguments.json)
    return 0


def _quieten() -> None:
    """Libraries keep their news to themselves; whoever sets their variables, or -W, hears them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not (sys.stderr.isatty() and _is_first_rank()):
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _train_rank(recipe: Recipe) -> dict[str, Any]:
    from distrib.topology import connect, read_environment
    from launch.console import show_notes
    from launch.train import train

    show_notes()
    topology = read_environment()
    if recipe.nproc > 1 and recipe.nproc != topology.local_world:
        raise UserError(
            f"nproc={recipe.nproc}, but the launcher started {topology.local_world} ranks on this machine: "
            f"leave nproc out, or start {recipe.nproc}"
        )
    if topology.device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        import torch

        if topology.local_world > (devices := torch.cuda.device_count()):
            raise UserError(f"{topology.local_world} ranks on a machine with {devices} CUDA devices: start {devices}")
    store = connect(topology)
    return run_ranked(lambda: train(recipe, topology), topology, store)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from launch.recipe_file import load_recipe

    return load_recipe(arguments.recipe, arguments.overrides)


def _data(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: must be at least 1")
    from distrib.topology import Topology
    from launch.data import open_data, show
    from launch.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe)
    data = open_data(recipe, tokenizer, Topology())
    shown = show(recipe, tokenizer, data, arguments.count, arguments.json)
    if arguments.json:
        _show(shown, as_json=True)
    return 0


def _strategies(arguments: argparse.Namespace) -> int:
    import dataclasses
    import inspect
    import textwrap

    import strategies

    rows: list[dict[str, Any]] = []
    for name in strategies.names():
        kind = strategies.get(name)
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        idea = " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())
        rows.append({"name": name, "fidelity": kind.fidelity.name.lower(), "fields": defaults, "idea": idea})
    if arguments.json:
        _show({"strategies": rows}, as_json=True)
        return 0
    for row in rows:
        given = " ".join(f"{key}={value}" for key, value in row["fields"].items())
        print(f"{row['name']:16} {row['fidelity']:12} {given}".rstrip())
        print(textwrap.fill(row["idea"], 110, initial_indent="    ", subsequent_indent="    "))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    if not arguments.run.is_dir():
        raise UserError(f"{arguments.run}: no such run folder; give the output_dir of a recipe that was trained")
    from launch.export import export

    with redirect_stdout(sys.stderr):
        result = export(arguments.run, arguments.output, arguments.merge)
    _show(result, arguments.json)
    return 0


def _recipe_command(arguments: argparse.Namespace) -> int:
    if arguments.schema:
        from launch.recipe_schema import schema

        print(json.dumps(schema(), indent=2))
        return 0
    if arguments.recipe is None:
        raise UserError("give a RECIPE to check, or --schema for the JSON schema")
    from launch.recipe_file import dump_recipe

    recipe = _recipe(arguments)
    print(
        recipe.model_dump_json() if arguments.json else dump_recipe(recipe),
        end="\n" if arguments.json else "",
    )
    return 0


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, default=str))
        return
    for key, value in result.items():
        if value is not None and not isinstance(value, dict):
            print(f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "train": _train,
    "data": _data,
    "strategies": _strategies,
    "export": _export,
    "recipe": _recipe_command,
}
WITH_RECIPE = ("train", "data", "recipe")
