"""Where a pipeline's schedules come from: a name and the number of micro-batches, or a file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from distrib.errors import UserError, choose
from distrib.pipeline.ops import Op, Schedule, parse
from distrib.pipeline.schedules import NAMES, make
from distrib.pipeline.simulate import Costs, check


@dataclass(frozen=True)
class Source:
    """`name` is one of the schedules' or a file's; `costs` are relative ones, of the stages."""

    name: str
    ranks: int
    pending: int | None = None
    costs: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        return self.made(1).stages

    def own(self, rank: int) -> tuple[int, ...]:
        return tuple(sorted(stage for stage, home in self.made(1).homes.items() if home == rank))

    def made(self, micro_batches: int) -> Schedule:
        """Checked. A file serves fewer micro-batches than it names, and not more."""
        return _made(self, micro_batches)

    def forwards(self, micro_batches: int) -> Schedule:
        """No backwards: an evaluation's."""
        homes = self.made(1).homes
        ranks: list[list[Op]] = [[] for _ in range(self.ranks)]
        for number in range(micro_batches):
            for stage in sorted(homes):
                ranks[homes[stage]].append(Op(stage, "F", number))
        return Schedule("forwards", tuple(map(tuple, ranks)))


@cache
def _made(source: Source, micro_batches: int) -> Schedule:
    if source.name in NAMES:
        own = source.costs
        costs = Costs(own, own, own) if own and source.name == "greedy" else None
        return make(source.name, source.ranks, micro_batches, costs, pending=source.pending)
    whole = _of_file(source.name, source.ranks)
    if micro_batches > whole.micro_batches:
        raise UserError(
            f"schedule {source.name} is for {whole.micro_batches} micro-batches, the step has {micro_batches}: set "
            f"gradient_accumulation_steps={whole.micro_batches}"
        )
    return Schedule(whole.name, tuple(tuple(op for op in ops if op.micro_batch < micro_batches) for ops in whole.ranks))


@cache
def _of_file(name: str, ranks: int) -> Schedule:
    path = Path(name).expanduser()
    if not path.is_file():
        raise choose("strategy.schedule", name, [*NAMES, "a file with a line of operations for every rank"])
    schedule = parse(path.read_text(encoding="utf-8"), path.name)
    check(schedule)
    if len(schedule.ranks) != ranks:
        raise UserError(f"schedule {name} is for {len(schedule.ranks)} ranks, the pipeline has {ranks}: set stages")
    return schedule
