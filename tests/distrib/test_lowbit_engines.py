"""4-bit linears on two ranks: on every engine the mean gradient is the rounded forward's, as one process has it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.reference import ragged
from exactness import case
from lowbit_cases import Drawn, drawn_as, true
from ranks import Ranks
from torch import Tensor
from train_cases import ENGINES

from distrib.contracts import Batch
from strategies import Fidelity
from strategies.core.compare import TOLERANCES, Differences, Promise

STEPS, TIMES = 8, 4
"""Each step has its micro-batches so many times over, on two ranks."""
PER_RANK = [[ragged(11, [5, 9], 9)], [ragged(14, [12], 12)]]
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "hq_bs": ("int4", {"preset": "hq_bs"}),
    "learned": ("int4", {"preset": "paper"}),
    "paper": ("fp4", {"preset": "paper"}),
    "nvfp4": ("fp4", {"preset": "nvfp4"}),
}


def asked(engine: str, preset: str, per_rank: list[list[Batch]], times: int = 1, **changes: Any) -> Any:
    name, fields = PRESETS[preset]
    return case(engine, name, [share * times for share in per_rank], fields={**fields, "target_share": 0.0}, **changes)


def compared(found: Drawn, wanted: dict[str, Tensor]) -> Differences:
    names = list(wanted)
    sums = [torch.stack([step[name].double().flatten() for step in found.gradients]) for name in names]
    right_ones = [wanted[name].double().flatten() for name in names]
    mean = torch.stack([(drawn.mean(0) - right).norm() for drawn, right in zip(sums, right_ones, strict=True)])
    deviation = torch.stack([drawn.var(0).sum().sqrt() for drawn in sums])
    return Differences(
        names, torch.stack([right.norm() for right in right_ones]), mean, deviation, len(found.gradients)
    )


CASES = [("ddp", "learned"), ("fsdp2", "hq_bs"), ("zero1", "paper"), ("zero2", "learned"), ("zero3", "hq_bs")]
OTHERS = [(engine, preset) for engine in ENGINES for preset in PRESETS if (engine, preset) not in CASES]
MODELS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora_r": 4}}
EVERY = [(*which, "full") for which in CASES] + [("fsdp2", "hq_bs", "lora"), ("zero3", "paper", "lora")]
SLOW = [(*which, model) for which in CASES + OTHERS for model in MODELS if (*which, model) not in EVERY]


@pytest.mark.parametrize(
    ("engine", "preset", "model"), [*EVERY, *(pytest.param(*which, marks=pytest.mark.slow) for which in SLOW)]
)
def test_the_mean_gradient_is_that_of_one_process(two_ranks: Ranks, engine: str, preset: str, model: str) -> None:
    # Learned scales are those of a rank's own first input.
    per_rank = PER_RANK[:1] * 2 if preset == "learned" else PER_RANK
    run = asked(engine, preset, per_rank, TIMES, **MODELS[model])
    loss, wanted = true(asked("ddp", preset, per_rank, **MODELS[model], dtype=run.dtype))
    found = two_ranks("lowbit_cases:draw", run, STEPS)
    assert sum(one.loss for one in found) == pytest.approx(loss, rel=1e-5)
    for one in found:
        differences = compared(one, wanted)
        assert differences.right(Promise(Fidelity.UNBIASED, 0, 0), TOLERANCES[run.dtype])
        assert float(differences.deviation.norm() / differences.true.norm()) > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_ranks_with_the_same_rows_draw_differently(two_ranks: Ranks, preset: str) -> None:
    run = asked("ddp", preset, PER_RANK[:1] * 2)
    alone = [drawn_as(rank, run) for rank in (0, 1)]
    found = two_ranks("lowbit_cases:draw", run, 1)
    for name, gradient in found[0].gradients[0].items():
        assert torch.equal(gradient, found[1].gradients[0][name])
        torch.testing.assert_close(gradient, alone[0][name] + alone[1][name], rtol=1e-9, atol=1e-12)
        if "layers.0." in name:
            assert (alone[0][name] - alone[1][name]).norm() > 1e-5 * gradient.norm()
