"""Run folders that lead elsewhere, and programs planted where data is read: pickles, code of models, templates."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from page_cases import run_folder

CANARY = Path("canary")
LINKED = [
    "final",
    "checkpoints",
    "metrics.jsonl",
    "samples.jsonl",
    "events.jsonl",
    "evaluations.jsonl",
    "energy.jsonl",
    "report.json",
    "report.html",
    "report.md",
    "profile",
    "tensorboard",
    "recipe.lock.yaml",
    ".final.draft",
    ".report.html.draft",
    ".recipe.lock.yaml.draft",
    "checkpoints/step-1",
    "checkpoints/.step-2.draft",
    "checkpoints/step-1/engine",
    "final/config.json",
    "merged",
    "timeline.json",
]
NAMES = [
    ("../elsewhere", "`..`"),
    ("runs/../../elsewhere", "`..`"),
    ("..", "`..`"),
    ("runs/..", "`..`"),
    ("/..", "`..`"),
    ("a" * 300, "too long"),
    ("a/" * 3000 + "b", "too long"),
    ("file", "cannot write below"),
    ("file/inside", "cannot write below"),
    ("/dev/null", "cannot write below"),
    ("/dev/null/x", "cannot write below"),
    ("dangling", "cannot write below"),
    ("dangling/x", "cannot write below"),
    ("loop/x", "symbolic links"),
    ("used", "in use"),
    ("a\x07b", "control characters"),
    ("a\u202eb", "control characters"),
]
"""Of output folders, and what is said of them."""


def plant_names(here: Path) -> None:
    (here / "file").write_text("mine")
    (here / "dangling").symlink_to(here / "nowhere")
    (here / "loop").symlink_to(here / "loop")
    (here / "used").mkdir()
    (here / "used" / "file").write_text("mine")


def plant_link(here: Path, outside: Path, name: str) -> Path:
    """A run with a link in the place of one of its files, which leads out of it."""
    run = run_folder(here / "run", 4, finished=False)
    link = run / name
    link.parent.mkdir(parents=True, exist_ok=True)
    target = outside / link.name.lstrip(".")
    if link.exists():
        shutil.copy(link, target)
        link.unlink()
    elif not link.suffix:
        target.mkdir()
        (target / "mine").write_text("mine")
    link.symlink_to(target)
    return run


class Bomb:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(CANARY.absolute()),)


def bomb() -> bytes:
    return pickle.dumps(Bomb())


WRONG_MODELS: list[tuple[str, bytes | dict[str, object], str]] = [
    ("config.json", {"hidden_size": "x"}, "hidden_size"),
    ("config.json", {"hidden_size": 0}, "config"),
    ("config.json", {"hidden_size": -8}, "config"),
    ("config.json", {"hidden_size": None}, "hidden_size"),
    ("config.json", {"hidden_size": 33}, "config"),
    ("config.json", {"num_attention_heads": 0}, "config"),
    ("config.json", {"num_hidden_layers": -1}, "num_hidden_layers"),
    ("config.json", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ("config.json", {"vocab_size": -1}, "vocab_size"),
    ("config.json", {"vocab_size": 10}, "vocab_size"),
    ("config.json", {"hidden_act": "nope"}, "nope"),
    ("config.json", {"model_type": "nope"}, "nope"),
    ("config.json", {"model_type": "clip"}, "causal"),
    ("config.json", {"rope_parameters": {"rope_type": "nope"}}, "nope"),
    ("config.json", {"attention_dropout": 5.0}, "attention_dropout"),
    ("config.json", {"pad_token_id": 99999}, "config"),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "4-bit"),
    ("config.json", {"intermediate_size": 50}, "has shape"),
    ("config.json", b"", "config.json"),
    ("config.json", b"[]", "config"),
    ("config.json", b"[" * 100_000, "config"),
    ("config.json", b"\xff", "config"),
    ("tokenizer.json", b"", "tokenizer"),
    ("tokenizer.json", b"[" * 100_000, "tokenizer"),
    ("tokenizer_config.json", b"[]", "tokenizer"),
    ("tokenizer_config.json", b"[" * 100_000, "tokenizer"),
    ("model.safetensors", b"", "model.safetensors"),
    ("model.safetensors", b"\xff" * 100, "model.safetensors"),
    ("model.safetensors", b'\x08\0\0\0\0\0\0\0{"a":[]}', "model.safetensors"),
    ("model.safetensors.index.json", b"[]", "index.json"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": 3}}', "index.json"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": ".."}}', "index.json"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors"),
]
"""A file of a model folder, what is in it or is changed in it, and what is named."""
CODE = f"import os\nos.mkdir({str(CANARY)!r})\n"
TEMPLATE = "{{ cycler.__init__.__globals__.os.mkdir('canary') }}{{ ''.__class__.__mro__[1].__subclasses__() }}"


@dataclass(frozen=True)
class Planted:
    """`plant` changes a good model folder, or the working directory. `says` is None where it is not even read."""

    name: str
    plant: Callable[[Path], None]
    says: str | None
    words: tuple[str, ...] = ("data", "r.yaml", "model_name_or_path=./model")


def put(name: str, content: bytes | str) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        path = model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def edit(name: str, **fields: object) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        known = json.loads((model / name).read_text()) if (model / name).exists() else {}
        (model / name).write_text(json.dumps(known | fields))

    return write


def drop(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def all_of(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        for step in steps:
            step(model)

    return write


TRAIN = ("train", "r.yaml", "model_name_or_path=./model")
REMOTE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
MESSAGES = ("dataset=./chat.jsonl",)
PLANTED = [
    Planted(
        "weights, no safetensors",
        all_of(put("pytorch_model.bin", bomb()), drop("model.safetensors")),
        "safetensors",
        TRAIN,
    ),
    Planted("weights beside safetensors", put("pytorch_model.bin", bomb()), None, TRAIN),
    Planted("weights called safetensors", put("model.safetensors", bomb()), "model.safetensors", TRAIN),
    Planted(
        "an index of pickles",
        all_of(edit("model.safetensors.index.json", weight_map={"x": "w.bin"}), put("w.bin", bomb())),
        "w.bin",
        TRAIN,
    ),
    Planted(
        "an index that leaves",
        edit("model.safetensors.index.json", weight_map={"x": "../w.safetensors"}),
        "weight_map",
        TRAIN,
    ),
    Planted("an index that is a pickle", put("model.safetensors.index.json", bomb()), "index.json", TRAIN),
    Planted(
        "an adapter",
        all_of(
            edit("adapter_config.json", peft_type="LORA", base_model_name_or_path="x"), put("adapter_model.bin", bomb())
        ),
        "adapter",
        TRAIN,
    ),
    Planted(
        "a trainer's state",
        all_of(*(put(name, bomb()) for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"))),
        None,
        TRAIN,
    ),
    Planted("a configuration", put("config.json", bomb()), "config", TRAIN),
    Planted(
        "a configuration's code",
        all_of(edit("config.json", auto_map=REMOTE, model_type="mine"), put("mine.py", CODE)),
        "auto_map",
        TRAIN,
    ),
    Planted("code of a known model", all_of(edit("config.json", auto_map=REMOTE), put("mine.py", CODE)), None, TRAIN),
    Planted(
        "code of another repository",
        all_of(edit("config.json", auto_map={"AutoConfig": "they/x--mine.Config"})),
        "another repository",
        (*TRAIN, "trust_remote_code=true"),
    ),
    Planted("attention from the hub", edit("config.json", _attn_implementation="they/kernel"), "attention", TRAIN),
    Planted(
        "attention by an override",
        lambda model: None,
        "attention",
        (*TRAIN, "config_overrides._attn_implementation=they/kernel"),
    ),
    Planted("a tokenizer", put("tokenizer.json", bomb()), "tokenizer"),
    Planted(
        "a tokenizer's code",
        all_of(
            edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.T", None]}, tokenizer_class="Mine"),
            edit("config.json", model_type="mine"),
            put("mine.py", CODE),
        ),
        "auto_map",
    ),
    Planted(
        "a tokenizer's old files",
        all_of(put("vocab.pkl", bomb()), put("tokenizer.model", bomb()), put("spiece.model", bomb())),
        None,
    ),
    Planted(
        "a template",
        put("chat_template.jinja", TEMPLATE),
        "chat template",
        ("data", "r.yaml", "model_name_or_path=./model", *MESSAGES),
    ),
    Planted(
        "a template that does not end",
        put("chat_template.jinja", "{% for i in range(10**9) %}x{% endfor %}"),
        "chat template",
        ("data", "r.yaml", "model_name_or_path=./model", *MESSAGES),
    ),
    Planted(
        "a generator", all_of(put("custom_generate/generate.py", CODE), put("generation_config.py", CODE)), None, TRAIN
    ),
    Planted("parquet", put("../a.parquet", bomb()), "a.parquet", ("data", "r.yaml", "dataset=./a.parquet")),
    Planted("JSON lines", put("../a.jsonl", bomb()), "a.jsonl", ("data", "r.yaml", "dataset=./a.jsonl")),
    Planted("data with a pickle's suffix", put("../a.pkl", bomb()), "a.pkl", ("data", "r.yaml", "dataset=./a.pkl")),
    Planted("a reader of pickles", put("../train.pkl", bomb()), "pandas", ("data", "r.yaml", "dataset=pandas")),
    Planted("a folder of pickles", put("../set/train.pkl", bomb()), "set", ("data", "r.yaml", "dataset=./set")),
    Planted(
        "a data set's script",
        all_of(put("../set/set.py", CODE), put("../set/a.jsonl", '{"text": "a"}\n')),
        "scripts",
        ("data", "r.yaml", "dataset=./set"),
    ),
]
