"""Every causal language model type of Transformers with a pipeline plan, as two stages on two ranks, against plain
autograd on the whole model.

`PYTHONPATH=tests python -m pipeline_families` writes the section of docs/families.md. A type is exact, or refused for
a reason: by the configuration, where a stage cannot run alone, or since the stages give other logits than the whole.
Anything else is a defect.
"""

from __future__ import annotations

import logging
import re
import textwrap
from dataclasses import dataclass, field, replace
from typing import Any

import all_families
import sweep
import torch
import transformers
from engine_cases import gathered
from peft import LoraConfig, get_peft_model
from ranks import Ranks, own_groups
from torch import Tensor, nn
from transformers import AutoConfig

import strategies
from distrib.contracts import Batch, Context
from distrib.engines import Settings, make
from distrib.errors import Refused
from distrib.topology import Topology

SHAPES = ((2, 11), (1, 7), (1, 14))


@dataclass(frozen=True)
class Case:
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Of twobp."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the configuration."""
    lora: bool = False

    def build(self) -> Any:
        model = all_families.build(self.model_type, **self.changes)
        if not self.lora:
            return model
        made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "embed_tokens"]))
        for name, parameter in made.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                # It starts at zero, which would hide every mistake in A's gradient.
                nn.init.normal_(parameter, std=0.1)
        return made


@dataclass(frozen=True)
class Found:
    """Of one rank."""

    logprobs: list[Tensor]
    loss: Tensor
    gradients: dict[str, Tensor]


