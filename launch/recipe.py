"""The recipe: one strict, typed description of a run. Field names are those users know from other trainers.

A section may be given by its name alone (`engine: fsdp2`), a list by its only entry (`dataset: stdlib`). What
can be seen as wrong without model or data is refused here, for recipes from a file and from Python alike.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from distrib.errors import Refused, UserError


def _whole(value: Any) -> Any:
    """1e3 is a whole number, however it is written."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _named(value: Any) -> Any:
    """`engine: fsdp2` is short for `engine: {name: fsdp2}`."""
    return {"name": value} if isinstance(value, str) else value


def _objective(value: Any) -> Any:
    value = _named(value)
    return {"name": "sft", **value} if isinstance(value, dict) else value


def _listed(value: Any) -> Any:
    return [_named(item) for item in (value if isinstance(value, list) else [value])]


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Whole = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Count = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
AboveOne = Annotated[float, Field(gt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
OptimizerName = Literal[
    "adamw", "adamw4bit", "adam", "sgd", "nadam", "radam", "adamax", "adagrad", "rmsprop", "adafactor"
]
BUILT_IN_SETS = ("stdlib", "additions")
ADAMS = ("adamw", "adamw4bit", "adam", "nadam", "radam", "adamax")


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Source(Section):
    name: Text
    """`stdlib` or `additions` (built in), a folder, a JSONL or parquet file, or a hub name."""
    weight: Positive = 1.0
    """Share of this set's rows that an epoch takes: 0.5 every other row, 2 every row twice."""
    split: Text = "train"
    """Split of a hub data set."""
    subset: Text | None = None
    """Configuration of a hub data set."""
    revision: Text | None = None
    """Revision of a hub data set."""


class SFT(Section):
    name: Literal["sft"] = "sft"
    label_smoothing: Share = 0.0
    """Probability mass spread evenly over the vocabulary."""
    z_loss: NonNegative = 0.0
    """Weight of the squared log of the softmax's normaliser."""


class DPO(Section):
    name: Literal["dpo"]
    beta: Positive = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: Share = 0.0
    """Probability that a preference is the wrong way round."""


class GRPO(Section):
    name: Literal["grpo"]
    beta: NonNegative = 0.0
    """Weight of the divergence from the reference; 0 needs no reference."""
    clip: Positive = 0.2
    """Range in which the probability ratio is not clipped."""


ENGINE_KEYS = {"offload": "zero", "stage": "zero", "tensor_parallel": "fsdp2"}
"""Keys of one engine, and which."""


class Engine(Section):
    name: Literal["ddp", "fsdp2", "zero"] = "ddp"
    """`ddp` keeps a copy a rank, `fsdp2` shards everything, `zero` is DeepSpeed's."""
    stage: Annotated[int, Field(ge=1, le=3), BeforeValidator(_whole)] = 2
    """`zero` only: shards the optimizer (1), gradients (2), weights (3)."""
    offload: bool = False
    """`zero` only: keeps the optimizer in the host's memory."""
    tensor_parallel: Annotated[int, Field(ge=1), BeforeValidator(_whole)] = 1
    """`fsdp2` only: ranks that share each layer's weights and each sequence; such groups are data-parallel."""
    context_parallel: Annotated[int, Field(ge=1), BeforeValidator(_whole)] = 1
    """`ddp` and `fsdp2`: ranks that share each sequence, for long ones; such groups are data-parallel."""

    @model_validator(mode="after")
    def _fits(self) -> Engine:
        for key, owner in ENGINE_KEYS.items():
            if key in self.model_fields_set and self.name != owner:
                raise Refused(f"engine.{key} is a key of {owner}, not of {self.name}: set engine.name={owner}")
        return self

    @property
    def copies(self) -> int:
        """Ranks that see the same rows, in one stage."""
        return self.tensor_parallel * self.context_parallel


class Strategy(BaseModel):
    """A strategy's name and its fields; the fields are checked by the strategy itself."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, use_attribute_docstrings=True)
    name: Text
    """One of `ebbtide strategies`; its own fields stand beside its name."""


class Optimizer(Section):
    name: OptimizerName = "adamw"
    """PyTorch's optimizer of this name; `adamw4bit` is AdamW with its states in four bits."""
    betas: Annotated[tuple[Share, Share], BeforeValidator(_pair)] = (0.9, 0.999)
    """Decay of the running means of `adamw`, `adamw4bit`, `adam`, `nadam`, `radam`, `adamax`."""
    eps: Positive = 1e-8
    """Added to the denominator."""
    momentum: Share = 0.0
    """Of `sgd` and `rmsprop`."""

    @model_validator(mode="after")
    def _fits(self) -> Optimizer:
        if self.momentum and self.name not in ("sgd", "rmsprop"):
            raise Refused(f"optimizer.momentum={self.momentum} with {self.name}: only sgd and rmsprop use it")
        if self.betas != (0.9, 0.999) and self.name not in ADAMS:
            raise Refused(f"optimizer.betas={list(self.betas)} with {self.name}: only Adam's family uses them")
        return self


class Profile(Section):
    steps: Annotated[tuple[Count, Count], BeforeValidator(_pair)]
    """First and last step that PyTorch's profiler traces, into `profile/` of the run."""

    @model_validator(mode="after")
    def _fits(self) -> Profile:
        if self.steps[0] > self.steps[1]:
            raise UserError(f"profile.steps={list(self.steps)}: the first step must not come after the last")
        return self


class Energy(Section):
    idle_s: NonNegative = 1.0
    """Seconds before the run in which the idle power is measured, for net figures; 0 does not."""
    grams_co2_per_kwh: Positive | None = None
    """CO2 of a kWh where the run's electricity comes from, for the report; with `intensity_source`."""
    intensity_source: Text | None = None
    """Where that figure is from; the report repeats it."""

    @model_validator(mode="after")
    def _fits(self) -> Energy:
        if (self.grams_co2_per_kwh is None) != (self.intensity_source is None):
            given, missing = "grams_co2_per_kwh", "intensity_source"
            if self.grams_co2_per_kwh is None:
                given, missing = missing, given
            raise UserError(f"energy.{given}={getattr(self, given)!r} without energy.{missing}: give both")
        return self


_Objectives = Literal["sft", "dpo", "grpo"] | SFT | DPO | GRPO
_SourceList = Annotated[list[Text | Source], Field(min_length=1)]
_StrategyList = Annotated[list[Text | Strategy], Field(min_length=1)]
_Sources = Annotated[
    list[Source],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=Text | Source | _SourceList),
]
_Strategies = Annotated[
    list[Strategy],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=Text | Strategy | _StrategyList),
]
_Engine = Annotated[Engine, BeforeValidator(_named, json_schema_input_type=Literal["ddp", "fsdp2", "zero"] | Engine)]
_Optimizer = Annotated[Optimizer, BeforeValidator(_named, json_schema_input_type=OptimizerName | Optimizer)]


