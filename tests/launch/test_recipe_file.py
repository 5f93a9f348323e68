"""Recipes from files and overrides: what is read, what is refused and how that is said."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrib.errors import Refused, UserError
from launch import recipe_schema
from launch.recipe import DPO, GRPO, Energy, Engine, Optimizer, Recipe, Source
from launch.recipe_file import dump_recipe, global_batch, load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD = """\
model_name_or_path: tiny
dataset: [stdlib, {name: more, weight: 0.5}]
objective: {name: sft, label_smoothing: 0.1}
strategy: {name: plain}
engine: {name: zero, stage: 3, offload: true}
max_length: 512
learning_rate: 1e-4
optimizer: {name: adamw, betas: [0.9, 0.95]}
lora_target_modules: [q_proj, v_proj]
config_overrides: {rope_parameters: {rope_theta: 1.0e6}, tie: true}
output_dir: runs/x
"""


def load(folder: Path, text: str | bytes, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(str(path), overrides)


def refusal(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    return said.replace(f"{folder}/recipe.yaml", "FILE")


def test_values_are_read_with_their_types(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.learning_rate == 0.0001
    assert isinstance(recipe.learning_rate, float)
    assert [(source.name, source.weight) for source in recipe.dataset] == [("stdlib", 1.0), ("more", 0.5)]
    assert recipe.engine == Engine(name="zero", stage=3, offload=True)
    assert recipe.optimizer.betas == (0.9, 0.95)
    assert recipe.config_overrides == {"rope_parameters": {"rope_theta": 1e6}, "tie": True}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E+3", 1000.0), (".5", 0.5), ("5.", 5.0), ("-0", 0), ("0o17", 15), ("0x1F", 31),
        ("007", 7), ("on", "on"), ("yes", "yes"), ("n", "n"), ("12:30", "12:30"), ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"), ("~", None), ("", None), ("NULL", None), ("True", True), ("'1'", "1"),
        ("=", "="), ("0b1", "0b1"), ("1e", "1e"),
    ],
)  # fmt: skip
def test_plain_scalars_follow_yaml_1_2(tmp_path: Path, text: str, value: Any) -> None:
    read = load(tmp_path, f"config_overrides: {{key: {text}}}").config_overrides["key"]
    assert (read, type(read)) == (value, type(value))


def test_whole_floats_are_whole_numbers_and_whole_numbers_are_floats(tmp_path: Path) -> None:
    recipe = load(tmp_path, "max_steps: 1e3\nlora_alpha: 8\nengine: {name: zero, stage: 1.0}")
    assert (recipe.max_steps, recipe.lora_alpha, recipe.engine.stage) == (1000, 8.0, 1)
    assert (type(recipe.max_steps), type(recipe.lora_alpha)) == (int, float)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "FILE: is empty"),
        ("# nothing\n", "FILE: is empty"),
        ("- a\n- b\n", "FILE: is not a mapping"),
        ("just text", "FILE: is not a mapping"),
        ("a: &x 1\nb: *x", "FILE line 1: anchors and aliases are refused"),
        ("max_steps: 1\nb: *x", "FILE line 2: anchors and aliases are refused"),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "FILE line 3: 'seed' is given twice"),
        ("engine:\n  name: ddp\n  'name': ddp\n", "FILE line 3: 'name' is given twice"),
        ("<<: {seed: 1}", "FILE line 1: merge keys (<<) are refused"),
        ("seed: !!int '1'", "FILE line 1: tags are refused (tag:yaml.org,2002:int)"),
        ("seed: !!python/object/apply:os.system ['true']", "FILE line 1: tags are refused"),
        ("seed: 1\n---\nseed: 2", "FILE line 2: a second document"),
        ("1: x", "FILE line 1: a key must be text, not 1"),
        ("[a, b]: x", "FILE line 1: a key must be text, not a list or a mapping"),
        ("seed: [1", "FILE line 1: "),
        ("seed: 1\n\tb: 2", "FILE line 2: "),
        ("config_overrides: " + "[" * 30 + "]" * 30, "FILE line 1: nested deeper than 20"),
        ("[" * 5000, "FILE line 1: nested deeper than 20"),
        ("output_dir: '" + "x" * 70000 + "'", "at most 65536 are read"),
        ('output_dir: "a\\0b"', "FILE line 1: control characters"),
        ('output_dir: "\\ud800"', "FILE line 1: control characters"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "FILE: is not a text file"),
        (b"seed: \x01", "FILE: not text"),
        ("seed: 99999999999999999999", "seed=99999999999999999999: must be a whole number >= 0"),
    ],
)
def test_traps_of_yaml_are_refused_with_their_line(tmp_path: Path, text: str | bytes, said: str) -> None:
    assert said in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimiser: adamw", "FILE: unknown key 'optimiser', did you mean optimizer?"),
        ("engine: {name: zero, stge: 3}", "unknown key 'engine.stge', did you mean stage? (choose context_par"),
        ("dataset: [{name: a, wieght: 2}]", "unknown key 'dataset.0.wieght', did you mean weight?"),
        ("objective: {name: dpo, clip: 1}", "unknown key 'objective.clip' (choose beta, label_smoothing, "),
        ("qqq: 1", "unknown key 'qqq' (`ebbtide recipe --schema` lists the keys)"),
        ("max_steps: 1.5", "max_steps=1.5: must be a whole number > 0, or null"),
        ("max_steps: '3'", "max_steps='3': must be a whole number > 0, or null"),
        ("max_steps: 0", "max_steps=0: must be a whole number > 0, or null"),
        ("max_steps: true", "max_steps=true: must be a whole number > 0"),
        ("learning_rate: fast", "learning_rate='fast': must be a number >= 0"),
        ("learning_rate: .inf", "learning_rate=inf: must be a number >= 0, and finite"),
        ("learning_rate: .nan", "learning_rate=nan: must be a number >= 0"),
        ("warmup_ratio: 1.5", "warmup_ratio=1.5: must be a number >= 0 and <= 1"),
        ("packing: yes", "packing='yes': must be true or false"),
        ("packing: 1", "packing=1: must be true or false"),
        ("output_dir: 7", "output_dir=7: must be text"),
        ("output_dir: ''", "output_dir='': must be text that is not empty"),
        ("lr_scheduler_type: cosin", "choose cosine, linear, warmup_stable_decay, constant (did you mean cosine?)"),
        ("engine: fsdp3", "engine.name='fsdp3': choose ddp, fsdp2, zero (did you mean fsdp2?)"),
        ("engine: 3", "engine=3: must be ddp, fsdp2, zero, or a mapping of name, stage, offload, tensor_parallel"),
        ("engine: {name: zero, stage: 4}", "engine.stage=4: must be a whole number >= 1 and <= 3"),
        ("engine: {name: zero, stage: true}", "engine.stage=true: must be a whole number >= 1 and <= 3"),
        ("objective: ppo", "objective.name='ppo': choose sft, dpo, grpo"),
        ("objective: [sft]", "objective=['sft']: must be sft, dpo, grpo"),
        ("strategy: {chunk: 3}", "strategy.0: 'name' is missing"),
        ("strategy: []", "strategy=[]: must be text, or a mapping of name"),
        ("dataset: [{weight: 1}]", "dataset.0: 'name' is missing"),
        ("dataset: [3]", "dataset.0=3: must be text, or a mapping of name, weight"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas=(0.9,): must be a list of 2: a number >= 0 and <= 1"),
        ("optimizer: {betas: [0.9, 2]}", "optimizer.betas.1=2: must be a number >= 0 and <= 1"),
        ("lora_target_modules: 3", "lora_target_modules=3: must be text, or a list of text"),
        ("resume_from_checkpoint: 3", "resume_from_checkpoint=3: must be true or false, or text"),
        ("config_overrides: 3", "config_overrides=3: must be a mapping"),
        ("engine: {name: ddp, stage: 3}", "engine.stage is a key of zero, not of ddp"),
        ("engine: {name: zero, tensor_parallel: 2}", "engine.tensor_parallel is a key of fsdp2, not of zero"),
        ("trust_remote_code: true", "trust_remote_code=true with model_revision=null: pin the code"),
        ("trust_remote_code: true\nmodel_revision: main", "model_revision=main: pin the code to a full"),
        ("packing: true\nobjective: dpo", "packing=true with objective=dpo: only sft packs"),
        ("streaming: true", "streaming=true without max_steps"),
        ("eval_steps: 5", "eval_steps=5 without eval_dataset"),
        ("eval_samples: 5", "eval_samples=5 without eval_steps"),
        ("warmup_steps: 5\nwarmup_ratio: 0.1", "warmup_steps=5 and warmup_ratio=0.1: give one of them"),
        ("lora_dropout: 0.1", "lora_dropout=0.1 with lora_r=0"),
        ("strategy: [plain, plain]", "plain is listed twice"),
        ("optimizer: {name: adamw, momentum: 0.9}", "optimizer.momentum=0.9 with adamw"),
        ("optimizer: {name: sgd, betas: [0.5, 0.5]}", "optimizer.betas=[0.5, 0.5] with sgd"),
        ("energy: {grams_co2_per_kwh: 4}", "energy.grams_co2_per_kwh=4.0 without energy.intensity_source: give both"),
        ("energy: {intensity_source: x}", "energy.intensity_source='x' without energy.grams_co2_per_kwh: give both"),
        ("energy: {idle_s: -1}", "energy.idle_s=-1: must be a number >= 0"),
        ("energy: {idle: 1}", "unknown key 'energy.idle', did you mean idle_s?"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_one_line_with_the_key_the_value_and_the_choices(
    tmp_path: Path, text: str, said: str
) -> None:
    assert said in refusal(tmp_path, text)


def test_unsupported_combinations_are_refused_for_recipes_from_python_too() -> None:
    with pytest.raises(Refused):
        Recipe(packing=True, objective=GRPO(name="grpo"))
    with pytest.raises(Refused):
        Engine(name="fsdp2", offload=True)


@pytest.mark.parametrize("kind", ["missing", "folder", "under a file", "nul"])
def test_a_path_that_is_no_file_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("seed: 1")
    path = {"missing": "no.yaml", "folder": ".", "under a file": "file/x.yaml", "nul": "a\0b"}[kind]
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / path))
    assert "\n" not in str(caught.value)


def engine(name: str, stage: int, offload: bool) -> dict[str, Any]:
    return {"name": name, "stage": stage, "offload": offload, "tensor_parallel": 1, "context_parallel": 1}


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["max_steps=5"], {"max_steps": 5}),
        (["--max_steps", "5"], {"max_steps": 5}),
        (["--max-steps=5"], {"max_steps": 5}),
        (["max_steps=null"], {"max_steps": None}),
        (["max_steps=5", "max_steps=6"], {"max_steps": 6}),
        (["model_name_or_path=007"], {"model_name_or_path": "007"}),
        (["model_name_or_path=true"], {"model_name_or_path": "true"}),
        (["model_name_or_path=a=b"], {"model_name_or_path": "a=b"}),
        (["model_name_or_path=a\n  b"], {"model_name_or_path": "a\n  b"}),
        (["model_revision=null"], {"model_revision": None}),
        (["model_revision=1e5"], {"model_revision": "1e5"}),
        (["learning_rate=1e-3"], {"learning_rate": 0.001}),
        (["lora_target_modules=[a, b]"], {"lora_target_modules": ["a", "b"]}),
        (["lora_target_modules=.*proj"], {"lora_target_modules": ".*proj"}),
        (["resume_from_checkpoint=false"], {"resume_from_checkpoint": False}),
        (["resume_from_checkpoint=runs/a"], {"resume_from_checkpoint": "runs/a"}),
        (["engine=fsdp2"], {"engine": engine("fsdp2", 2, False)}),
        (["engine.stage=1"], {"engine": engine("zero", 1, True)}),
        (["engine.name=ddp"], {"engine": engine("ddp", 2, False)}),
        (["engine.name=zero"], {"engine": engine("zero", 3, True)}),
        (["engine.stage=1", "engine=zero"], {"engine": engine("zero", 1, False)}),
        (["objective.name=dpo", "objective.beta=1"], {"objective": DPO(name="dpo", beta=1.0).model_dump()}),
        (["objective.z_loss=1"], {"objective": {"name": "sft", "label_smoothing": 0.1, "z_loss": 1.0}}),
        (["strategy.chunk=512"], {"strategy": [{"name": "plain", "chunk": 512}]}),
        (["strategy.chunk=5", "strategy.name=other"], {"strategy": [{"name": "other", "chunk": 5}]}),
        (["strategy.0.chunk=5"], {"strategy": [{"name": "plain", "chunk": 5}]}),
        (["optimizer=sgd", "optimizer.eps=1"], {"optimizer": Optimizer(name="sgd", eps=1).model_dump()}),
        (["energy.idle_s=0"], {"energy": Energy(idle_s=0).model_dump()}),
        (["config_overrides={}", "config_overrides.a.b=1e6"], {"config_overrides": {"a": {"b": 1e6}}}),
    ],
)  # fmt: skip
def test_overrides_are_typed_by_the_schema(tmp_path: Path, overrides: list[str], found: dict[str, Any]) -> None:
    assert load(tmp_path, GOOD, *overrides).model_dump(include=set(found)) == found


def test_overrides_reach_into_lists_and_absent_sections(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD, "dataset.1.weight=2", "dataset.0.name=third")
    assert [(source.name, source.weight) for source in recipe.dataset] == [("third", 1.0), ("more", 2.0)]
    recipe = load(tmp_path, "seed: 1", "dataset.weight=2", "engine.name=zero", "engine.stage=1", "strategy.k=v")
    assert recipe.dataset == [Source(name="stdlib", weight=2.0)]
    assert recipe.engine == Engine(name="zero", stage=1)
    assert recipe.strategy[0].model_dump() == {"name": "plain", "k": "v"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.stge=3", "unknown key 'engine.stge', did you mean stage?"),
        ("learning_rat=3", "unknown key 'learning_rat', did you mean learning_rate?"),
        ("max_steps=soon", "max_steps='soon': must be a whole number > 0, or null"),
        ("max_steps=", "max_steps needs a value"),
        ("--max_steps", "max_steps needs a value"),
        ("max_steps.x=3", "max_steps={'x': 3}: must be a whole number"),
        ("model_name_or_path.x=3", "has no keys inside"),
        ("output_dir=[a]", "output_dir=['a']: must be text"),
        ("output_dir=a\nb", "output_dir='a\\nb': name a folder without `..` and control characters"),
        ("dataset.weight=3", "dataset has 2 entries; choose one by its index"),
        ("dataset.7.weight=3", "dataset has 2 entries, counted from 0"),
        ("dataset.0=a", "name the key to set, as dataset.0.name"),
        ("..=3", "is not a key"),
        ("justaword", "an override is key=value or --key value"),
        ("seed=\udc80", "the value is not UTF-8 text"),
        ("nproc=0", "nproc=0: must be a whole number > 0"),
        ("dataset=[]", "dataset=[]: must be"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path: Path, override: str, said: str) -> None:
    assert said in refusal(tmp_path, GOOD, override)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(path))
    assert load(tmp_path, dump_recipe(recipe)) == recipe
    assert all(source.name == "stdlib" or Path(source.name).exists() or "/" in source.name for source in recipe.dataset)


def test_a_dumped_recipe_loads_back_to_the_same_one(tmp_path: Path) -> None:
    words = [
        "1e-4",
        "007",
        "on",
        "null",
        "~",
        "<<",
        "=",
        "2001-01-01",
        "é: #",
        " x ",
        "- a",
        "0x1",
        "12:30",
        "a\nb",
        "!t",
    ]
    shared = [1, 1e-7, None, True]
    overrides = {"words": words, "one": shared, "two": shared, "deep": {"on": {"yes": "no"}}}
    recipe = load(tmp_path, GOOD).model_copy(update={"config_overrides": overrides, "output_dir": "1e5"})
    text = dump_recipe(recipe)
    assert load(tmp_path, text) == recipe
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields)


def test_a_data_path_is_looked_for_in_the_working_directory_then_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    for folder in (home, work):
        folder.mkdir()
        (folder / "both.jsonl").write_text("{}")
    (home / "stdlib").mkdir()
    (home / "beside.jsonl").write_text("{}")
    monkeypatch.chdir(work)
    recipe = load(home, "dataset: [both.jsonl, beside.jsonl, hub/name, stdlib]\neval_dataset: beside.jsonl")
    assert [source.name for source in recipe.dataset] == [
        "both.jsonl",
        str(home / "beside.jsonl"),
        "hub/name",
        "stdlib",
    ]
    assert recipe.eval_dataset == [Source(name=str(home / "beside.jsonl"))]


@pytest.mark.parametrize(
    ("fields", "world", "rows"),
    [
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 4, 24),
        ({"per_device_train_batch_size": 2, "global_batch_size": 24}, 4, 24),
        ({"global_batch_size": 3}, 3, 3),
        ({"global_batch_size": 8, "gradient_accumulation_steps": 4}, 2, 8),
    ],
)
def test_the_global_batch(fields: dict[str, int], world: int, rows: int) -> None:
    assert global_batch(Recipe(**fields), world) == rows  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "choices"), [(10, "choose 8 or 12"), (3, "choose 4")])
def test_a_global_batch_that_does_not_divide_names_the_nearest(rows: int, choices: str) -> None:
    with pytest.raises(UserError, match=f"global_batch_size={rows} .* multiple of 4; {choices}$"):
        global_batch(Recipe(per_device_train_batch_size=2, global_batch_size=rows), 2)


def test_a_global_batch_and_an_accumulation_that_disagree() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=8 .* on 1 ranks, which make 4: give one$"):
        global_batch(Recipe(global_batch_size=8, gradient_accumulation_steps=4), 1)


def test_the_schema_takes_what_the_loader_takes() -> None:
    root = recipe_schema.schema()
    json.dumps(root)
    assert root["additionalProperties"] is False
    assert set(root["properties"]) == set(Recipe.model_fields)
    assert "required" not in root
    assert root["$defs"]["Strategy"]["additionalProperties"] is True
    assert root["$defs"]["Engine"]["additionalProperties"] is False
    kinds = [option.get("type") or option.get("$ref") for option in root["properties"]["strategy"]["anyOf"]]
    assert kinds == ["string", "#/$defs/Strategy", "array"]
    assert root["properties"]["engine"]["anyOf"][0]["enum"] == ["ddp", "fsdp2", "zero"]


def test_no_key_is_undocumented() -> None:
    root = recipe_schema.schema()
    page = (ROOT / "docs" / "recipe.md").read_text()
    for section in (root, *root["$defs"].values()):
        for key, value in section["properties"].items():
            assert value.get("description") or "const" in value or "enum" in value, key
            assert f"| `{key}` |" in page


def test_the_page_of_keys_shows_the_schema() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()
    assert page == recipe_schema.rewrite(page), "run: python -m launch.recipe_schema docs/recipe.md"


def test_the_recipes_data_is_what_its_script_writes() -> None:
    made: dict[str, Any] = {"__file__": str(ROOT / "recipes/data/generate.py"), "__name__": "generate"}
    exec((ROOT / "recipes/data/generate.py").read_text(), made)
    written = {path.name: path.read_text() for path in (ROOT / "recipes/data").glob("*.jsonl")}
    assert written == made["files"]()


VALUES = [
    *(
        "1",
        "-1",
        "1e400",
        "nan",
        "[]",
        "{}",
        "[[1]]",
        "{a: {b: c}}",
        "''",
        "true",
        "null",
        "x" * 99,
        "9" * 5000,
    ),
    *(
        "&a 1",
        "*a",
        "!!set {a}",
        "<<",
        "é\u2028",
        "'\\'",
        '"\\x00"',
        "0o9",
        "1:2",
        "---",
        "...",
        "%TAG",
        "? a",
        "|",
    ),
    *(
        ">",
        "@",
        "`",
        "[stdlib, 3]",
        "{name: 3}",
        "{name: zero, stage: [1]}",
        "{name: [dpo]}",
        "{name: {a: b}}",
    ),
]
KEYS = [
    *Recipe.model_fields,
    "engine.stage",
    "dataset.0.weight",
    "strategy.0.name",
    "objective.name",
    "x.y",
    "a b",
    "",
]


def mutated(dice: random.Random) -> tuple[bytes, list[str]]:
    lines = GOOD.splitlines()
    overrides = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        spot = dice.randrange(len(lines))
        match dice.randrange(8):
            case 0:
                lines[spot] = f"{dice.choice(KEYS)}: {dice.choice(VALUES)}"
            case 1:
                lines.insert(spot, dice.choice(lines))
            case 2:
                lines[spot] = " " * dice.randrange(4) + lines[spot][dice.randrange(1 + len(lines[spot])) :]
            case 3:
                overrides.append(f"{dice.choice(KEYS)}={dice.choice(VALUES)}")
            case 4:
                overrides += [f"--{dice.choice(KEYS)}", dice.choice(VALUES)]
            case 5:
                del lines[spot]
            case 6:
                lines.append(lines.pop(spot))
            case 7:
                key = lines[spot].split(":")[0]
                lines[spot] = f"{key}: {dice.choice(VALUES)}"
    text = bytearray("\n".join(lines).encode())
    if dice.random() < 0.3:
        text[dice.randrange(len(text))] = dice.randrange(256)
    return bytes(text), overrides


def test_fuzzed_recipes_load_or_are_refused_in_one_line(tmp_path: Path) -> None:
    refused = loaded = 0
    for seed in range(600):
        text, overrides = mutated(random.Random(seed))
        try:
            recipe = load(tmp_path, text, *overrides)
        except UserError as error:
            refused += len(str(error).splitlines()) == 1
        else:
            assert load(tmp_path, dump_recipe(recipe)) == recipe, seed
            loaded += 1
    assert refused + loaded == 600
    assert min(refused, loaded) > 50
