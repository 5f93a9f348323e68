"""Small runs for the tests of training: data, recipes, and ranks as fresh processes that a fault may end.

The processes are forked from a server that has imported everything and done nothing, so that one costs a
tenth of a second: a real SIGKILL is affordable in every test.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import launch.assemble
import launch.train
import launch.verify
from distrib import checkpoint, loop, saving
from distrib.contracts import Engine
from distrib.engines import Settings, make
from distrib.topology import Topology, connect, read_environment
from launch.models import Weights, build, load_config
from launch.recipe import Recipe
from strategies import Prepared

PRELOADED = ("train_cases", "train_imports")
TIMEOUT_S = 120
SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp2": {"name": "fsdp2"},
    "zero1": {"name": "zero", "stage": 1},
    "zero2": {"name": "zero", "stage": 2},
    "zero3": {"name": "zero", "stage": 3},
}
EXACT = ("step", "loss", "grad_norm", "learning_rate", "tokens")
END = 256


def answers(count: int) -> list[dict[str, Any]]:
    """Ragged prompts, which are not learned, and completions."""
    return [
        {"prompt": "ab" * (1 + i % 5), "completion": f"{i * 7919 % 1000} or so" * (1 + i % 3)} for i in range(count)
    ]


def preferences(count: int) -> list[dict[str, Any]]:
    rows = answers(2 * count)
    return [
        {"prompt": rows[i]["prompt"], "chosen": rows[i]["completion"], "rejected": rows[-1 - i]["completion"]}
        for i in range(count)
    ]


def groups(count: int) -> list[dict[str, Any]]:
    """Of two to four completions."""
    made = []
    for i in range(count):
        texts = [f"{i * 31 + j * 7} times" * (1 + (i + j) % 2) for j in range(2 + i % 3)]
        rewards = [float((i + j) % 3) for j in range(len(texts))]
        made.append({"prompt": f"q{i}", "completions": texts, "rewards": rewards})
    return made


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(run: Path, dataset: str, **changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "dataset": dataset,
        "max_length": 64,
        "max_steps": 4,
        "global_batch_size": 4,
        "output_dir": str(run),
        "verify": False,
        **changes,
    }
    if fields.get("model_name_or_path", "tiny") == "tiny":
        fields["config_overrides"] = SHAPE | fields.get("config_overrides", {})
    return Recipe(**fields)


def lines(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def exact(run: Path) -> list[tuple[Any, ...]]:
    """What a resumed run must write bit for bit."""
    return [tuple(line[key] for key in EXACT) for line in lines(run)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit code (negative: the signal), and what it returned or how it failed."""

    code: int | None
    result: Any
    error: str


def run(made_from: Any, world: int = 1, fault: tuple[Any, ...] = (), do: str = "train") -> list[Ended]:
    """Train on `world` fresh processes, or `do` a function of this file or "module:function" with what it takes;
    `fault` names a function of this file and its arguments."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    with _importable():
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, rank, world, port, do, made_from, fault), daemon=True)
            process.start()
            theirs.close()
            ranks.append((process, ours))
    return [_ended(process, pipe) for process, pipe in ranks]


def trained(made_from: Recipe, world: int = 1, do: str = "train") -> Any:
    """What rank 0 returned; every rank must have ended well."""
    ends = run(made_from, world, do=do)
    assert [end.error for end in ends] == [""] * world, "\n".join(end.error for end in ends)
    return ends[0].result


@contextmanager
def _importable() -> Iterator[None]:
    """The server of forks finds the tests' modules only through the environment."""
    before = os.environ.get("PYTHONPATH")
    here = Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def _ended(process: Any, pipe: Connection) -> Ended:
    result, error = None, "no answer"
    try:
        if pipe.poll(TIMEOUT_S):
            result, error = pipe.recv()
        else:
            process.kill()
    except EOFError:
        error = "ended without a word"
    process.join(TIMEOUT_S)
    return Ended(process.exitcode, result, error)


