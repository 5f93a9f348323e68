"""Finding strategies, building them from a recipe's sections, and refusing at plan time."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import pytest
from transformers import LlamaConfig

import strategies
from distrib.errors import Refused, UserError
from distrib.topology import Topology
from strategies import Fidelity, Strategy
from strategies.core import registry
from strategies.plain import Plain


@dataclass(frozen=True)
class Chunked(Strategy):
    """A strategy from elsewhere."""

    fidelity = Fidelity.APPROXIMATE
    chunk: int = 512
    rate: float = 0.5
    modules: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"strategy.chunk={self.chunk}: must be at least 1")

    def step(self, model, engine, objective):
        return None


@dataclass(frozen=True)
class Required(Strategy):
    bits: int

    def step(self, model, engine, objective):
        return None

    def check(self, config, topology):
        raise Refused(f"bits={self.bits}: {config.model_type} on {topology.world} ranks")


NOT_A_STRATEGY = object()


@pytest.fixture
def elsewhere(monkeypatch):
    offered = {
        "chunked": "Chunked",
        "required": "Required",
        "object": "NOT_A_STRATEGY",
        "gone": "Missing",
    }
    entries = [EntryPoint(name, f"{__name__}:{value}", registry.GROUP) for name, value in offered.items()]
    monkeypatch.setitem(__import__("sys").modules, __name__, __import__("types").SimpleNamespace(**globals()))
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    return entries


def test_files_are_found_by_name():
    assert strategies.names()[0] == "plain"
    assert strategies.get("plain") is Plain
    assert strategies.name_of(Plain()) == "plain"


def test_every_file_holds_one_documented_strategy():
    for name in strategies.names():
        kind = strategies.get(name)
        assert kind.__doc__
        assert kind.__doc__ != Strategy.__doc__
        assert isinstance(kind.fidelity, Fidelity)


def test_entry_points_are_found(elsewhere):
    assert strategies.names()[0] == "plain"
    assert {"chunked", "gone", "object", "required"} < set(strategies.names())
    assert strategies.get("chunked") is Chunked
    assert strategies.name_of(Chunked()) == "Chunked"
    assert registry.entry_points is not importlib.metadata.entry_points


def test_sections_become_strategies(elsewhere):
    built = strategies.build([{"name": "plain"}, {"name": "chunked", "chunk": 64.0, "rate": 1, "modules": ("a",)}])
    assert built == [Plain(), Chunked(64, 1, ("a",))]
    assert type(built[1].chunk) is int


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([{"name": "plane"}], r"strategy\.name='plane': choose plain, .*\(did you mean plain\?\)"),
        ([{"name": "plain", "chunk": 3}], r"strategy\.chunk=3: plain has no fields"),
        (
            [{"name": "chunked", "chnk": 3}],
            r"chunked's field='chnk': choose chunk, rate, modules \(did you mean chunk\?\)",
        ),
        ([{"name": "chunked", "chunk": "many"}], r"strategy\.chunk='many': must be int, for example 512"),
        ([{"name": "chunked", "chunk": True}], r"strategy\.chunk=True: must be int"),
        ([{"name": "chunked", "chunk": 1.5}], r"strategy\.chunk=1\.5: must be int"),
        ([{"name": "chunked", "rate": float("nan")}], r"strategy\.rate=nan: must be float"),
        ([{"name": "chunked", "modules": 3}], r"strategy\.modules=3: must be tuple"),
        ([{"name": "chunked", "chunk": 0}], r"strategy='chunked': strategy\.chunk=0: must be at least 1"),
        ([{"name": "required"}], r"strategy='required' needs strategy\.bits"),
        ([{"name": "plain"}, {"name": "plain"}], r"strategy='plain' is listed twice"),
        ([{"name": "gone"}], r"strategy='gone': its entry point .*:Missing does not load"),
        ([{"name": "object"}], r"strategy='object': its entry point .* is not a Strategy class"),
    ],
)
def test_mistakes_are_one_line(elsewhere, sections, message):
    with pytest.raises(UserError, match=message) as caught:
        strategies.build(sections)
    assert "\n" not in str(caught.value)


def test_a_name_in_both_places_is_refused(elsewhere):
    elsewhere.append(EntryPoint("plain", f"{__name__}:Chunked", registry.GROUP))
    with pytest.raises(UserError, match=r"strategy='plain' is built in and also comes from .*:Chunked: rename"):
        strategies.get("plain")


def test_a_file_with_several_strategies_is_refused(monkeypatch):
    import strategies.plain as module

    other = type("Other", (Strategy,), {"__module__": module.__name__})
    monkeypatch.setattr(module, "Other", other, raising=False)
    with pytest.raises(UserError, match=r"strategies/plain\.py defines 2 strategies"):
        strategies.get("plain")


def test_refusals_at_plan_time():
    config, topology = LlamaConfig(), Topology(world=2)
    strategies.check([Plain(), Chunked()], config, topology)
    with pytest.raises(UserError, match="choose at least one of plain"):
        strategies.check([], config, topology)
    with pytest.raises(Refused, match="strategies Chunked and Required each run the whole step: use one of them"):
        strategies.check([Chunked(), Plain(), Required(4)], config, topology)
    with pytest.raises(Refused, match="bits=4: llama on 2 ranks"):
        strategies.check([Required(4)], config, topology)


@pytest.mark.parametrize(("kind", "part"), [("t5", "is_encoder_decoder"), ("llava", "vision_config")])
def test_models_beyond_text_are_refused_by_name(kind, part):
    from transformers import AutoConfig

    with pytest.raises(Refused, match=f"model type '{kind}' has {part}: only"):
        strategies.check([Plain()], AutoConfig.for_model(kind), Topology())
