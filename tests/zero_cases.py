"""One rank that trains under ZeRO: a fresh process, so that a test chooses its whole environment."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any


def main(data: str, runs: Path, engines: list[dict[str, Any]]) -> None:
    """A run for each engine. Whatever is on sys.path is there for the tests; PATH is what the test gave."""
    import torch
    from train_cases import recipe

    from distrib.topology import connect, read_environment
    from launch.train import train

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    topology = read_environment()
    connect(topology)
    for index, engine in enumerate(engines):
        train(recipe(runs / str(index), data, engine=engine, max_steps=2), topology)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
