"""`ebbtide plan`: what it predicts against runs of the whole model, and what it advises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import strategies
from distrib.contracts import Context
from distrib.errors import UserError
from distrib.optim import OptimizerSpec
from distrib.topology import Topology
from distrib.tracker import Tracker, materialise, tracking
from launch import cli, sides
from launch.device import Device, device_of, split_words
from launch.forecast import Forecast, Regime, Whole, chunk_of, depths_of
from launch.models import build, load_config
from launch.plan import Planner, recommend
from launch.recipe import Engine, Recipe
from launch.recipe_file import load_recipe
from launch.settings import settings_of
from launch.shares import optimizer_bytes, share_of, sizes_of

GIB = 2**30
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def device(memory_bytes: int = 64 * GIB, count: int = 1, kind: str = "cpu") -> Device:
    return Device(kind, memory_bytes, count, flops=1e12, here=False)


def whole_peak(recipe: Recipe, side: str, length: int) -> int:
    """Weights included, of a step of the whole model on one device."""
    config = load_config(recipe)
    fake, tracker = FakeTensorMode(), Tracker()
    model = build(recipe, config).train()
    sides.edit(side, model)
    materialise(model, fake)
    engine = Whole(model, lambda *_: None, Topology(), settings_of(recipe))
    step = sides.prepare(side, model, engine=engine)
    with tracking(fake, tracker):
        for tensor in {id(x.untyped_storage()): x for x in (*model.parameters(), *model.buffers())}.values():
            tracker.count(tensor)
        for positions in (32, length):
            model.zero_grad(set_to_none=True)
            ids = torch.zeros(recipe.per_device_train_batch_size, positions, dtype=torch.int64)
            tracker.start_bytes, tracker._most = 0, tracker.live_bytes
            step({"input_ids": ids, "labels": ids}, Context(0, 0, 1.0))
    return tracker.peak_bytes()


def forecast(recipe: Recipe, side: str) -> tuple[Forecast, Any]:
    """With nothing run yet, and one rank's share."""
    planner = Planner(recipe, device())
    made = Forecast(recipe, planner.config, side, Regime(), planner.depths, "cpu")
    return made, share_of(recipe.engine, recipe, planner.sizes, planner.spec, 1, "cpu").of


ALL = [*strategies.names(), "gc", "gc+ce", "seco:chunk=256", "streambp:chunk=256:offload=true"]
QUICK = ("plain", "gc+ce")


@pytest.mark.parametrize("side", [pytest.param(side, marks=() if side in QUICK else pytest.mark.slow) for side in ALL])
def test_a_plan_of_few_layers_has_the_peak_of_the_whole_model(side: str) -> None:
    recipe = Recipe(model_name_or_path="small", max_length=1500, optimizer={"name": "sgd"})
    made, share = forecast(recipe, side)
    made.samples[1500] = made._sample(1500)
    # Seen: the same to the byte. A draw of chunks is one of many.
    bound = 0.1 if side.startswith("spaco") else 0.01
    assert made.under(share).at(1500).sum() == pytest.approx(whole_peak(recipe, side, 1500), rel=bound)


@pytest.mark.parametrize("side", ["gc", pytest.param("streambp", marks=pytest.mark.slow)])
def test_a_plan_is_carried_on_to_longer_sequences(side: str) -> None:
    recipe = Recipe(max_length=700, optimizer={"name": "sgd"}, config_overrides={"num_hidden_layers": 6})
    made, share = forecast(recipe, side)
    made.look_at(700)
    assert 7168 not in made.samples
    assert made.under(share).at(7168).sum() == pytest.approx(whole_peak(recipe, side, 7168), rel=0.03)