class Recipe(Section):
    model_name_or_path: Text = "tiny"
    """`tiny` or `small` (built in, random weights), a folder, or a hub name."""
    init: Literal["pretrained", "random", "shrunk"] = "pretrained"
    """`random` takes the configuration and draws new weights; `shrunk` also makes it tiny, with bytes as tokens."""
    config_overrides: dict[str, Any] = {}
    """Fields of the model's configuration to change."""
    model_revision: Text | None = None
    """Revision of a hub model; a full commit hash where remote code is trusted."""
    trust_remote_code: bool = False
    """Runs code that comes with the model; needs `model_revision`."""
    bf16: bool = False
    """Computes in bfloat16, with float32 master weights."""
    compile: bool = False
    """Compiles every block with torch.compile."""

    dataset: _Sources = [Source(name="stdlib")]
    """One data set or a list, mixed by weight."""
    eval_dataset: _Sources | None = None
    """What `eval_steps` evaluates on."""
    streaming: bool = False
    """Reads rows while training, through a shuffle buffer and without a cache; needs `max_steps`."""
    max_length: Count = 2048
    """Longest row in tokens."""
    packing: bool = False
    """Fills rows with several documents that do not see each other; `sft` only."""

    objective: Annotated[
        SFT | DPO | GRPO,
        Field(discriminator="name"),
        BeforeValidator(_objective, json_schema_input_type=_Objectives),
    ] = SFT()
    """What is minimised."""
    strategy: _Strategies = [Strategy(name="plain")]
    """How gradients are computed; one strategy or a list."""
    verify: bool = True
    """Compares the gradients with plain autograd's on a few tokens before training starts."""
    engine: _Engine = Engine()
    """How the model is spread over ranks."""
    nproc: Count = 1
    """Ranks that `ebbtide train` starts on this machine; torchrun and srun start their own."""
    max_restarts: Whole = 0
    """Times that they are started again after a failure without a new checkpoint since."""
    min_nproc: Count | None = None
    """Starts again without a rank that failed, as long as so many are left; needs `global_batch_size`."""
    hang_timeout_s: Positive = 600.0
    """Seconds after which a rank that does not answer, or that others wait for, ends the run by name."""

    per_device_train_batch_size: Count = 1
    """Rows of a micro-batch on one rank."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches of a step."""
    global_batch_size: Count | None = None
    """Rows of a step over all ranks; `gradient_accumulation_steps` then follows."""
    max_steps: Count | None = None
    """Optimizer steps, in place of `num_train_epochs`."""
    num_train_epochs: Positive = 1.0
    """Passes over the data when `max_steps` is not given."""
    learning_rate: NonNegative = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["cosine", "linear", "warmup_stable_decay", "constant"] = "cosine"
    """How the learning rate falls after the warmup; `warmup_stable_decay` falls in the last fifth of the steps."""
    warmup_ratio: Share = 0.0
    """Share of the steps in which the learning rate rises."""
    warmup_steps: Whole = 0
    """The same as a number of steps."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Longest gradient, by its norm over all ranks; 0 does not clip."""
    optimizer: _Optimizer = Optimizer()
    """What turns gradients into updates."""

    lora_r: Whole = 0
    """Rank of the LoRA adapter; 0 trains the whole model."""
    lora_alpha: Positive = 16.0
    """The adapter is scaled by `lora_alpha / lora_r`."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapter."""
    lora_target_modules: Text | list[Text] = "all-linear"
    """Modules that get an adapter: `all-linear`, a list of names, or a regular expression."""

    load_in_4bit: bool = False
    """Holds the frozen layers' matrices in 4 bits; needs `lora_r`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 values of those 4 bits."""
    bnb_4bit_use_double_quant: bool = False
    """Holds the scales of those matrices in 8 bits."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1), BeforeValidator(_whole)] = 42
    """Of initial weights, data order and dropout."""
    logging_steps: Count = 1
    """Steps between two lines of the console and of `metrics.jsonl`."""
    eval_steps: Count | None = None
    """Steps between two evaluations; needs `eval_dataset`."""
    eval_rows: Count = 64
    """Rows of an evaluation."""
    eval_samples: Whole = 0
    """Samples generated at an evaluation."""
    save_steps: Count = 500
    """Steps between two checkpoints."""
    save_total_limit: Count | None = 2
    """Checkpoints that are kept; null keeps all."""
    save_best: bool = False
    """Also keeps the checkpoint with the lowest held-out loss; needs `eval_steps`."""
    save_async: bool = True
    """Writes checkpoints while training goes on, from a copy in memory."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """What a checkpoint that cannot be written does to the run."""
    on_oom: Literal["stop", "halve"] = "stop"
    """What follows when memory runs out; `halve` starts again with half as many sequences at once, as many a step."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """What a step does whose loss or gradient is not finite, or spikes: none changes the weights."""
    loss_spike: AboveOne | None = None
    """So many times the median of the latest losses counts as a spike."""
    resume_from_checkpoint: bool | Text = True
    """`true` goes on where the output folder stopped, `false` does not; or a checkpoint's folder."""
    profile: Profile | None = None
    """Traces some steps, for example `{steps: [10, 12]}`."""
    report_to: Literal["none", "tensorboard"] = "none"
    """Where else the metrics go."""
    energy: Energy = Energy()
    """How joules are accounted for."""
    output_dir: Text = "runs/tiny"
    """The run's folder."""

    def with_strategies(self, sections: list[dict[str, Any]]) -> Recipe:
        """The same recipe with other strategies."""
        return self.model_copy(update={"strategy": [Strategy(**section) for section in sections]})

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        for rule in (_model_rules, _data_rules, _loop_rules):
            rule(self)
        return self


