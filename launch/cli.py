"""The command line. Help and errors answer at once: what a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrib.errors import UserError, choose
from distrib.redaction import clean, cleaned_output
from launch.nodes import Nodes, Relay
from launch.rank import Rank, exit_code, follow_supervisor, report_alone, stoppable
from launch.restarts import Restarts
from launch.spawn import SUPERVISED, launched, say, spawn
from launch.words import CHECKPOINT_ACTIONS, FLAGS, OWN_FLAGS, VALUED_FLAGS, command_parser, split

if TYPE_CHECKING:
    from distrib.topology import Topology
    from launch.device import Device
    from launch.recipe import Recipe

QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0 done, 2 the user's mistake, 75 stopped early and can go on, 1 anything else."""
    words = list(sys.argv[1:] if argv is None else argv)
    with cleaned_output():
        return _answered(words)


def _answered(words: list[str]) -> int:
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
    parser = command_parser()
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
    said = shlex.join(["ebbtide", *words])
    if words[0] in WITH_RECIPE:
        words, overrides = split(words, OWN_FLAGS.get(words[0], ()), VALUED_FLAGS.get(words[0], ()))
    arguments = parser.parse_args(words)
    arguments.overrides, arguments.said = overrides, said
    return COMMANDS[words[0]](arguments)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ebbtide")
    except PackageNotFoundError:
        return "(not installed)"


def _train(arguments: argparse.Namespace) -> int:
    def train(recipe: Recipe, topology: Topology) -> dict[str, Any]:
        from launch.train import train

        return train(recipe, topology)

    return _on_ranks(arguments, train, lambda summary: _show(summary, arguments.json))


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.length is not None and arguments.length < 2:
        raise UserError(f"--length {arguments.length}: must be at least 2 tokens")

    def verify(recipe: Recipe, topology: Topology) -> dict[str, Any]:
        from launch.verify import LENGTH, gradient_error

        return gradient_error(recipe, topology, arguments.length or LENGTH)

    def show(found: dict[str, Any]) -> int:
        from launch.verify import table, wrong

        print(json.dumps(found) if arguments.json else table(found), flush=True)
        if found["verdict"] == "wrong":
            say(f"{wrong(found)}; choose another strategy, and report this one")
        return int(found["verdict"] == "wrong")

    words = [] if arguments.length is None else ["--length", str(arguments.length)]
    return _on_ranks(arguments, verify, show, words)


def _on_ranks(
    arguments: argparse.Namespace,
    work: Callable[[Recipe, Topology], dict[str, Any]],
    show: Callable[[dict[str, Any]], int | None],
    words: Sequence[str] = (),
) -> int:
    """Do the work on this process or start ranks that do; the first one shows what came of it."""
    follow_supervisor()
    with stoppable():
        recipe = _recipe(arguments)
        again = recipe.max_restarts or recipe.on_oom == "halve"
        restarts = Restarts(recipe) if again and arguments.command == "train" else None
        nodes = Nodes() if launched(os.environ) else Nodes.of(os.environ)
        if restarts and nodes.count > 1:
            raise UserError(
                f"{_again(recipe)}, but each of PET_NNODES={nodes.count} machines would start its ranks again by "
                "itself: leave it out, and let the cluster start all of them"
            )
        if (recipe.nproc > 1 or restarts or nodes.count > 1) and not launched(os.environ):
            flags = [*words, *(f"--{flag}" for flag in ("json", "shrink") if getattr(arguments, flag))]
            said = [arguments.command, arguments.recipe, *flags, *arguments.overrides]
            relay = Relay(nodes, Path(recipe.output_dir)) if nodes.count > 1 else None
            return spawn(said, recipe.nproc, restarts, relay)
        if restarts and SUPERVISED not in os.environ:
            raise UserError(
                f"{_again(recipe)}, but a launcher started this rank and has to start it again: leave it out, and give "
                "torchrun --max-restarts"
            )
        quieten()
        # what libraries print is no result
        with redirect_stdout(sys.stderr):
            result = _rank(recipe, work)
    return (show(result) or 0) if _is_first_rank() else 0


def _again(recipe: Recipe) -> str:
    return f"max_restarts={recipe.max_restarts}" if recipe.max_restarts else f"on_oom={recipe.on_oom!r}"