@pytest.mark.parametrize(
    ("side", "layers", "length"),
    [
        ("plain", 5, 1024),
        pytest.param("gc+ce", 32, 16384, marks=pytest.mark.slow),
        pytest.param("streambp", 32, 8192, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("lora", [pytest.param(0, marks=pytest.mark.slow), 16])
def test_an_8b_configuration_agrees_with_a_run_of_all_its_layers(
    side: str, layers: int, length: int, lora: int
) -> None:
    shape = LLAMA_8B | {"num_hidden_layers": layers}
    recipe = Recipe(config_overrides=shape, max_length=length, lora_r=lora, bf16=True, optimizer={"name": "sgd"})
    row = Planner(recipe, device()).row(side, recipe.engine)
    assert sum(row["bytes"].values()) == row["total_bytes"]
    assert row["total_bytes"] == pytest.approx(whole_peak(recipe, side, length), rel=0.03)
    weights = sum(p.nbytes for p in build(recipe, load_config(recipe)).parameters())
    assert row["bytes"]["weights"] >= weights


def test_layers_of_several_kinds_are_carried_on_by_their_period() -> None:
    config = load_config(Recipe(model_name_or_path="small"))
    config.layer_types = ["sliding_attention", "full_attention"] * 4
    found = depths_of(build(Recipe(model_name_or_path="small"), config), config)
    assert (found.period, found.short % 2, found.times) == (2, 0, 2)
    config.layer_types = ["full_attention", *["sliding_attention"] * 7]
    found = depths_of(build(Recipe(model_name_or_path="small"), config), config)
    assert (found.period, found.start, found.short, found.times) == (1, 1, 3, 5)


@pytest.mark.parametrize(
    "name", ["adamw", "adamw4bit", "adam", "nadam", "radam", "adamax", "sgd", "adagrad", "rmsprop", "adafactor"]
)
def test_optimizer_states_are_those_of_a_real_step(name: str) -> None:
    shapes = [(64, 48), (96,), (5, 130)]
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = OptimizerSpec(name).build((str(index), p) for index, p in enumerate(parameters))
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert optimizer_bytes(OptimizerSpec(name), shapes, "cpu")[0] == sum(value.nbytes for value in states)


def share(world: int, **changes: Any) -> Any:
    recipe = Recipe(config_overrides={"num_hidden_layers": 2}, **changes)
    model = build(recipe, load_config(recipe))
    sizes = sizes_of(model)
    spec = settings_of(recipe).optimizer
    assert spec
    return sizes, share_of(recipe.engine, recipe, sizes, spec, world, "cpu")


def test_engines_divide_what_they_shard() -> None:
    sizes, ddp = share(8)
    assert (ddp.weights, ddp.all_gradients) == (sizes.weight_bytes, 4 * sizes.trainable)
    _, sharded = share(8, engine=Engine(name="fsdp2"))
    assert sharded.weights == sizes.weight_bytes / 8
    assert sharded.optimizer == pytest.approx(ddp.optimizer / 8, rel=0.01)
    for stage, weights in ((1, 2), (2, 2), (3, 2 / 8)):
        _, zero = share(8, bf16=True, engine=Engine(name="zero", stage=stage))
        # Beside the bf16 weights a float32 copy over the ranks.
        assert zero.weights == pytest.approx((weights + 4 / 8) * sizes.trainable, rel=1e-3)
        assert zero.optimizer == pytest.approx(ddp.optimizer / 8, rel=0.01)
        assert zero.gradients == pytest.approx(4 * sizes.trainable / (1 if stage == 1 else 8), rel=1e-3)
    _, away = share(8, bf16=True, engine=Engine(name="zero", stage=3, offload=True))
    assert (away.weights, away.optimizer, away.gradients) == (0, 0, 0)


def test_frozen_weights_have_neither_gradient_nor_optimizer() -> None:
    sizes, found = share(1, lora_r=8)
    assert sizes.trainable < 0.5 * sizes.whole.elements
    assert found.all_gradients == 4 * sizes.trainable
    assert found.optimizer == pytest.approx(8 * sizes.trainable, rel=0.01)


def test_the_longest_length_grows_with_the_budget_and_is_the_last_that_fits() -> None:
    planner = Planner(Recipe(config_overrides={"max_position_embeddings": 50_000}), device())
    before = 0
    for budget in (900_000, 1_400_000, 20_000_000, 40_000_000, 90_000_000):
        planner.device = device(budget + 2**29)
        found, limit = planner._longest(lambda length: 1000 * length, None)
        expected = max((length for length in range(0, 50_000, 256) if 1000 * length <= budget), default=0)
        assert (found, limit) == ((50_000, "model") if budget >= 50_000_000 else (expected, "memory"))
        assert found >= before
        before = found
    planner.device = device(5_000_000 + 2**29)
    assert planner._longest(lambda length: 1000 * length, 2048) == (4096, "memory")
    # Less than a chunk is still something.
    assert planner._longest(lambda length: 1000 * length, 8192) == (4864, "memory")


def row(strategy: str, status: str, flops: float, longest: int = 512, fidelity: str = "exact") -> dict[str, Any]:
    return {
        "strategy": strategy,
        "engine": "ddp",
        "fidelity": fidelity,
        "status": status,
        "flops": flops,
        "max_length": longest,
    }


def test_advice_is_exact_and_computes_least() -> None:
    recipe = Recipe(max_length=4096)
    plain, stream = row("plain", "fits", 3), row("streambp", "fits", 4)
    guess, checkpointed = row("spaco", "fits", 1, fidelity="unbiased"), row("gc", "fits", 2)
    assert recommend([checkpointed, guess, stream, plain], recipe)["strategy"] == "plain"
    advice = recommend([plain | {"status": "too large"}, stream, guess], recipe)
    assert (advice["strategy"], advice["max_length"]) == ("streambp", 4096)


def test_where_nothing_exact_fits_the_length_is_lowered_and_said() -> None:
    recipe = Recipe(max_length=4096)
    rows = [row("plain", "too large", 3, 256), row("streambp", "too large", 4, 2048)]
    advice = recommend([*rows, row("spaco", "fits", 1, fidelity="unbiased")], recipe)
    assert (advice["strategy"], advice["max_length"]) == ("streambp", 2048)
    assert "nothing exact fits at 4096" in advice["reason"]
    assert "spaco would fit, and is not exact" in advice["reason"]
    advice = recommend([one | {"max_length": 0} for one in rows], recipe)
    assert advice["strategy"] is None


SHORT = ["config_overrides.num_hidden_layers=1", "max_length=64", "--strategies", "plain", "device.type=cpu"]


def recipe_file(folder: Path) -> str:
    path = folder / "mine.yaml"
    path.write_text("model_name_or_path: tiny\nstrategy: {name: streambp, chunk: 32}\n")
    return str(path)


def test_fit_writes_a_recipe_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = tmp_path / "fit.yaml"
    words = ["plan", recipe_file(tmp_path), *SHORT, "device.memory=2GiB", "--fit", str(fit), "--json"]
    assert cli.main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"][0]["status"] == "fits"
    # Of a device elsewhere no speed is known.
    assert said["rows"][0]["tokens_per_s"] is None
    found = load_recipe(str(fit))
    assert [section.name for section in found.strategy] == ["plain"]
    assert found.max_length == 64
    assert found.config_overrides == {"num_hidden_layers": 1}
    chosen = strategies.build([section.model_dump() for section in found.strategy])
    strategies.check(chosen, load_config(found), Topology())


def test_a_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", recipe_file(tmp_path), *SHORT, "device.memory=2GiB", "device.flops=1T"]) == 0
    said = capsys.readouterr().out
    assert "activations" in said
    assert "recommended: plain (ddp), 64 tokens: the only exact one that fits" in said
    assert "1 TFLOP/s, given" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["device.memory=80XB"], "device.memory='80XB': a number above 0"),
        (["device.memory=0GiB"], "a number above 0"),
        (["device.size=3"], "choose memory, count, flops, type"),
        (["device.count=0"], "device.count='0': a number of devices"),
        (["device.type=tpu"], "choose cuda, cpu"),
        (["--engines", "fsdp"], "choose ddp, fsdp2, zero, zero1, zero2, zero3 (did you mean"),
        (["--strategies", "streambq"], "did you mean streambp"),
        (["--strategies", "streambp:chunks=3"], "choose chunk, offload"),
        (["--fit", "."], "is there already"),
        (["objective=dpo"], "a plan counts sft only"),
    ],
)
def test_mistakes_are_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", recipe_file(tmp_path), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_speed_is_timed_here_given_or_unknown() -> None:
    recipe = Recipe(max_length=64, bf16=True, lora_r=4)
    timed = Planner(recipe, Device("cpu", GIB, 1, flops=None, here=True)).flops_per_s
    assert timed is not None
    assert 1e6 < timed < 1e14
    assert Planner(recipe, device()).flops_per_s == 1e12
    assert Planner(recipe, Device("cpu", GIB, 1, flops=None, here=False)).flops_per_s is None


