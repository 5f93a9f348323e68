"""One replica of a run in float64: `python replica_cases.py FOLDER WHO`, with the lighthouse in the environment.

What it does is written to FOLDER/WHO. `lost` stops for ever within a step, after its backward, once it has shared
some. `first` was alone before, is alone for some steps after, and then waits until `late` is about to come; ten steps
after it has come the run is over for all.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import strategies

ROWS, LENGTH = 6, 12
SOME, MORE = 3, 10
MANY = 100_000


def batch(step: int) -> Tensor:
    return torch.randint(40, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Its part of the mean over all rows of the step."""
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return -logprobs.gather(2, ids[:, 1:, None]).sum() / (ROWS * (LENGTH - 1))


def parts(seed: int) -> tuple[LlamaForCausalLM, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).double().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)


def main(folder: Path, who: str) -> None:
    from distrib.replicas import Replicas

    torch.set_num_threads(1)
    model, optimizer, schedule = parts(seed=len(who))
    strategies.attach(model, [strategies.get("seco")(chunk=5)])
    over, counts = folder / "over", []
    if who == "late":
        (folder / "coming").touch()
    with (folder / who).open("w", buffering=1) as said, Replicas(model, optimizer, schedule, timeout_s=60) as replicas:
        for share in replicas.steps(MANY):
            if over.exists() and share.step >= int(over.read_text()):
                break
            loss = loss_of(model, batch(share.step)[share.rank :: share.count])
            loss.backward()
            if who == "lost" and len(counts) == SOME:
                (folder / "is-lost").touch()
                time.sleep(600)
            total = replicas.update(loss)
            said.write(f"{share.step} {share.count} {total}\n")
            if total is None:
                continue
            schedule.step()
            counts.append(share.count)
            if who == "first":
                direct(counts, folder, over, share.step)
    torch.save(model.state_dict(), folder / f"{who}.pt")


def direct(counts: list[int], folder: Path, over: Path, step: int) -> None:
    """`counts`: replicas of every step so far."""
    times = sum(before != after for before, after in pairwise(counts))
    if times == 2 and counts[-SOME:] == [1] * SOME:
        wait_for(folder / "coming")
    if times == 3 and not over.exists():
        over.with_suffix(".new").write_text(str(step + MORE))
        os.replace(over.with_suffix(".new"), over)
    if times in (0, 2):
        time.sleep(0.05)


def wait_for(file: Path) -> None:
    end = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < end, file
        time.sleep(0.05)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
