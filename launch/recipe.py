"""The recipe: one strict, typed description of a run. Field names are those users know from other trainers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt

NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _named(value: Any) -> Any:
    """`engine: fsdp2` is short for `engine: {name: fsdp2}`."""
    return {"name": value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    return [_named(item) for item in (value if isinstance(value, list) else [value])]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(Section):
    """One data set: a built-in, a folder, a JSONL or parquet file, or a hub name."""

    name: str
    weight: PositiveFloat = 1.0
    split: str = "train"
    subset: str | None = None
    revision: str | None = None


class SFT(Section):
    name: Literal["sft"] = "sft"
    label_smoothing: Share = 0.0
    z_loss: NonNegative = 0.0


class DPO(Section):
    name: Literal["dpo"]
    beta: PositiveFloat = 0.1
    label_smoothing: Share = 0.0


class GRPO(Section):
    name: Literal["grpo"]
    beta: NonNegative = 0.0
    clip: PositiveFloat = 0.2


class Engine(Section):
    name: Literal["ddp", "fsdp2", "zero"] = "ddp"
    stage: Literal[1, 2, 3] = 2
    offload: bool = False


class Strategy(BaseModel):
    """A strategy's name and its fields; the fields are checked by the strategy itself."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    name: str


class Optimizer(Section):
    name: Literal["adamw", "adam", "sgd", "nadam", "radam", "adamax", "adagrad", "rmsprop", "adafactor"] = "adamw"
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    momentum: Share = 0.0


class Recipe(Section):
    model_name_or_path: str = "tiny"
    init: Literal["pretrained", "random"] = "pretrained"
    config_overrides: dict[str, Any] = {}
    model_revision: str | None = None
    trust_remote_code: bool = False
    bf16: bool = False
    compile: bool = False

    dataset: Annotated[list[Source], BeforeValidator(_listed), Field(min_length=1)] = [Source(name="stdlib")]
    eval_dataset: Annotated[list[Source], BeforeValidator(_listed)] | None = None
    streaming: bool = False
    max_length: PositiveInt = 2048
    packing: bool = False

    objective: Annotated[SFT | DPO | GRPO, BeforeValidator(_named), Field(discriminator="name")] = SFT()
    strategy: Annotated[list[Strategy], BeforeValidator(_listed), Field(min_length=1)] = [Strategy(name="plain")]
    engine: Annotated[Engine, BeforeValidator(_named)] = Engine()
    nproc: PositiveInt = 1

    per_device_train_batch_size: PositiveInt = 1
    gradient_accumulation_steps: PositiveInt = 1
    global_batch_size: PositiveInt | None = None
    max_steps: PositiveInt | None = None
    num_train_epochs: PositiveFloat = 1.0
    learning_rate: NonNegative = 2e-4
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    optimizer: Annotated[Optimizer, BeforeValidator(_named)] = Optimizer()

    lora_r: Annotated[int, Field(ge=0)] = 0
    lora_alpha: PositiveFloat = 16.0
    lora_dropout: Share = 0.0
    lora_target_modules: str | list[str] = "all-linear"

    seed: int = 42
    logging_steps: PositiveInt = 1
    eval_steps: PositiveInt | None = None
    eval_rows: PositiveInt = 64
    eval_samples: Annotated[int, Field(ge=0)] = 0
    save_steps: PositiveInt = 500
    save_total_limit: PositiveInt | None = 2
    resume_from_checkpoint: bool | str = True
    report_to: Literal["none", "tensorboard"] = "none"
    output_dir: str = "runs/tiny"
