"""Recipes that are wrong by construction: the shipped ones with one thing changed, and what the refusal must name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = [path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
CANARY = "canary"
ADAPTERS = ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit"]

COUNTS = [
    "max_length",
    "nproc",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "global_batch_size",
    "max_steps",
    "logging_steps",
    "eval_steps",
    "eval_rows",
    "save_steps",
    "save_total_limit",
]
NUMBERS = [
    "num_train_epochs",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lora_alpha",
    "lora_dropout",
    "warmup_ratio",
]
SWITCHES = ["bf16", "compile", "streaming", "packing", "verify", "trust_remote_code", "load_in_4bit"]
TEXTS = ["model_name_or_path", "output_dir"]
NAMES = ["init", "lr_scheduler_type", "bnb_4bit_quant_type", "report_to"]
KEYS = [*COUNTS, *NUMBERS, *SWITCHES, *TEXTS, *NAMES]
NO_NUMBER = ["x", "1_000", "0b1", "12:30", "[]", "[1]", "{}", "{a: 1}", "true", ".nan", ".inf", "-.inf", "'3'", "1e999"]
WRONG = {
    **{key: [*NO_NUMBER, "0", "-1", "1.5", "-0", "-" + "9" * 500] for key in COUNTS},
    **{key: [*NO_NUMBER, "-1", "-1e-9", "2001-01-01"] for key in NUMBERS},
    **{key: ["0", "1", "yes", "on", "'true'", "[]", "{}", "null", "[true]", "2.0"] for key in SWITCHES},
    **{key: ["7", "1.5", "true", "null", "[]", "[a]", "{a: b}", "''", ".nan"] for key in TEXTS},
    **{key: ["7", "none_", "[]", "null", "{}", "''", "true", "Cosine"] for key in NAMES},
}
SECTIONS = [
    ("engine: {name: ddp, stage: 3}", "engine.stage"),
    ("engine: {name: zero, stage: 0}", "engine.stage"),
    ("engine: [ddp]", "engine"),
    ("engine: {stage: 2}\nobjective: {name: engine}", "engine"),
    ("engine: {name: [zero]}", "engine.name"),
    ("engine: {name: zero, offload: 1}", "engine.offload"),
    ("engine: {name: fsdp2, tensor_parallel: 0}", "engine.tensor_parallel"),
    ("engine: {name: ddp, context_parallel: 0}", "engine.context_parallel"),
    ("engine: null", "engine"),
    ("objective: {name: dpo, clip: 1}", "objective.clip"),
    ("objective: {name: grpo, beta: -1}", "objective.beta"),
    ("objective: {name: sft, beta: 1}", "objective.beta"),
    ("objective: {name: {}}", "objective"),
    ("objective: [sft]", "objective"),
    ("objective: 3", "objective"),
    ("objective: {name: DPO}", "objective.name"),
    ("dataset: []", "dataset"),
    ("dataset: [[stdlib]]", "dataset.0"),
    ("dataset: {weight: 1}", "dataset"),
    ("dataset: {name: stdlib, weight: 0}", "dataset.0.weight"),
    ("dataset: [stdlib, 3]", "dataset.1"),
    ("dataset: {name: ''}", "dataset.0.name"),
    ("dataset: {name: a, weight: .nan}", "dataset.0.weight"),
    ("strategy: []", "strategy"),
    ("strategy: [plain, plain]", "strategy"),
    ("strategy: {chunk: 1}", "strategy.0"),
    ("strategy: {name: 3}", "strategy.0.name"),
    ("strategy: 3", "strategy"),
    ("strategy: [{}]", "strategy.0"),
    ("optimizer: {betas: [0.9]}", "optimizer.betas"),
    ("optimizer: {betas: [0.9, 2]}", "optimizer.betas.1"),
    ("optimizer: {betas: 0.9}", "optimizer.betas"),
    ("optimizer: {eps: 0}", "optimizer.eps"),
    ("optimizer: adamW", "optimizer"),
    ("optimizer: {name: adam, momentum: 0.5}", "optimizer.momentum"),
    ("energy: {idle_s: -1}", "energy.idle_s"),
    ("energy: {intensity_source: x}", "energy.intensity_source"),
    ("energy: 3", "energy"),
    ("profile: {steps: [3, 1]}", "profile.steps"),
    ("profile: {steps: [1]}", "profile.steps"),
    ("profile: {}", "profile"),
    ("profile: {steps: [a, b]}", "profile.steps"),
    ("seed: 4294967296", "seed"),
    ("seed: -1", "seed"),
    ("config_overrides: []", "config_overrides"),
    ("config_overrides: x", "config_overrides"),
    ("warmup_steps: 1\nwarmup_ratio: 0.5", "warmup_steps"),
    ("lora_r: 0\nlora_dropout: 0.5", "lora_dropout"),
    ("eval_steps: 3\neval_dataset: null", "eval_steps"),
    ("streaming: true\nmax_steps: null", "streaming"),
    ("packing: true\nobjective: dpo", "packing"),
    ("load_in_4bit: true\nlora_r: 0", "load_in_4bit"),
    ("trust_remote_code: true\nmodel_revision: main", "trust_remote_code"),
    ("trust_remote_code: true\nmodel_revision: " + "g" * 40, "trust_remote_code"),
    ("output_dir: ../elsewhere", "output_dir"),
    ("output_dir: runs/../../../etc", "output_dir"),
    ('output_dir: "a\\u202eb"', "output_dir"),
    ("lora_target_modules: [1]", "lora_target_modules"),
    ("lora_target_modules: {}", "lora_target_modules"),
    ("resume_from_checkpoint: 3", "resume_from_checkpoint"),
]
TAGS = [
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    f"!!python/object/apply:subprocess.check_output [[touch, {CANARY}]]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/new:os.system [x]",
    "!!python/tuple [1, 2]",
    "!!binary aGk=",
    "!!set {a}",
    "!mine {a: 1}",
    "!!int '3'",
    "!!timestamp 2001-01-01",
    "!!omap [a: 1]",
    "! x",
]


@dataclass(frozen=True)
class Wrong:
    """`says` is in the refusal: a key, or a line."""

    kind: str
    text: bytes
    says: str
    overrides: tuple[str, ...] = ()


def without(text: str, *keys: str) -> str:
    """The recipe's lines without those of these top-level keys, whose values are on the same line."""
    return "".join(line for line in text.splitlines(keepends=True) if line.split(":")[0] not in keys)