def quieten() -> None:
    """Libraries keep their news to themselves; whoever sets their variables, or -W, hears them."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not (sys.stderr.isatty() and _is_first_rank()):
        os.environ.setdefault("TQDM_DISABLE", "1")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _rank(recipe: Recipe, work: Callable[[Recipe, Topology], dict[str, Any]]) -> dict[str, Any]:
    from distrib.topology import connect, read_environment
    from launch.console import show_notes

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
    rank = Rank()
    with rank.hearing():
        store = connect(topology, recipe.hang_timeout_s)
        return rank.run(lambda: work(recipe, topology), topology, store, recipe.hang_timeout_s)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _recipe(arguments: argparse.Namespace) -> Recipe:
    if not arguments.shrink:
        from launch.recipe_file import load_recipe

        return load_recipe(arguments.recipe, arguments.overrides)
    from launch.shrink import load_shrunk

    recipe, notes = load_shrunk(arguments.recipe, arguments.overrides)
    if _is_first_rank() and SUPERVISED not in os.environ:
        for note in notes:
            say(note)
    return recipe


def _data(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: must be at least 1")
    quieten()
    from distrib.topology import Topology
    from launch.data import open_data, show
    from launch.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(recipe)
    data = open_data(recipe, tokenizer, Topology())
    shown = show(recipe, tokenizer, data, arguments.count, arguments.json)
    if arguments.json:
        _show(shown, as_json=True)
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    if launched(os.environ):
        raise UserError("bench starts its own ranks, and a launcher has started this one: call it alone, with nproc=N")
    lengths = _whole_numbers("--lengths", arguments.lengths) if arguments.lengths else [recipe.max_length]
    for flag in ("repeats", "steps"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    quieten()
    from launch.bench import Options, bench
    from launch.device import size_bytes
    from launch.sides import default_sides, sides_of

    sides = sides_of(arguments.strategies) if arguments.strategies else default_sides(recipe)
    _refuse_twice("--strategies", sides)
    _refuse_twice("--lengths", lengths)
    options = Options(
        sides=tuple(sides),
        lengths=tuple(lengths),
        repeats=arguments.repeats,
        steps=arguments.steps,
        budget_bytes=size_bytes("--max-length", arguments.max_length) if arguments.max_length else None,
    )
    with redirect_stdout(sys.stderr):
        result = bench(recipe, options, arguments.output, arguments.resume, arguments.said)
    if arguments.json:
        _show(result, as_json=True)
    else:
        from launch.pages.bench import bench_table

        print(bench_table(result))
    return 0 if any(row["status"] == "ok" for row in result["rows"]) else 1


def _refuse_twice(flag: str, items: Sequence[str | int]) -> None:
    if twice := [item for item in items if items.count(item) > 1]:
        raise UserError(f"{flag}: {twice[0]} is listed twice; name each once")


def _whole_numbers(flag: str, text: str) -> list[int]:
    numbers = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        raise UserError(f"{flag} {text}: must be whole numbers divided by commas, such as 512,2048")
    return numbers


def _plan(arguments: argparse.Namespace) -> int:
    from launch.device import device_of, split_words

    words, arguments.overrides = split_words(arguments.overrides)
    recipe = _recipe(arguments)
    quieten()
    from launch.plan import plan
    from launch.plan_show import check_fit, show, write_fit

    device = device_of(words, recipe.nproc)
    if arguments.nodes:
        return _plan_nodes(arguments, recipe, device)
    if arguments.fit:
        check_fit(arguments.fit)
    with redirect_stdout(sys.stderr):
        result = plan(recipe, device, arguments.strategies, arguments.engines)
    if arguments.json:
        _show(result, as_json=True)
    else:
        show(result)
    if arguments.fit:
        write_fit(arguments.fit, recipe, result)
        print(f"written: {arguments.fit}", file=sys.stderr)
    return 0


def _plan_nodes(arguments: argparse.Namespace, recipe: Recipe, device: Device) -> int:
    if arguments.fit:
        raise UserError(f"--fit {arguments.fit} with --nodes: it is for one number of devices; leave one of them out")
    from launch.plan_scaling import plan_scaling
    from launch.plan_scaling_show import show

    with redirect_stdout(sys.stderr):
        result = plan_scaling(recipe, device, arguments.nodes, arguments.strategies, arguments.engines)
    if arguments.json:
        _show(result, as_json=True)
    else:
        show(result)
    return 0


def _timeline(arguments: argparse.Namespace) -> int:
    recipe = _recipe(arguments)
    from launch.timeline import Options, table, timeline

    asked = {field: getattr(arguments, field) for field in Options.__annotations__}
    result = timeline(recipe, Options(**asked))
    print(json.dumps(result) if arguments.json else table(result))
    return 0


def _strategies(arguments: argparse.Namespace) -> int:
    from launch.listing import listed, strategies_listed

    rows = strategies_listed()
    print(json.dumps({"strategies": rows}, default=str) if arguments.json else listed(rows))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    run = _run_folder(arguments)
    from launch.console import show_notes
    from launch.export import export

    show_notes()
    with redirect_stdout(sys.stderr):
        result = export(run, arguments.output, arguments.merge)
    _show(result, arguments.json)
    return 0


def _checkpoint(arguments: argparse.Namespace) -> int:
    if arguments.action not in CHECKPOINT_ACTIONS:
        raise choose("checkpoint", arguments.action, CHECKPOINT_ACTIONS)
    run = _run_folder(arguments)
    from launch import checkpoints

    work = {"verify": checkpoints.verify, "list": checkpoints.listed, "repair": checkpoints.repair}
    result = work[arguments.action](run)
    print(json.dumps(result) if arguments.json else checkpoints.said(arguments.action, result))
    return 2 if result.get("newest") == "damaged" else 0


def _report(arguments: argparse.Namespace) -> int:
    from launch.pages.run import write_pages

    _show(write_pages(_run_folder(arguments)), arguments.json)
    return 0


def _run_folder(arguments: argparse.Namespace) -> Path:
    run: Path = arguments.run
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; give the output_dir of a recipe that was trained")
    if os.path.lexists(run / "recipe.lock.yaml"):
        from launch.run_folder import refuse_links

        refuse_links(run)
    return run


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
        json.dumps(clean(recipe.model_dump(mode="json"))) if arguments.json else dump_recipe(recipe),
        end="\n" if arguments.json else "",
    )
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.recipe is None and arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: changes a recipe, and none is given: ebbtide doctor RECIPE")
    recipe = _recipe(arguments) if arguments.recipe else None
    from launch.doctor import doctor

    quieten()
    doctor(recipe, arguments.json)
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
    "verify": _verify,
    "data": _data,
    "plan": _plan,
    "bench": _bench,
    "timeline": _timeline,
    "strategies": _strategies,
    "export": _export,
    "checkpoint": _checkpoint,
    "report": _report,
    "recipe": _recipe_command,
    "doctor": _doctor,
}
WITH_RECIPE = ("train", "verify", "data", "plan", "bench", "timeline", "recipe", "doctor")
