"""DeepSpeed ZeRO, stages 1 to 3, with optional offload of optimizer states (and stage 3's weights) to host memory.

bf16: DeepSpeed keeps fp32 master weights beside bf16 ones, from which they begin, and accumulates gradients in
fp32. Checkpoints are DeepSpeed's own; another number of ranks reads them through its universal form.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distrib.engines import Fill, Settings
from distrib.engines.context_parallel import ALONE
from distrib.engines.storage import only_data, unsummed
from distrib.errors import NotFinite, Refused
from distrib.topology import Topology, ensure_group
from distrib.units import blocks, units

TAG = "zero"
ROOT = "checkpoint"
"""Where DeepSpeed thinks it writes."""
RESHARDED = ("adamw", "adam", "radam")
"""Optimizers whose state another number of ranks can take over: DeepSpeed's universal form has two moments and a
count of steps, no more and no less."""


class Zero:
    name = "zero"
    stripes = ALONE

    def __init__(self, model: nn.Module, fill: Fill, topology: Topology, settings: Settings) -> None:
        ensure_group(topology)
        deepspeed = _import_deepspeed()
        self.model = model
        self.topology = topology
        self.settings = settings
        config = self._config()
        _place(deepspeed, model, fill, topology, settings, config)
        optimizer = None
        if settings.optimizer:
            optimizer = settings.optimizer.build(model.named_parameters())
        elif settings.stage < 3:
            self.module: Any = model
            return
        self.module, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def _config(self) -> dict[str, Any]:
        settings = self.settings
        zero: dict[str, Any] = {
            "stage": settings.stage if settings.optimizer or settings.stage == 3 else 0,
            "overlap_comm": self.topology.device_type == "cuda",
            "contiguous_gradients": self.topology.device_type == "cuda",
        }
        if settings.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
            if settings.stage == 3:
                zero["offload_param"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.bf16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "gradient_clipping": 0.0,
            "steps_per_print": 2**62,
            "wall_clock_breakdown": False,
        }

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if self.settings.optimizer:
            self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; every engine sums.
        self.module.backward(loss * self.topology.world)

    def gradients(self) -> Iterator[tuple[str, Tensor, str]]:
        """Gathered: DeepSpeed keeps flat partitions that need not follow the parameters' shapes."""
        from deepspeed.utils import safe_get_full_grad

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, safe_get_full_grad(parameter), "replicate"

    def step(self, learning_rate: float, max_grad_norm: float | None) -> float:
        optimizer = self.module.optimizer
        optimizer.clip_grad = max_grad_norm or 0.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient's norm is {norm}")
        return norm

    def zero_grad(self) -> None:
        self.module.zero_grad()
        if self.settings.optimizer:
            _forget_sums(self.module.optimizer)

    def save(self, create: Callable[[str], Any]) -> None:
        """Through what DeepSpeed calls its checkpoint engine, without the scripts that it puts beside."""

        def save(state_dict: dict[str, Any], path: str) -> None:
            with create(str(Path(path).relative_to(ROOT))) as file:
                torch.save(state_dict, file)

        self.module.checkpoint_engine.makedirs = lambda path, exist_ok: None
        self.module.checkpoint_engine.save = save
        self.module._copy_recovery_script = lambda folder: None
        with unsummed():
            self.module.save_checkpoint(ROOT, tag=TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        shards = len(list((folder / TAG).glob("*optim_states.pt")))
        with only_data(folder, *_classes()):
            if shards == self.topology.world:
                self.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=False)
            else:
                self._check_reshardable(folder, shards)
                self._load_universal(folder)

    def _check_reshardable(self, folder: Path, world: int) -> None:
        spec = self.settings.optimizer
        if spec and spec.name not in RESHARDED:
            raise Refused(
                f"{folder.parent} was written by {world} ranks, here are {self.topology.world}, and "
                f"engine.name='zero' reshards {', '.join(RESHARDED)} only, not optimizer.name={spec.name!r}: "
                f"start {world} ranks"
            )

    def _load_universal(self, folder: Path) -> None:
        """Another number of ranks: rank 0 rewrites the shards parameter by parameter, every rank takes its part. Beside
        the checkpoint, to which nothing is added, and for this once."""
        target = folder.parent.with_name(f".{folder.parent.name}.universal.draft")
        if self.topology.main:
            shutil.rmtree(target, ignore_errors=True)
            _convert_to_universal(folder / TAG, target / TAG)
        dist.barrier()
        inner = self.module.optimizer.optimizer
        decays = [group["weight_decay"] for group in inner.param_groups]
        config = self.module._config
        config.load_universal_checkpoint = True
        try:
            self.module.load_checkpoint(str(target), tag=TAG, load_module_strict=False)
        finally:
            config.load_universal_checkpoint = False
        dist.barrier()
        if self.topology.main:
            shutil.rmtree(target)
        # Stage 3 gives every group the first one's settings, and all parameters one shared step counter.
        for group, decay in zip(inner.param_groups, decays, strict=True):
            group["weight_decay"] = decay
        for state in inner.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()

    def full_state(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        frozen = any(not parameter.requires_grad for parameter in self.model.parameters())
        state: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                full = safe_get_full_fp32_param(parameter)
                if self.topology.main:
                    state[name] = full.detach().cpu().clone()
        if not frozen and self.topology.main:
            state |= {name: buffer.cpu() for name, buffer in _persistent_buffers(self.model)}
        return state


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The trained fp32 weights of a checkpoint, whole, without an engine."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with only_data(folder, *_classes()), contextlib.redirect_stdout(None):
        shards = [torch.load(path, mmap=True) for path in _by_rank(folder / TAG)]
        if "zero_stage" not in shards[0]["optimizer_state_dict"]:
            return _join_slices(folder / TAG, [shard["optimizer_state_dict"] for shard in shards])
        state: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag=TAG, exclude_frozen_parameters=True
        )
    return state