def test_a_refused_strategy_is_a_row_with_its_reason() -> None:
    recipe = Recipe(compile=True, engine=Engine(name="zero"))
    found = Planner(recipe, device()).row("plain", recipe.engine)
    assert found["status"] == "refused"
    assert "compile=true" in found["why"]


def test_sizes_have_units() -> None:
    given, rest = split_words(["device.memory=47.5GiB", "--device.count", "8", "seed=1"])
    found = device_of(given, 1)
    assert (found.memory_bytes, found.count, found.type, rest) == (int(47.5 * GIB), 8, "cuda", ["seed=1"])
    assert found.usable_bytes < found.memory_bytes
    assert device_of({"memory": "80GB"}, 1).memory_bytes == 80 * 10**9
    with pytest.raises(UserError, match="without a GPU"):
        device_of({"type": "cuda"}, 1) if not torch.cuda.is_available() else device_of({"type": "tpu"}, 1)


def test_packed_rows_hold_masks_where_attention_takes_them_whole() -> None:
    found = {}
    for packing in (False, True):
        recipe = Recipe(max_length=512, packing=packing)
        made, share = forecast(recipe, "plain")
        made.look_at(512)
        peaks = made.under(share)
        found[packing] = {length: peaks.at(length).sum() for length in (512, 1024, 2048)}
    for length, peak in found[True].items():
        # Every layer keeps one in the precision of its products.
        assert peak - found[False][length] > 4 * 4 * length**2
        assert peak - found[False][length] < 7 * 4 * length**2 + 2**24


def test_chunks_are_those_of_the_device_that_is_planned_for() -> None:
    assert [chunk_of("streambp", rows, kind) for rows, kind in ((1, "cpu"), (1, "cuda"), (8, "cuda"))] == [
        1024,
        4096,
        512,
    ]
    assert [chunk_of(side, 1, "cuda") for side in ("seco:chunk=96", "plain", "gc")] == [96, None, None]


def test_a_model_that_does_not_run_without_data_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no values\nhere")

    monkeypatch.setattr("launch.plan.Forecast", fails)
    recipe = Recipe()
    found = Planner(recipe, device()).row("plain", recipe.engine)
    assert found["status"] == "unknown"
    assert "(RuntimeError: no values here)" in found["why"]
    assert recommend([found], recipe)["strategy"] is None
