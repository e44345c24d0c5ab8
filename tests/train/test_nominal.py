"""Peaks of long runs are those of the few micro-batches by which memory is predicted."""

from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import ParallelismConfig
from dualpipe.build import build
from dualpipe.ir import Op, Schedule
from dualpipe.registry import FALLBACK, SCHEDULES
from tests.tiny import tiny_config
from train.config import TrainConfig
from train.schedule.nominal import few_micro_batches, nominal_costs, planning_schedule

PENDING_WEIGHTS = (1.2, 1.8)


def make_config(folder: Path, kind: str, pipeline: int, micro_batches: int, expert: int = 2) -> TrainConfig:
    config = tiny_config(folder, parallelism=ParallelismConfig(pipeline=pipeline, data=2, expert=expert))
    batch = replace(config.batch, global_sequences=2 * micro_batches)
    model = replace(config.model, num_layers=4 * pipeline)
    return replace(config, model=model, batch=batch, schedule=replace(config.schedule, kind=kind, pairing="overlapped"))


def peaks(schedule: Schedule, pending: float) -> tuple[float, ...]:
    """Returns the memory peak of each rank, if a tensor kept for W weighs `pending` times one kept for I."""
    found = []
    for groups in schedule.ranks:
        alive = peak = 0.0
        for group in groups:
            alive += sum(op.kind is Op.FORWARD for op in group)
            peak = max(peak, alive)
            for op in group:
                alive += {
                    Op.FORWARD: 0.0,
                    Op.BACKWARD: -1.0,
                    Op.BACKWARD_INPUT: pending - 1,
                    Op.BACKWARD_WEIGHT: -pending,
                }[op.kind]
            peak = max(peak, alive)
        found.append(round(peak, 6))
    return tuple(found)


@pytest.mark.parametrize("kind", SCHEDULES.names())
@pytest.mark.parametrize("pipeline", [2, 4])
def test_few_micro_batches_show_the_peak_of_many(tmp_path: Path, kind: str, pipeline: int) -> None:
    many = 10 * pipeline
    config = make_config(tmp_path, kind, pipeline, many)
    planned = planning_schedule(config, many)
    costs = nominal_costs(config, kind)
    whole = build(kind, pipeline, many, costs)
    assert whole.num_micro_batches == many
    spec = SCHEDULES.get(kind)
    is_whole = spec.grows or (spec.takes_costs and kind != FALLBACK)
    assert (planned.num_micro_batches == many) == is_whole, f"{kind}: does its peak grow?"
    for pending in PENDING_WEIGHTS:
        assert max(peaks(planned, pending)) == pytest.approx(max(peaks(whole, pending)))


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 4), (4, 8), (4, 18), (6, 12), (8, 16)])
def test_dualpipe_split_with_exchange_keeps_the_activations_of_the_published_order(
    tmp_path: Path, pipeline: int, micro_batches: int
) -> None:
    config = make_config(tmp_path, "dualpipe_split", pipeline, micro_batches)
    whole = build("dualpipe_split", pipeline, micro_batches, nominal_costs(config, "dualpipe_split"))
    for pending in PENDING_WEIGHTS:
        assert max(peaks(planning_schedule(config, micro_batches), pending)) == max(peaks(whole, pending))


def test_other_costs_are_planned_without_the_shortcut(tmp_path: Path) -> None:
    """Without exchange, W fills gaps and many are deferred, so the published order would predict too little."""
    config = make_config(tmp_path, "dualpipe_split", 4, 8, expert=1)
    whole = build("dualpipe_split", 4, 8, nominal_costs(config, "dualpipe_split"))
    planned = planning_schedule(config, 8)
    assert peaks(planned, 1.5) == peaks(whole, 1.5)
    assert max(peaks(planned, 1.5)) > max(peaks(planning_schedule(make_config(tmp_path, "dualpipe", 4, 8), 8), 1.5))


def test_few_micro_batches_are_odd_if_the_run_has_an_odd_number() -> None:
    assert [few_micro_batches(4, number) for number in (3, 16, 17, 1000, 1001)] == [3, 16, 17, 16, 17]
