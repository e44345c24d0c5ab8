"""Cuts that are written for Megatron-Core read back as they were, by its documented grammar."""

import re
from functools import partial
from random import Random

from dualpipe.api import build
from dualpipe.export import megatron_flags, megatron_layout
from dualpipe.ir import Schedule, ScheduleError
from tests.refusals import assert_refused

LAYOUT = "pipeline-model-parallel-layout"


def built(kind: str, ranks: int, micro_batches: int, chunks: int | None = None, slices: int = 1) -> Schedule:
    return build(kind, ranks=ranks, micro_batches=micro_batches, chunks=chunks, slices=slices).schedule


def read_layout(text: str) -> list[str]:
    """Returns the letters of each stage: first `(x)*n` repeats, then `x*n`, then stages end at bars."""
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda found: found[1] * int(found[2]), text)
    return text.split("|")


def test_layout_reads_back_as_the_cut() -> None:
    assert megatron_layout([3, *[2] * 29, 0, 0], 0) == "Ettt|(tt|)*29|L"
    random = Random(1)
    for _ in range(300):
        layers = [random.choice((0, 1, 2, 3, 4, 5, 12, 4)) for _ in range(random.randint(1, 9))]
        layers = [number for number in layers for _ in range(random.choice((1, 1, 3)))]
        depth = random.randint(0, 2)
        expected = ["t" * number for number in layers]
        expected[0] = "E" + expected[0]
        expected[-1] += "m" * depth + "L"
        assert read_layout(megatron_layout(layers, depth)) == expected


def test_flags_of_a_schedule_and_what_megatron_cannot_run() -> None:
    interleaved = built("interleaved_1f1b", 2, 4, 2)
    assert [*megatron_flags(interleaved).items()] == [
        ("pipeline-model-parallel-size", 2),
        ("num-virtual-stages-per-pipeline-rank", 2),
    ]
    assert megatron_flags(built("1f1b", 3, 4), "x") == {"pipeline-model-parallel-size": 3, LAYOUT: "x"}
    for schedule, parts in (
        (built("dualpipe", 2, 4), ["schedule", "is dualpipe", "1f1b or interleaved_1f1b or megatron_1f1b"]),
        (built("zb_v", 2, 4), ["schedule", "is zb_v"]),
        (built("zb1p", 2, 4), ["schedule", "is zb1p"]),
        (built("1f1b", 2, 4, slices=2), ["schedule", "whole sequences"]),
        (built("interleaved_1f1b", 2, 5, 2), ["schedule", "multiple of the 2 ranks", "are 5", "nearest: 6"]),
        (built("interleaved_1f1b", 2, 4, 1), ["schedule.chunks", "2 and 1", "schedule=1f1b"]),
    ):
        assert_refused(ScheduleError, parts, partial(megatron_flags, schedule))