def line_of(text: str, added: str) -> str:
    return f"line {text[: text.index(added)].count(chr(10)) + 1}"


def value(dice: random.Random, text: str) -> Wrong:
    key = dice.choice(KEYS)
    return Wrong("value", f"{without(text, key)}{key}: {dice.choice(WRONG[key])}\n".encode(), f"{key}=")


def override(dice: random.Random, text: str) -> Wrong:
    key = dice.choice(COUNTS + NUMBERS + SWITCHES)
    given = dice.choice([given for given in WRONG[key] if given != "'true'" and given != "'3'"])
    return Wrong("override", text.encode(), key, (f"{key}={given}",))


def odd_override(dice: random.Random, text: str) -> Wrong:
    given, says = dice.choice(
        [
            ("..=1", "is not a key"),
            ("nonsense.x=1", "nonsense"),
            ("seed=", "seed"),
            ("--seed", "seed"),
            ("output_dir=../x", "output_dir"),
            ("output_dir=a\x1b[2Jb", "output_dir"),
            ("dataset.9.weight=1", "dataset"),
            ("output_dir=a\nb", "output_dir"),
            ("engine.name=" + "z" * 9000, "engine.name"),
            ("seed=" + "9" * 9000, "seed"),
            ("seed.x.y=1", "seed"),
            ("config_overrides=" + "[" * 500, "config_overrides"),
            ("seed=!!int 3", "seed"),
        ]
    )
    return Wrong("override", text.encode(), says, (given,))


def section(dice: random.Random, text: str) -> Wrong:
    given, says = dice.choice(SECTIONS)
    keys = [line.split(":")[0] for line in given.splitlines()]
    return Wrong("section", f"{without(text, *keys, *ADAPTERS, 'packing', 'strategy')}{given}\n".encode(), says)


def unknown_key(dice: random.Random, text: str) -> Wrong:
    key = dice.choice(KEYS)
    spot = dice.randrange(len(key))
    odd = dice.choice(
        [key[:spot] + key[spot + 1 :], key + key[spot], key.upper(), key[:spot] + "\u0455" + key[spot + 1 :]]
    )
    if odd in KEYS or odd in ("", key):
        odd = f"{key}_"
    return Wrong("unknown key", f"{text}{odd}: 1\n".encode(), odd[:40])