def micro_batches() -> list[Batch]:
    """Of other shapes each, with a prompt that is not learned, and padding on the right in one of them."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for rows, length in SHAPES:
        ids = torch.randint(0, all_families.PADDING, (rows, length), generator=generator)
        found.append({"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 3, -100)})
    found[0]["attention_mask"] = torch.ones_like(found[0]["input_ids"])
    found[0]["attention_mask"][1, 8:] = 0
    found[0]["labels"][1, 8:] = -100
    return found


def learned() -> float:
    return float(sum((batch["labels"][:, 1:] != -100).sum() for batch in micro_batches()))


@own_groups()
def on_ranks(topology: Topology, case: Case) -> Found | str:
    """Or why it is refused."""
    topology = replace(topology, stages=topology.world)
    chosen = [strategies.get("twobp")(**case.fields)]
    context = Context(seed=0, step=0, weight=learned())
    try:
        model = case.build()
        strategies.check(chosen, model.config, topology)
        strategies.edit(model, chosen, topology)
        engine = make("ddp", model, lambda *_: None, topology, Settings(optimizer=None))
        step = strategies.prepare(model, chosen, engine=engine)
        model.eval()
        logprobs = step.logprobs(micro_batches(), context)
    except Refused as error:
        return str(error)
    model.train()
    for _ in range(2):
        # What a step leaves behind must not reach the next one.
        engine.zero_grad()
        result = step(micro_batches(), context)
    return Found(logprobs, result.loss, gathered(engine))


@dataclass(frozen=True)
class Whole:
    """The truth, by plain autograd."""

    logprobs: list[Tensor]
    loss: float
    truth: sweep.Truth

    @classmethod
    def of(cls, case: Case) -> Whole:
        model = case.build().eval()
        with torch.no_grad():
            logprobs = [_logprobs(model, batch) for batch in micro_batches()]
        model.train()
        kept: set[torch.dtype] = set()
        loss = torch.zeros((), dtype=torch.float64)
        for batch in micro_batches():
            with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.dtype), lambda x: x):
                _logprobs(model, batch)
            part = -_logprobs(model, batch).sum() / learned()
            part.backward()
            loss += part.detach()
        gradients = {name: x for name, x in sweep.gradients(model).items() if model.get_parameter(name).requires_grad}
        return cls(logprobs, float(loss), sweep.Truth(gradients, torch.float32 in kept))


def _logprobs(model: Any, batch: Batch) -> Tensor:
    """Of learned tokens, 0 elsewhere."""
    padding = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    logits = model(input_ids=batch["input_ids"], use_cache=False, **padding).logits[:, :-1].double()
    targets = batch["labels"][:, 1:, None]
    found = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)).masked_fill(targets == -100, 0.0)
    return torch.nn.functional.pad(found[..., 0], (1, 0))


@dataclass(frozen=True)
class Verdict:
    """`why` it is refused; else errors relative to what is allowed."""

    why: str = ""
    logprobs: float = 0.0
    loss: float = 0.0
    gradients: float = 0.0

    @property
    def word(self) -> str:
        if self.why:
            return "refused"
        return "exact" if max(self.logprobs, self.loss, self.gradients) <= 1 else "WRONG"


def verdict(pool: Ranks, case: Case) -> Verdict:
    found = pool("pipeline_families:on_ranks", case)
    if isinstance(found[0], str):
        assert len(set(found)) == 1, found
        return Verdict(found[0])
    whole = Whole.of(case)
    allowed = sweep.OWN_CASTS if whole.truth.casts else sweep.EXACT
    logprobs = max(
        float((x - y).abs().max()) for one in found for x, y in zip(one.logprobs, whole.logprobs, strict=True)
    )
    if not logprobs <= allowed:
        return Verdict(f"the stages give other logits than the whole model, by {logprobs:.1e}")
    every = {name: gradient for one in found for name, gradient in one.gradients.items()}
    # What two stages share, both have.
    gradients = max(whole.truth.difference(every | one.gradients) for one in found)
    loss = max(abs(float(one.loss) - whole.loss) for one in found) / whole.loss
    return Verdict("", logprobs / allowed, loss / allowed, gradients)


def page(found: dict[str, Verdict]) -> str:
    exact = [name for name, one in found.items() if one.word == "exact"]
    refused = [f"- `{name}`: {one.why[:150]}" for name, one in found.items() if one.why]
    listed = textwrap.fill(", ".join(f"`{name}`" for name in exact) + ".", 120, break_on_hyphens=False)
    said = SECTION.format(types=len(found), exact=len(exact), shapes=", ".join(f"{r}x{t}" for r, t in SHAPES))
    return "\n".join([said, listed, "", "Refused:", "", *refused, ""])


def committed() -> set[str]:
    """The types that the page calls exact."""
    _, _, section = sweep.PAGE.read_text().partition(sweep.PIPELINES)
    return set(re.findall("`([^` ]+)`", section.partition("Exact:")[2].partition("Refused:")[0]))


def planned() -> list[str]:
    """The types with a pipeline plan, that are decoders of text."""
    types = [name for name in all_families.TYPES if name not in all_families.NOT_TEXT]
    return [
        name for name in types if "layers" in (getattr(AutoConfig.for_model(name), "base_model_pp_plan", None) or {})
    ]


SECTION = f"""{sweep.PIPELINES}

Of {{types}} types that declare a pipeline plan `twobp` is exact for {{exact}}: the same tiny models, as two stages on
two ranks, a global batch of three micro-batches ({{shapes}} tokens); loss, log-probabilities and
every gradient against plain autograd through the whole model's own logits. The others are refused: by their
configuration, since a stage cannot run alone, or since the stages give other logits than the whole model.

Only hidden states cross a cut, so some of them are exact where nothing else has to: `glm_moe_dsa` and `hy_v4` where
every stage begins with a layer that has an indexer of its own (`strategy.layers`), `gemma4_text` and
`gemma4_unified_text` where no layers share keys and values and none has inputs of its own.

The command that made this section:

    PYTHONPATH=tests python -m pipeline_families

Exact:
"""


def main() -> None:
    logging.getLogger("ebbtide").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    with Ranks(2) as pool:
        for name in planned():
            found[name] = verdict(pool, Case(name))
            print(name, found[name].word, found[name].why, flush=True)
    before, _, _ = sweep.PAGE.read_text().partition(sweep.PIPELINES)
    sweep.PAGE.write_text(f"{before.rstrip()}\n\n{page(found)}")


if __name__ == "__main__":
    main()
