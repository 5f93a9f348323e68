"""A schedule on the stages of a real model, by the step of `twobp`: a side of `pipeline.py --real`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import strategies
from distrib.contracts import Batch, Context
from distrib.engines import Settings, make
from distrib.pipeline.ops import Schedule
from distrib.topology import Topology
from distrib.tracker import Tracker
from launch.models import Weights, build, load_config
from launch.recipe import Recipe
from strategies.pipelining.stage import Run

MIB = 2**20


@dataclass(frozen=True)
class Model:
    """A Llama over bytes; its head costs next to nothing."""

    hidden: int
    layers: int
    length: int

    @classmethod
    def read(cls, shape: str, length: int) -> Model:
        hidden, layers = map(int, shape.split("x"))
        return cls(hidden, layers, length)

    @property
    def border_kib(self) -> int:
        """Of a micro-batch's hidden state."""
        return self.length * self.hidden * 4 // 1024

    def recipe(self) -> Recipe:
        heads = self.hidden // 64
        shape = {"hidden_size": self.hidden, "intermediate_size": 3 * self.hidden, "num_hidden_layers": self.layers}
        shape |= {"num_attention_heads": heads, "num_key_value_heads": heads, "tie_word_embeddings": False}
        return Recipe(config_overrides=shape, max_length=self.length)

    def batch(self, seed: int) -> Batch:
        ids = torch.randint(256, (1, self.length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": ids}


class Trained:
    """The stages of this rank, and how long their operations took."""

    def __init__(self, name: str, topology: Topology, model: Model, micro_batches: int) -> None:
        topology = replace(topology, stages=topology.world)
        recipe, chosen = model.recipe(), strategies.build([{"name": "twobp", "schedule": name}])
        config = load_config(recipe)
        built = build(recipe, config)
        strategies.edit(built, chosen, topology)
        self.engine = make("ddp", built, Weights(recipe, config, topology).fill, topology, Settings())
        self.step = strategies.prepare(built, chosen, engine=self.engine)
        self.batches = [model.batch(seed) for seed in range(micro_batches)]
        self.context = Context(seed=0, step=0, weight=micro_batches * (model.length - 1.0))
        self.execute: Callable[[], None] | None = None
        """In another runtime than the step's own."""
        self.seconds: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    @property
    def pipeline(self) -> Any:
        return self.step.step

    @property
    def schedule(self) -> Schedule:
        return self.pipeline.source.made(len(self.batches))  # type: ignore[no-any-return]

    def begun(self) -> dict[int, Any]:
        """The stages, ready for another runtime."""
        step = self.pipeline
        if step._border is None:
            self.step(self.batches, self.context)
        work = Run(self.batches, self.context, [step.objective] * len(self.batches), True, *step._border)
        for part in step.parts.values():
            part.begin(work)
        return step.parts  # type: ignore[no-any-return]

    def ready(self) -> None:
        self.engine.zero_grad()

    def run(self) -> None:
        if self.execute:
            self.begun()
            with self.pipeline.engine.stages(trains=True):
                self.execute()
            return
        self.step(self.batches, self.context)
        for op, start, end in self.pipeline.spans:
            self.seconds[op.stage][op.kind].append(end - start)

    def took(self) -> dict[int, dict[str, list[float]]]:
        return {stage: dict(kinds) for stage, kinds in self.seconds.items()}

    def held(self) -> float:
        """MiB of a step, above weights and gradients."""
        with Tracker(fake=False) as tracker:
            self.run()
            tracker.restart()
            self.run()
        return float(tracker.peak_bytes() / MIB)