def nested_key(dice: random.Random, text: str) -> Wrong:
    key = dice.choice(["engine", "objective", "optimizer", "energy", "profile", "dataset"])
    odd = dice.choice(["nme", "Name", "stagee", "x" * 30, "__class__", "name ", "weigth"])
    return Wrong("unknown key", f"{without(text, key)}{key}: {{{odd}: 1}}\n".encode(), key)


def duplicate(dice: random.Random, text: str) -> Wrong:
    line = dice.choice([line for line in text.splitlines() if ":" in line and not line.startswith("#")])
    count = len(text.splitlines())
    return Wrong("duplicate", f"{text}{line}\n".encode(), f"line {count + 1}")


def alias(dice: random.Random, text: str) -> Wrong:
    bomb = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 9))
    added = dice.choice(["extra: &a 1\n", "extra: *a\n", "a: &x {b: *x}\n", "<<: {seed: 1}\n", f"b0: &b0 [x]\n{bomb}"])
    return Wrong("alias", f"{text}{added}".encode(), line_of(text + added, added))


def tag(dice: random.Random, text: str) -> Wrong:
    added = f"{dice.choice([key for key in KEYS if f'{key}:' not in text])}: {dice.choice(TAGS)}\n"
    return Wrong("tag", f"{text}{added}".encode(), line_of(text + added, added))


def deep(dice: random.Random, text: str) -> Wrong:
    depth = dice.choice([19, 25, 200, 20_000])
    brackets = dice.choice([("[", "]"), ("{a: ", "}")])
    added = f"config_overrides: {{a: {brackets[0] * depth}1{brackets[1] * depth}}}\n"
    return Wrong("depth", f"{text}{added}".encode(), "line" if len(added) < 60_000 else "at most")


def control(dice: random.Random, text: str) -> Wrong:
    added = dice.choice(['"a\\0b"', '"\\ud800"', '"a\\x1b[2J"', '"\\x07"', '"\\x7f"', '"\\u0008"'])
    whole = f"{without(text, 'output_dir')}output_dir: {added}\n"
    return Wrong("control", whole.encode(), line_of(whole, "output_dir"))


def raw(dice: random.Random, text: str) -> Wrong:
    spot = dice.randrange(len(text.encode()))
    bad = dice.choice([b"\x00", b"\x01", b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x1b[2J", b"\x80"])
    return Wrong("bytes", text.encode()[:spot] + bad + text.encode()[spot:], "text")


def syntax(dice: random.Random, text: str) -> Wrong:
    added = dice.choice(
        [
            "seed: [1\n",
            "seed: {1\n",
            "seed: 'x\n",
            'seed: "x\n',
            "\tseed: 1\n",
            "seed: 1: 2\n",
            "@seed: 1\n",
            "%x\n",
            "seed: |\n x\ny\n",
            "? [a]\n: b\n",
            "1: x\n",
            "null: x\n",
            "[a]: x\n",
            "- a\n",
        ]
    )
    return Wrong("syntax", f"{text}{added}".encode(), "line")


def shape(dice: random.Random, text: str) -> Wrong:
    found = dice.choice(["", "# nothing\n", "- a\n", "text", "3", "[]", "null", "--- \n...\n", "'x'"])
    return Wrong("shape", found.encode(), "recipe")


def documents(dice: random.Random, text: str) -> Wrong:
    return Wrong("documents", f"{text}---\nseed: 1\n".encode(), f"line {len(text.splitlines()) + 1}")


def size(dice: random.Random, text: str) -> Wrong:
    return Wrong("size", text.encode() + b"# " + b"x" * dice.choice([65_536, 300_000, 3_000_000]), "at most")


MUTATIONS: list[Callable[[random.Random, str], Wrong]] = [
    value,
    value,
    value,
    override,
    odd_override,
    section,
    section,
    section,
    unknown_key,
    nested_key,
    duplicate,
    alias,
    tag,
    tag,
    deep,
    control,
    raw,
    syntax,
    shape,
    documents,
    size,
]


def wrong_recipe(seed: int) -> Wrong:
    dice = random.Random(seed)
    return MUTATIONS[seed % len(MUTATIONS)](dice, dice.choice(SHIPPED))
