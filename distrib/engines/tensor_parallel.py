"""Tensor and sequence parallelism within a model's blocks ("Reducing Activation Recomputation in Large Transformer
Models", 2205.05198, section 4.2), by the plans that Transformers' configurations bring.

Of N ranks each holds a part of the heads and of the MLP's columns, and between them a part of the sequence:

    embedding  ->  [B, T, D]  take a part   ->  [B, T/N, D]  norms, dropout, residuals
    attention, MLP:           gather        ->  [B, T, D]    their part of the columns, then of the rows
                              sum, scatter  ->  [B, T/N, D]
    after the last block:     gather        ->  [B, T, D]    final norm and head, the same on every rank

For the backward the parts are kept and gathered once more. A sequence that N does not divide gets zeros at its end,
which attention and MLP never see.

Outside the blocks every rank computes the same and has the whole gradient. Inside, a weight that is split has the
gradient of its part; any other has seen a part of the tokens or of the heads, and its gradient is the sum over ranks
(`sum_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from distrib.errors import Refused
from distrib.topology import Topology
from distrib.units import blocks

COLUMNS, ROWS, EVERY_HEAD = "colwise", "rowwise", "replicated_with_grad_allreduce"
STYLES = (COLUMNS, ROWS, EVERY_HEAD)
LAYERS = "layers.*."
FIGURES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")

Change = Callable[[Tensor], Tensor]


def check(config: Any, topology: Topology) -> None:
    """Refuse a model that cannot be split, as far as its configuration tells."""
    ranks = topology.tensor
    plan = {name: style for name, style in (getattr(config, "base_model_tp_plan", None) or {}).items() if "*" in name}
    if not plan:
        raise _refusal(ranks, f"Transformers has no tensor-parallel plan for model type {config.model_type!r}")
    foreign = [f"{name}: {style}" for name, style in plan.items() if style not in STYLES or not name.startswith(LAYERS)]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise _refusal(
            ranks,
            f"the plan of model type {config.model_type!r} has {foreign[0]}{more}, and only {', '.join(STYLES)} in one "
            "stack of layers are supported",
        )
    figures = {name: value for name in FIGURES if isinstance(value := getattr(config, name, None), int)}
    if uneven := [f"{name}={value}" for name, value in figures.items() if value % ranks]:
        most = gcd(*figures.values())
        fits = ", ".join(str(count) for count in range(1, most + 1) if most % count == 0)
        raise Refused(f"engine.tensor_parallel={ranks} does not divide the model's {', '.join(uneven)}: choose {fits}")


def _refusal(ranks: int, why: str) -> Refused:
    return Refused(f"engine.tensor_parallel={ranks}: {why}; set engine.tensor_parallel=1")


@dataclass(frozen=True)
class Cut:
    """A sequence over the ranks of a mesh: how a whole tensor [B, T, D] becomes parts [B, S, D] and back."""

    mesh: DeviceMesh
    length: int

    def _padded(self, whole_BTD: Tensor) -> Tensor:
        return F.pad(whole_BTD, (0, 0, 0, -self.length % self.mesh.size()))

    def take(self, whole_BTD: Tensor) -> Tensor:
        # A copy: a view would keep all of it.
        return self._padded(whole_BTD).chunk(self.mesh.size(), 1)[self.mesh.get_local_rank()].clone()

    def gather(self, part_BSD: Tensor) -> Tensor:
        whole_BTD = self._moved(part_BSD, Shard(1), Replicate())
        return whole_BTD[:, : self.length].clone() if whole_BTD.shape[1] > self.length else whole_BTD

    def scatter_sum(self, whole_BTD: Tensor) -> Tensor:
        return self._moved(self._padded(whole_BTD), Partial(), Shard(1))

    def _moved(self, tensor: Tensor, before: Placement, after: Placement) -> Tensor:
        placed = DTensor.from_local(tensor.contiguous(), self.mesh, [before], run_check=False)
        return placed.redistribute(placements=[after]).to_local()


class Move(Function):
    """A tensor there, its gradient back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, there: Change, back: Change) -> Tensor:
        ctx.back = back
        return there(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.back(gradient), None, None


def move(tensor: Tensor, there: Change, back: Change) -> Tensor:
    return Move.apply(tensor, there, back)  # type: ignore[no-untyped-call, no-any-return]


class Gathering:
    """What attention or an MLP gathers: its layers keep the part, and share one more gathering in the backward."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._again_BTD: Tensor | None = None

    def again(self, part_BSD: Tensor) -> Tensor:
        if self._again_BTD is None:
            self._again_BTD = self._cut.gather(part_BSD)
        return self._again_BTD

    def back(self, gradient_BTD: Tensor) -> Tensor:
        self._again_BTD = None
        return self._cut.scatter_sum(gradient_BTD)


class GatheredLinear(Function):
    """A linear layer of a gathered input that keeps the part which it was gathered from."""

    @staticmethod
    def forward(
        ctx: Any, whole_BTD: Tensor, part_BSD: Tensor, weight: Tensor, bias: Tensor | None, gathering: Gathering
    ) -> Tensor:
        ctx.gathering = gathering
        ctx.save_for_backward(part_BSD if ctx.needs_input_grad[2] else None, weight)
        return F.linear(whole_BTD, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient_BTK: Tensor) -> Any:
        part_BSD, weight = ctx.saved_tensors
        on_input = on_weight = on_bias = None
        if ctx.needs_input_grad[0]:
            on_input = gradient_BTK @ weight
        if ctx.needs_input_grad[2]:
            on_weight = gradient_BTK.flatten(0, 1).t() @ ctx.gathering.again(part_BSD).flatten(0, 1)
        if ctx.needs_input_grad[3]:
            on_bias = gradient_BTK.sum((0, 1))
        return on_input, None, on_weight, on_bias, None


SOURCE = "_ebbtide_source"
"""On a gathered tensor, in the forward: the part, and its `Gathering`."""


class Columns(nn.Linear):
    """Some columns of the output, for the whole sequence."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = _local(self.weight), _local(self.bias)
        if source := getattr(input, SOURCE, None):
            part_BSD, gathering = source
            return GatheredLinear.apply(input, part_BSD, weight, bias, gathering)  # type: ignore[no-untyped-call, no-any-return]
        return F.linear(input, weight, bias)


class Rows(nn.Linear):
    """Some columns of the input; of the sum over ranks each gets its part of the sequence. The bias is whole."""

    parallel: TensorParallel

    def forward(self, input: Tensor) -> Tensor:
        cut = self.parallel.cut
        part_BSD = move(F.linear(input, _local(self.weight)), cut.scatter_sum, cut.gather)
        return part_BSD if self.bias is None else part_BSD + self.bias


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class TensorParallel:
    """Splits a model's blocks over a mesh, one after the other, each when it is filled and before it is sharded."""

    def __init__(self, model: Any, mesh: DeviceMesh) -> None:
        plan = model.config.base_model_tp_plan
        self._plan = {name.removeprefix(LAYERS): plan[name] for name in plan if name.startswith(LAYERS)}
        self._names = [name for name, _ in blocks(model)]
        self._mesh = mesh
        self._partial: set[str] = set()
        self._outside: list[Tensor] = []
        """The random states that go on after the blocks."""
        self.cut = Cut(mesh, 0)
        """Of the batch that is on its way."""
        for _, block in blocks(model):
            self._check(block)

    def _check(self, block: nn.Module) -> None:
        kind, ranks = type(block).__name__, self._mesh.size()
        linears = list(self._linears(block))
        parents = {_parent(name) for name, _, _ in linears}
        for parent in sorted(parents):
            styles = [style for name, _, style in linears if _parent(name) == parent]
            if styles.count(ROWS) != 1 or COLUMNS not in styles:
                raise _refusal(ranks, f"{kind}.{parent} is {', '.join(styles)}: only columns, then rows are supported")
        planned, inside = (tuple(f"{name}." for name in names) for names in (self._plan, parents))
        for name, parameter in block.named_parameters():
            # A vector outside attention and MLP is a norm's: it knows no other token.
            if not name.startswith(planned) and (parameter.ndim > 1 or name.startswith(inside)):
                raise _refusal(ranks, f"the model's plan leaves out {kind}.{name}")
        for name, module, style in linears:
            linear = getattr(module, "base_layer", module)
            size = "out_features" if style == COLUMNS else "in_features"
            if type(linear) is not nn.Linear or getattr(linear, size) % ranks:
                raise _refusal(ranks, f"{kind}.{name} cannot be split: it is {linear}")

    def _linears(self, block: nn.Module) -> Iterator[tuple[str, Any, str]]:
        """(name, module, style) of the layers that are split; not every block has all that a plan names."""
        modules = dict(block.named_modules())
        for name, style in self._plan.items():
            if name in modules and style != EVERY_HEAD:
                yield name, modules[name], style

    def split(self, name: str, block: nn.Module) -> None:
        """`block` is the model's module of that name, with its values."""
        if name == self._names[0]:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
        if name == self._names[-1]:
            block.register_forward_hook(self._leave)
        linears = list(self._linears(block))
        for parent in sorted({_parent(name) for name, _, _ in linears}):
            block.get_submodule(parent).register_forward_pre_hook(self._gather, with_kwargs=True)
        for _, module, style in linears:
            self._split(module, style)
        self._partial |= {leaf for leaf, value in block.named_parameters(name) if not isinstance(value, DTensor)}

    def _split(self, module: Any, style: str) -> None:
        if not hasattr(module, "base_layer"):
            self._make(module, style)
            return
        self._make(module.base_layer, style)
        # LoRA's inner side stays whole: A runs before split columns, B after rows that are summed.
        for down, up in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
            self._make(up if style == COLUMNS else down, style)
            if style == COLUMNS:
                down.__class__ = Columns

    def _make(self, linear: Any, style: str) -> None:
        columns = style == COLUMNS
        for leaf in ("weight", "bias") if columns else ("weight",):
            if (value := getattr(linear, leaf)) is not None:
                placed = distribute_tensor(value.data, self._mesh, [Shard(0 if columns else 1)], src_data_rank=None)
                linear.register_parameter(leaf, nn.Parameter(placed, value.requires_grad))
        linear.__class__ = Columns if columns else Rows
        linear.parallel = self

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        def part(whole_BTD: Tensor) -> Tensor:
            self.cut = Cut(self._mesh, whole_BTD.shape[1])
            self._draw_apart(whole_BTD.device)
            return move(whole_BTD, self.cut.take, self.cut.gather)

        return _on_hidden(part, args, kwargs)

    def _gather(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        def whole(part_BSD: Tensor) -> Tensor:
            gathering = Gathering(self.cut)
            whole_BTD = move(part_BSD, self.cut.gather, gathering.back)
            setattr(whole_BTD, SOURCE, (part_BSD, gathering))
            return whole_BTD

        return _on_hidden(whole, args, kwargs)

    def _draw_apart(self, device: torch.device) -> None:
        """Dropout of parts and heads must differ between ranks, which draw alike outside of the blocks."""
        apart = int(torch.randint(2**62, ())) + self._mesh.get_local_rank()
        self._outside = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
        torch.manual_seed(apart)

    def _leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        torch.set_rng_state(self._outside[0])
        for state in self._outside[1:]:
            torch.cuda.set_rng_state(state)
        if isinstance(output, tuple):
            return move(output[0], self.cut.gather, self.cut.take), *output[1:]
        return move(output, self.cut.gather, self.cut.take)

    def sum_gradients(self, model: nn.Module) -> None:
        """Of the weights that saw a part of the tokens or heads, in one exchange, after the last micro-batch."""
        gradients = [
            _local(parameter.grad)
            for name, parameter in model.named_parameters()
            if name in self._partial and parameter.grad is not None
        ]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self._mesh.get_group())
            sums = flat.split_with_sizes([gradient.numel() for gradient in gradients])
            for gradient, total in zip(gradients, sums, strict=True):
                gradient.copy_(total.view_as(gradient))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _on_hidden(change: Change, args: Any, kwargs: Any) -> Any:
    """The hidden states are the first argument, or go by their name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