def _model_rules(recipe: Recipe) -> None:
    local = os.path.isdir(recipe.model_name_or_path)
    if recipe.trust_remote_code and not local and not re.fullmatch("[0-9a-f]{40}", recipe.model_revision or ""):
        raise Refused(
            f"trust_remote_code=true with model_revision={recipe.model_revision or 'null'}: "
            "pin the code to a full commit hash (40 hex digits)"
        )
    names = [strategy.name for strategy in recipe.strategy]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Refused(f"strategy={names}: {twice[0]} is listed twice; name each once")
    if not recipe.lora_r and recipe.lora_dropout:
        raise Refused(f"lora_dropout={recipe.lora_dropout} with lora_r=0: set lora_r to train an adapter")
    _four_bit_rules(recipe)


def _four_bit_rules(recipe: Recipe) -> None:
    if recipe.load_in_4bit and not recipe.lora_r:
        raise Refused("load_in_4bit=true with lora_r=0: 4-bit weights do not train; set lora_r to train an adapter")
    if recipe.load_in_4bit and recipe.engine.tensor_parallel > 1:
        raise Refused(
            f"load_in_4bit=true with engine.tensor_parallel={recipe.engine.tensor_parallel}: 4-bit weights are not "
            "split; set engine.tensor_parallel=1"
        )
    for key in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if not recipe.load_in_4bit and getattr(recipe, key) != Recipe.model_fields[key].default:
            raise Refused(f"{key}={getattr(recipe, key)} with load_in_4bit=false: set load_in_4bit=true")


