from __future__ import annotations

from dataclasses import dataclass

from strategies.lowbit.strategy import LowBit, Preset


@dataclass(frozen=True)
class Int4(LowBit):
    """Linears multiply 4-bit integers: input and weight spread by a Hadamard transform and rounded to INT4, gradients
    split in two INT4 parts, the second one rounded stochastically (2306.11987).

    `hq_bs`, the default, scales every row by its largest number; on a device with int8 products each product is
    exactly one of these. `paper` learns one scale a matrix and samples the rows of the backward's products; it is
    emulated. Gradients are on average those of the forward as it is rounded. Wrong to use where a model must train as
    it will run: the forward of training is rounded, that of evaluation is not.
    """

    presets = {"hq_bs": Preset("int4", "int4"), "paper": Preset("int4_learned", "int4_learned")}
    preset: str = "hq_bs"