def _classes() -> list[type]:
    """What DeepSpeed keeps beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def _by_rank(folder: Path) -> list[Path]:
    return sorted(
        folder.glob("*zero_pp_rank_*optim_states.pt"),
        key=lambda path: int(path.name.partition("pp_rank_")[2].partition("_")[0]),
    )


def _join_slices(folder: Path, shards: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stage 1 in bf16 has an optimizer of its own in DeepSpeed, whose checkpoints its own tool does not read.

    Each rank has, of each parameter, the slice that falls into its part of the flat fp32 weights.
    """
    slices: dict[str, list[Tensor]] = {}
    for shard in shards:
        flat_groups, mappings = shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"]
        for flat, mapping in zip(flat_groups, mappings, strict=True):
            for name, part in mapping.items():
                slices.setdefault(name, []).append(flat.detach().narrow(0, part.start, part.numel))
    (weights,) = folder.glob("mp_rank_*_model_states.pt")
    shapes = torch.load(weights, mmap=True)["param_shapes"]
    return {name: torch.cat(slices[name]).view(shape) for group in shapes for name, shape in group.items()}


def _import_deepspeed() -> Any:
    """DeepSpeed without its just-in-time builds: neither a compiler nor a GPU is needed to start."""
    # It reads the launcher's variable even when one process was started without a launcher.
    os.environ.setdefault("LOCAL_RANK", "0")
    warnings.filterwarnings("ignore", message=r".*torch.distributed.\w+_tensor. is deprecated", category=FutureWarning)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    # Even for gloo it would compile a shared-memory all-reduce; a private switch, pinned by a test.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return deepspeed


def _forget_sums(optimizer: Any) -> None:
    """DeepSpeed's engine forgets `.grad`, but not the sums that its optimizer keeps beside it until a step. Stages 1
    and 2 clear theirs in the step only: here by the private names, which a test pins."""
    optimizer.zero_grad()
    if not hasattr(optimizer, "_release_preflattened_grad_buffers"):
        return
    optimizer.micro_step_id = -1
    optimizer._release_preflattened_grad_buffers()
    for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        sums.update(dict.fromkeys(sums))
    if optimizer.cpu_offload:
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()


def _place(
    deepspeed: Any,
    model: nn.Module,
    fill: Fill,
    topology: Topology,
    settings: Settings,
    config: dict[str, Any],
) -> None:
    for name, unit in units(model):
        fill(model, name)
        if settings.bf16:
            unit.to(torch.bfloat16)
        unit.to(topology.device)
        if settings.stage == 3:
            deepspeed.zero.Init(module=unit, config_dict_or_path=config)
    if settings.stage == 3:
        deepspeed.utils.set_z3_leaf_modules(model, sorted({type(block) for _, block in blocks(model)}, key=str))
        if any(not parameter.requires_grad for parameter in model.parameters()):
            model.enable_input_require_grads()  # type: ignore[operator]


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name not in parameters:
            yield name, value


def _convert_to_universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(None):
        ds_to_universal.main(options)
