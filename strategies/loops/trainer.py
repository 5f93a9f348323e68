"""Strategies for Hugging Face's Trainer and the trainers that are made of it, TRL's among them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distrib.contracts import Context
from distrib.errors import Refused
from distrib.topology import Topology
from strategies.core.contract import Strategy, overrides
from strategies.core.registry import name_of
from strategies.loops.attach import Attached, attach

STATE = "strategies.json"
"""Beside the weights of a checkpoint: what the strategies must keep, where they must keep something."""

log = logging.getLogger("ebbtide")


class TrainerMixin:
    """Before a trainer's class: `class Mine(TrainerMixin, SFTTrainer): ...`, then `Mine(strategies=[...], model=...)`.

    The trainer makes its model first, adapters and all, and keeps its loss, its metrics, its accumulation and its
    optimizer. Evaluation goes through the strategies too; generation does not.
    """

    attached: Attached

    def __init__(self: Any, *args: Any, strategies: Sequence[Strategy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refuse(self, strategies)
        given = self.args
        topology = Topology(
            given.process_index, given.world_size, max(0, given.local_process_index), device_type=given.device.type
        )
        self.attached = attach(self.model, strategies, topology)
        self._window: ExitStack | None = None
        self._went_through = False
        if self.attached.carrier is not None:
            _switch_checkpointing_off(self)

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Of one micro-batch; a window of them is a step of the strategies."""
        if self._window is None:
            self._window = ExitStack()
            context = Context(self.args.seed, self.state.global_step, 1.0, self.state.max_steps)
            self._window.enter_context(self.attached.running(context))
        try:
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            # What comes next is no part of this window.
            self._window = None
            raise
        if self.accelerator.sync_gradients:
            self._window.close()
            self._window = None
            if not self._went_through:
                self.attached.assert_ran()
                self._went_through = True
        return loss

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if kept := self.attached.state():
            (Path(output_dir or self.args.output_dir) / STATE).write_text(json.dumps(kept))

    def _load_from_checkpoint(self: Any, folder: str, model: Any = None) -> None:
        super()._load_from_checkpoint(folder, model)  # type: ignore[misc]
        kept = Path(folder) / STATE
        if kept.exists():
            self.attached.restore(json.loads(kept.read_text()))


def _refuse(trainer: Any, strategies: Sequence[Strategy]) -> None:
    """What would not be exact, or cannot be, whatever the model."""
    args = trainer.args
    if trainer.model_init is not None:
        raise Refused("model_init with strategies: the trainer would make another model at train(); give it a model")
    if args.n_gpu > 1:
        raise Refused(f"{args.n_gpu} GPUs in one process: start one process a GPU (torchrun), or show it one of them")
    if args.fp16:
        raise Refused("fp16=True: gradients underflow in float16; use bf16=True or neither")
    for strategy in strategies:
        name = name_of(strategy)
        if args.torch_compile and not strategy.compiles:
            raise Refused(f"torch_compile=True with strategy {name}: leave it out")
        if not overrides(strategy, "step"):
            continue
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise Refused(f"strategy {name} under DeepSpeed or FSDP: it runs the backward itself; use ebbtide train")
        optimizer = getattr(args.optim, "value", args.optim)
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise Refused(
                f"optim={optimizer!r} with strategy {name}: it steps within the backward, of which there are several"
            )


def _switch_checkpointing_off(trainer: Any) -> None:
    """On by default in TRL. It would drop the keys and values that chunks record, and there is nothing for it to do."""
    parts = [part for part in trainer.model.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(trainer.args, name, None):
            setattr(trainer.args, name, False)
            log.info("%s is switched off: strategy %s keeps no activations", name, trainer.attached.carrier.name)