def _rank(pipe: Connection, rank: int, world: int, port: int, do: str, made_from: Any, fault: tuple[Any, ...]) -> None:
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in known.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TQDM_DISABLE": "1"}
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    torch.set_num_threads(1)
    topology = read_environment()
    connect(topology)
    if fault:
        globals()[fault[0]](topology, *fault[1:])
    try:
        module, _, function = do.rpartition(":")
        pipe.send((getattr(importlib.import_module(module or __name__), function)(made_from, topology), ""))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        pipe.send((None, text if not isinstance(error, AssertionError) else traceback.format_exc()))
        pipe.close()
        os._exit(1)


def train(made_from: Recipe, topology: Topology) -> dict[str, Any]:
    return launch.train.train(made_from, topology)


def verify(made_from: Recipe, topology: Topology) -> dict[str, Any]:
    return launch.verify.gradient_error(made_from, topology, 32)


def train_and_keep(made_from: Recipe, topology: Topology) -> dict[str, Any]:
    """Every parameter of the trainer's model after its last step, whole, gathered by other means than
    export's; as numpy's arrays, which outlive this process."""
    kept: dict[str, Any] = {}
    finish = launch.train._finish

    def keep(recipe: Recipe, config: Any, run: Path, step: Prepared, progress: Any) -> dict[str, Any]:
        kept.update((name, value.float().numpy()) for name, value in whole(step.engine).items())
        return finish(recipe, config, run, step, progress)

    launch.train._finish = keep
    launch.train.train(made_from, topology)
    return kept


def whole(engine: Engine) -> dict[str, Tensor]:
    if engine.name == "zero" and engine.settings.stage == 3:
        import deepspeed

        found = {}
        for name, parameter in engine.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        return found
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in engine.model.named_parameters()
    }


def kill_at(topology: Topology, step: int) -> None:
    """SIGKILL at the beginning of a step, of all ranks, with no save in the making; steps count from 0."""

    def kill(running: loop.Loop) -> None:
        running._settle()
        os.kill(os.getpid(), signal.SIGKILL)

    _at(step, kill)


def kill_within(topology: Topology, step: int) -> None:
    """SIGKILL in the second forward of a step, where its gradients are half accumulated: of the ranks that have the
    embedding, and the others lose them."""
    update = loop.Loop._update

    def updating(self: loop.Loop, index: int, window: Any, weight: float) -> Any:
        if index == step:
            self._settle()
            embedding = self.engine.model.get_input_embeddings()
            calls = iter([lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL)])
            embedding.register_forward_pre_hook(lambda *_: next(calls)())
        return update(self, index, window, weight)

    loop.Loop._update = updating


def stop_at(topology: Topology, step: int, rank: int = 0, number: int = signal.SIGTERM) -> None:
    """A signal to one rank at the beginning of a step."""
    if topology.rank == rank:
        _at(step, lambda running: os.kill(os.getpid(), number))


def _at(step: int, act: Any) -> None:
    one = loop.Loop.one

    def acting(self: loop.Loop, progress: Any) -> Any:
        if progress.step == step:
            act(self)
        return one(self, progress)

    loop.Loop.one = acting


def kill_while_saving(topology: Topology, step: int) -> None:
    """SIGKILL when everything of a checkpoint is written but its manifest."""
    write = saving.write_text

    def killing(path: Path, text: str) -> None:
        if path.name == checkpoint.MANIFEST and path.parent.name == f".step-{step}.draft":
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, text)

    saving.write_text = killing


def spoil_loss(topology: Topology, step: int, rank: int) -> None:
    """The loss of one rank is not a number in one step."""
    _wrap_step(lambda index, result: _spoilt(result) if (index, topology.rank) == (step, rank) else result)


def _spoilt(result: Any) -> Any:
    import dataclasses

    return dataclasses.replace(result, loss=result.loss * float("nan"))