def _data_rules(recipe: Recipe) -> None:
    if recipe.packing and recipe.objective.name != "sft":
        raise Refused(f"packing=true with objective={recipe.objective.name}: only sft packs; set packing=false")
    if recipe.streaming and recipe.max_steps is None:
        raise UserError("streaming=true without max_steps: a stream's length is not known; set max_steps")
    if recipe.eval_steps and not recipe.eval_dataset:
        raise UserError(f"eval_steps={recipe.eval_steps} without eval_dataset: set eval_dataset")
    if recipe.eval_samples and not recipe.eval_steps:
        raise UserError(f"eval_samples={recipe.eval_samples} without eval_steps: set eval_steps")


def _loop_rules(recipe: Recipe) -> None:
    if recipe.min_nproc is not None:
        _min_nproc_rules(recipe, recipe.min_nproc)
    parts = recipe.output_dir.split("/")
    if ".." in parts or not recipe.output_dir.isprintable():
        raise UserError(f"output_dir={recipe.output_dir[:200]!r}: name a folder without `..` and control characters")
    if recipe.save_best and not recipe.eval_steps:
        raise UserError("save_best=true without eval_steps: set eval_steps")
    if recipe.save_best and recipe.save_steps % (recipe.eval_steps or 1):
        raise UserError(
            f"save_best=true with save_steps={recipe.save_steps} and eval_steps={recipe.eval_steps}: a checkpoint has "
            "a held-out loss at a multiple of eval_steps; set save_steps to one"
        )
    if recipe.loss_spike is not None and isinstance(recipe.objective, GRPO):
        raise UserError(f"loss_spike={recipe.loss_spike} with objective grpo, whose loss is near 0: leave it out")
    if recipe.warmup_steps and recipe.warmup_ratio:
        raise UserError(f"warmup_steps={recipe.warmup_steps} and warmup_ratio={recipe.warmup_ratio}: give one of them")


def _min_nproc_rules(recipe: Recipe, least: int) -> None:
    if least > recipe.nproc:
        raise UserError(f"min_nproc={least} with nproc={recipe.nproc}: must be at most nproc")
    if not recipe.max_restarts:
        raise UserError(f"min_nproc={least} with max_restarts=0: set max_restarts")
    if recipe.global_batch_size is None:
        raise UserError(f"min_nproc={least} without global_batch_size: fewer ranks would see other rows; set it")
