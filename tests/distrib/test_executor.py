"""A pipeline gives the whole model's gradients, by our executor and by PyTorch's; a lost rank ends the others."""

from __future__ import annotations

import signal
from typing import Any

import pipeline_cases as cases
import pytest
import torch
from ranks import Ranks
from train_cases import Ended, run

from distrib.errors import Refused
from distrib.pipeline.channels import UNDER_WAY, under_way
from distrib.pipeline.executor import Links
from distrib.pipeline.executor import run as execute
from distrib.pipeline.ops import Op, Schedule, parse
from distrib.pipeline.record import Span
from distrib.pipeline.schedules import NAMES, make
from distrib.pipeline.torch_runtime import torch_stages
from launch.rank import report

MIXED = parse("0F0,0F1,0B0,0F2,0I1,0B2,0W1\n1F0,1I0,1F1,1I1,1W0,1F2,1B2,1W1", "both kinds of backward")
CROSSED = parse("0F0,0F1,0B1,0F2,0B0,0B2\n1F1,1F0,1B1,1B0,1F2,1B2", "micro-batches that overtake each other")
LOOPED = parse("0F0,0F1,2F0,2F1,2I0,2B1,0B0,2W0,0B1\n1F0,1F1,3F0,3B0,3F1,3I1,1I0,1B1,3W1,1W0", "interleaved")
FOLDED = parse("0F0,0F1,3F0,3I0,3F1,3B1,3W0,0B0,0B1\n1F0,2F0,1F1,2F1,2I0,1I0,2B1,1B1,2W0,1W0", "v")
BY_HAND = (MIXED, CROSSED, LOOPED, FOLDED)


def held_against_the_whole(schedule: Schedule, rows: list[int], found: list[dict[int, Any]]) -> None:
    stages = {stage: result for rank in found for stage, result in rank.items()}
    gradients, losses = cases.whole(schedule.stages, rows)
    assert sorted(stages) == list(range(schedule.stages))
    for stage, expected in enumerate(gradients):
        for ours, theirs in zip(stages[stage][0], expected, strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-12, atol=1e-12)
    last = stages[schedule.stages - 1][1]
    assert [last[micro_batch] for micro_batch in range(len(rows))] == pytest.approx(losses, abs=1e-12)


@pytest.mark.parametrize("schedule", BY_HAND, ids=lambda schedule: schedule.name)
def test_two_ranks_with_micro_batches_of_any_size(two_ranks: Ranks, schedule: Schedule) -> None:
    rows = [1 + 2 * micro_batch for micro_batch in range(schedule.micro_batches)]
    held_against_the_whole(schedule, rows, two_ranks("pipeline_cases:trained", schedule, rows))


@pytest.mark.parametrize("schedule", [MIXED, LOOPED, FOLDED], ids=lambda schedule: schedule.name)
def test_two_ranks_by_torch(two_ranks: Ranks, schedule: Schedule) -> None:
    rows = [3] * schedule.micro_batches
    held_against_the_whole(schedule, rows, two_ranks("pipeline_cases:trained", schedule, rows, True))


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks(four_ranks: Ranks, name: str, by_torch: bool) -> None:
    schedule, rows = make(name, 4, 6), [2] * 6
    held_against_the_whole(schedule, rows, four_ranks("pipeline_cases:trained", schedule, rows, by_torch))


def test_torch_takes_equal_micro_batches_only() -> None:
    stage = cases.Part(cases.model(1)[0], cases.inputs([1, 2]), first=True, last=False)
    with pytest.raises(Refused, match="micro-batches of different shapes"):
        torch_stages({0: stage}, 2, 2, torch.device("cpu"), set())


def test_two_pipelines_in_one_job(four_ranks: Ranks) -> None:
    rows = [[1, 2, 3], [4, 2, 5]]
    found = four_ranks("pipeline_cases:trained_two", MIXED, rows)
    for pipeline in (0, 1):
        held_against_the_whole(MIXED, rows[pipeline], found[pipeline::2])


@pytest.mark.parametrize("training", [MIXED, FOLDED], ids=lambda schedule: schedule.name)
def test_forwards_alone(two_ranks: Ranks, training: Schedule) -> None:
    rows = [1, 2, 3, 4, 5, 6]
    stages = [[stage for stage, rank in sorted(training.homes.items()) if rank == here] for here in range(2)]
    order = tuple(tuple(Op(stage, "F", i) for i in range(len(rows)) for stage in mine) for mine in stages)
    found = two_ranks("pipeline_cases:evaluated", training, Schedule("forwards", order), rows)
    losses = {micro_batch: loss for rank in found for micro_batch, loss in rank.items()}
    assert losses == pytest.approx(dict(enumerate(cases.whole(training.stages, rows)[1])), abs=1e-12)