def spoil_gradient(topology: Topology, step: int, rank: int, value: float) -> None:
    """A gradient of one rank is not finite in one step, though the loss is."""
    import strategies

    call = strategies.Prepared.__call__

    def calling(self: Any, batches: Any, context: Any = None) -> Any:
        hit = (context.step, topology.rank) == (step, rank)
        norm = self.engine.model.get_submodule("model.norm")
        hook = norm.register_forward_hook(_spoil_backward(value)) if hit else None
        result = call(self, batches, context)
        if hook:
            hook.remove()
        return result

    strategies.Prepared.__call__ = calling


def _spoil_backward(value: float) -> Any:
    def forward_hook(module: Any, inputs: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: torch.full_like(gradient, value))

    return forward_hook


def _wrap_step(change: Any) -> None:
    import strategies

    call = strategies.Prepared.__call__
    strategies.Prepared.__call__ = lambda self, batches, context=None: change(
        context.step, call(self, batches, context)
    )


def pretrained(folder: Path, **changes: Any) -> Path:
    """A small random Llama as Transformers saves it, with the byte tokenizer beside it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from launch.tokenizer import byte_tokenizer

    torch.manual_seed(3)
    known = {"vocab_size": 264, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": END}
    config = LlamaConfig(**SHAPE, **known, initializer_range=0.1, **changes)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def tokens(prompt: str, completion: str) -> tuple[Tensor, int]:
    """([1, T] ids, length of the prompt): byte b is token b, and the end token closes."""
    given, said = list(prompt.encode()), list(completion.encode())
    return torch.tensor([[*given, *said, END]]), len(given)


def logprobs(model: Any, prompt: str, completion: str) -> Tensor:
    """Of the completion's tokens, from the whole logits."""
    ids, given = tokens(prompt, completion)
    logp = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return logp[given - 1 : -1].gather(1, ids[0, given:, None])[:, 0]


def order(run: Path, rows: int) -> list[list[int]]:
    """Which rows of the data set each step took, from what the run says of itself."""
    return [[number % rows for number in line["ids"]] for line in lines(run, "samples")]


def weights_after_failure(made_from: Recipe, topology: Topology) -> tuple[str, bool]:
    """The error that a run ends with, and whether the weights it leaves in memory are finite."""
    engines: list[Engine] = []
    make = launch.assemble.make
    launch.assemble.make = lambda *args: engines.append(make(*args)) or engines[-1]  # type: ignore[func-returns-value]
    try:
        launch.train.train(made_from, topology)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    else:
        said = "no error"
    return said, all(bool(value.isfinite().all()) for value in whole(engines[0]).values())


def leak(topology: Topology) -> None:
    """Attention that does not look at where documents begin."""
    from transformers.models.llama import modeling_llama

    mask = modeling_llama.create_causal_mask
    modeling_llama.create_causal_mask = lambda *args, **kwargs: mask(*args, **{**kwargs, "position_ids": None})


def peak_while_filling(made_from: Recipe, topology: Topology) -> tuple[int, int]:
    """The most bytes of live tensors after any fill, without those from before; those of the whole model."""
    fill = Weights.fill
    peak = [0]
    model_bytes = [0]
    gc.collect()
    # What there is by now is left out, which saves looking through it.
    gc.freeze()

    def watched(self: Weights, model: Any, unit_name: str) -> None:
        model_bytes[0] = model_bytes[0] or sum(p.numel() * 4 for p in model.parameters())
        fill(self, model, unit_name)
        peak[0] = max(peak[0], live_bytes())

    Weights.fill = watched  # type: ignore[method-assign]
    config = load_config(made_from)
    model = build(made_from, config)
    settings = Settings(stage=made_from.engine.stage)
    make(made_from.engine.name, model, Weights(made_from, config, topology).fill, topology, settings)
    return peak[0], model_bytes[0]


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # What another test has left without data holds none.
        if isinstance(thing, Tensor) and thing.device.type != "meta" and not isinstance(thing, FakeTensor):
            local = thing.to_local() if hasattr(thing, "to_local") else thing
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
