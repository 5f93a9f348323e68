"""bf16 against fp32 on one device: the loss within 1%, every gradient within 10% of its norm.

bfloat16 has 8 bits; a step's loss and gradients go through a few dozen roundings of 2^-9.
"""

from __future__ import annotations

import pytest
from engine_cases import gathered, make_engine, padded, ragged_rows, recipe
from torch import Tensor

from distrib.contracts import Context
from distrib.topology import Topology

gpu = pytest.param("cuda", marks=pytest.mark.gpu)
LOSS_BOUND, GRADIENT_BOUND = 0.01, 0.1


def run(device: str, engine: dict[str, object], lora_r: int, bf16: bool) -> tuple[float, dict[str, Tensor]]:
    made_from = recipe(engine=engine, bf16=bf16, lora_r=lora_r)
    topology = Topology(device_type=device)
    built, step = make_engine(topology, made_from, None)
    batch = {name: value.to(topology.device) for name, value in padded(ragged_rows(6)).items()}
    weight = float((batch["labels"] != -100).sum())
    result = step([batch], Context(seed=0, step=0, weight=weight))
    return float(result.loss), {name: value.float().cpu() for name, value in gathered(built).items()}


@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.parametrize("engine", [{"name": "ddp"}, {"name": "fsdp2"}, {"name": "zero", "stage": 2}])
@pytest.mark.parametrize("device", ["cpu", gpu])
def test_bf16_stays_near_fp32(device: str, engine: dict[str, object], lora_r: int) -> None:
    loss, exact = run(device, {"name": "ddp"}, lora_r, bf16=False)
    low_loss, low = run(device, engine, lora_r, bf16=True)
    assert loss != low_loss
    assert abs(low_loss - loss) < LOSS_BOUND * loss
    for name, expected in exact.items():
        assert (low[name] - expected).norm() < GRADIENT_BOUND * expected.norm(), name