def test_one_rank_with_all_stages() -> None:
    schedule, rows = parse("0F0,1F0,0F1,2F0,2I0,1I0,0B0,1F1,2F1,2B1,1B1,0B1,1W0,2W0", "one rank"), [2, 3]
    layers, inputs = cases.model(3), cases.inputs(rows)
    parts = {stage: cases.Part(layers[stage], inputs, stage == 0, stage == 2) for stage in range(3)}
    execute(schedule, parts, Links((0,), 0, torch.device("cpu"), {}))
    found = {stage: (cases.gradients(part.layers), part.losses) for stage, part in parts.items()}
    held_against_the_whole(schedule, rows, [found])


def test_a_schedule_that_needs_much_under_way_gets_it(two_ranks: Ranks) -> None:
    """Rank 1 looks at the second micro-batch when it has stage 3's first, which rank 0 sends after all of stage 0."""
    count = 12
    first = [f"0F{i}" for i in range(count)] + [f"2F{i}" for i in range(count)]
    first += [f"2B{i}" for i in range(count)] + [f"0B{i}" for i in range(count)]
    second = ["1F0", "3F0"] + [f"1F{i}" for i in range(1, count)] + [f"3F{i}" for i in range(1, count)]
    second += [f"3B{i}" for i in range(count)] + [f"1B{i}" for i in range(count)]
    schedule, rows = parse(",".join(first) + "\n" + ",".join(second), "late"), [1] * count
    assert under_way(make("gpipe", 2, count)) == UNDER_WAY < under_way(schedule) < 2 * count
    held_against_the_whole(schedule, rows, two_ranks("pipeline_cases:trained", schedule, rows))


def test_a_record_has_every_operation_in_its_time(two_ranks: Ranks) -> None:
    for spans, ops in zip(two_ranks("pipeline_cases:recorded", FOLDED, [2, 2]), FOLDED.ranks, strict=True):
        assert [span.op for span in spans] == list(ops)
        moments = [moment for span in spans for moment in (span.start, span.end)]
        assert moments == sorted(moments)
        assert 0 < moments[0] < moments[-1]


@pytest.mark.gpu
def test_a_gpu_notes_the_time_itself() -> None:
    layers, batches, spans = cases.model(1), cases.inputs([2]), list[Span]()
    part = cases.Part(layers[0].cuda(), [batch.cuda() for batch in batches], first=True, last=True)
    schedule = parse("0F0,0I0,0W0", "one stage")
    execute(schedule, {0: part}, Links((0,), 0, torch.device("cuda"), {}), spans)
    assert [span.op for span in spans] == list(schedule.ranks[0])
    moments = [moment for span in spans for moment in (span.start, span.end)]
    assert moments == sorted(moments)
    assert 0 <= moments[0] < moments[-1]


def test_an_output_that_was_not_announced_is_named(two_ranks: Ranks) -> None:
    said, _ = two_ranks("pipeline_cases:misshapen", parse("0F0,0B0\n1F0,1B0", "plain"))
    assert said == "0F0 gave (7, torch.float32), though the border is (2, 3, torch.float64)"


@pytest.mark.parametrize("name", ["h1", "v"])
@pytest.mark.parametrize(
    ("fault", "end"),
    [("raise", Ended(1, None, "ValueError: a stage's own mistake")), ("die", Ended(-signal.SIGKILL, None, "ended"))],
)
def test_a_lost_rank_ends_all(name: str, fault: str, end: Ended) -> None:
    schedule, lost = make(name, 3, 4), 1
    ends = run((schedule, fault, lost, 60.0), 3, do="pipeline_cases:broken")
    assert (ends[lost].code, ends[lost].error[: len(end.error)]) == (end.code, end.error)
    for other in ends[:lost] + ends[lost + 1 :]:
        assert other.code == 1
        assert "gloo/transport" in other.error
        assert "Timed out" not in other.error


def test_a_rank_that_hangs_is_waited_for_no_longer_than_said(capsys: pytest.CaptureFixture[str]) -> None:
    ends = run((make("1f1b", 2, 2), "hang", 1, 2.5), 2, do="pipeline_cases:broken")
    assert "Timed out waiting 2500ms" in ends[0].error
    assert ends[1].code == 1
    report(RuntimeError(ends[0].error), "0")
    assert capsys.readouterr().err == "ebbtide: rank 0: waited too long for another rank\n"
