"""The words of a command: what each command takes, and which of them are the recipe's."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

from distrib.errors import UserError

OVERRIDES = "key=value and --key value change the recipe; dots reach into sections: engine.name=zero"
DEVICE = (
    f"{OVERRIDES}; device.memory=80GiB device.count=8 device.flops=400T plan for another device than this machine's"
)
FLAGS = ("--json", "--schema", "--help", "-h")
SHRINK = ("--shrink",)
OWN_FLAGS: dict[str, tuple[str, ...]] = dict.fromkeys(("train", "verify", "data", "plan", "timeline", "recipe"), SHRINK)
OWN_FLAGS["bench"] = ("--resume", *SHRINK)
CHECKPOINT_ACTIONS = ("verify", "list", "repair")
VALUED_FLAGS = {
    "data": ("--count",),
    "verify": ("--length",),
    "plan": ("--strategies", "--engines", "--fit"),
    "timeline": ("--schedule", "--micro-batches", "--stages", "--costs", "--recorded", "--output"),
    "bench": ("--strategies", "--lengths", "--repeats", "--steps", "--max-length", "--output"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows the usage)")


def command_parser() -> Parser:
    parser = Parser(prog="ebbtide", description="Train large language models with memory-efficient backpropagation.")
    parser.add_argument("--version", action="store_true", help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, help: str, epilog: str | None = None) -> Parser:
        made: Parser = commands.add_parser(name, help=help, description=help, epilog=epilog, allow_abbrev=False)
        made.add_argument("--json", action="store_true", help="print one JSON object for machines")
        return made

    train = command("train", "train a model as a recipe says, or go on with its unfinished run", OVERRIDES)
    verify = command("verify", "compare the gradients of a recipe's strategies with plain autograd's", OVERRIDES)
    verify.add_argument("--length", type=int, metavar="T", help="tokens of a row (128)")
    data = command("data", "show the first samples' tokens with their loss mask", OVERRIDES)
    data.add_argument("--count", type=int, default=3, metavar="N", help="samples to show (3)")
    bench = command("bench", "measure every strategy on this model and machine, side by side", OVERRIDES)
    bench.add_argument("--strategies", metavar="A,B", help="which, with fields as in streambp:chunk=512; also hf")
    bench.add_argument("--lengths", metavar="N,M", help="lengths in tokens (the recipe's max_length)")
    bench.add_argument("--repeats", type=int, default=3, metavar="N", help="times that all are measured in turn (3)")
    bench.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps of a repeat (5)")
    bench.add_argument("--max-length", metavar="MEMORY", help="look for the longest length within, such as 24GiB")
    bench.add_argument("--output", type=Path, metavar="FOLDER", help="where to (the recipe's output_dir with -bench)")
    bench.add_argument("--resume", action="store_true", help="finish a comparison that was stopped")
    plan = command("plan", "what fits: memory by class and longest sequence of every strategy", DEVICE)
    plan.add_argument("--strategies", metavar="A,B", help="rows to plan, as plain,streambp:chunk=1024,gc+ce")
    plan.add_argument("--engines", metavar="A,B", help="of ddp, fsdp2, zero1, zero2, zero3 (the recipe's)")
    plan.add_argument("--fit", type=Path, metavar="FILE", help="write the recipe with what is recommended")
    timeline = command("timeline", "a pipeline's schedule as a picture, simulated or as a run recorded it", OVERRIDES)
    timeline.add_argument("--schedule", metavar="A,B", help="names or files (the recipe's); see docs/timeline.md")
    timeline.add_argument("--micro-batches", type=int, metavar="M", help="(the recipe's gradient_accumulation_steps)")
    timeline.add_argument("--stages", type=int, metavar="N", help="ranks of the pipeline (the recipe's)")
    timeline.add_argument("--costs", metavar="F:I:W", help="of forward, gradient of input and of weights (1:1:1)")
    timeline.add_argument("--recorded", type=Path, metavar="RUN", help="what a run recorded: its folder, or the file")
    timeline.add_argument("--output", type=Path, metavar="FILE", help="an .svg, a .png, or a trace as .json")
    command("strategies", "list the ways to compute gradients")
    export = command("export", "write a run's model as a folder that Transformers or PEFT loads")
    export.add_argument("run", metavar="RUN", type=Path, help="the run's output folder")
    export.add_argument("--output", type=Path, metavar="FOLDER", help="where to (RUN/final, or RUN/merged)")
    export.add_argument("--merge", action="store_true", help="merge a LoRA adapter into its model")
    kept = command("checkpoint", "verify, list or repair the checkpoints of a run")
    kept.add_argument("action", metavar="ACTION", help=f"{', '.join(CHECKPOINT_ACTIONS)}: see docs/runs.md")
    kept.add_argument("run", metavar="RUN", type=Path, help="the run's output folder")
    report = command("report", "write a run's report.html and report.md anew, finished or not")
    report.add_argument("run", metavar="RUN", type=Path, help="the run's output folder")
    recipe = command("recipe", "check a recipe and show every key of it", OVERRIDES)
    recipe.add_argument("--schema", action="store_true", help="print the JSON schema, for editors")
    needing = (train, verify, data, plan, bench, timeline)
    for needs, made in (*((None, made) for made in needing), ("?", recipe)):
        made.usage = f"{made.prog} [options] RECIPE [key=value ...]"
        made.add_argument("recipe", metavar="RECIPE", nargs=needs, help="a YAML file")
        made.add_argument(*SHRINK, action="store_true", help="the same recipe with tiny sizes, on two ranks at most")
    return parser


def split(words: list[str], switches: Sequence[str], valued: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own words, and the recipe's overrides among them."""
    own: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        name = word.partition("=")[0]
        if word in FLAGS or word in switches or name in valued:
            own.append(word)
            if word in valued:
                own.extend([value for value in [next(rest, None)] if value is not None])
        elif word.startswith("--"):
            _refuse_misspelt(name, [*FLAGS, *switches, *valued])
            overrides.append(word)
            if "=" not in word:
                overrides.extend([value for value in [next(rest, None)] if value is not None])
        elif re.match(r"[A-Za-z_][\w.-]*=", word):
            overrides.append(word)
        else:
            own.append(word)
    return own, overrides


def _refuse_misspelt(flag: str, flags: Sequence[str]) -> None:
    near = get_close_matches(flag, flags, n=1, cutoff=0.7)
    if near:
        from launch.recipe import Recipe

        if flag[2:].split(".")[0].replace("-", "_") not in Recipe.model_fields:
            raise UserError(f"unknown argument {flag}, did you mean {near[0]}?")
