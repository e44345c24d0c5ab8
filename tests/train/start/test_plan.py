"""All ranks follow the schedule that rank 0 decided on, and peaks of long runs are those of short ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import Cut, ParallelismConfig
from comm.layout import Layout
from data.config import BatchRamp
from dualpipe.builder import build_schedule
from dualpipe.ir import Op, Schedule, ScheduleError, from_json, to_json
from dualpipe.registry import SCHEDULES, ScheduleConfig, is_closed_form
from dualpipe.validate import validate, validate_passes
from kernels.gemm import tuned
from kernels.gemm.tuned import TunedProduct
from kernels.launch import Tiling
from kernels.quantize.layout import Quantized
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.tiny import BATCH, tiny_config
from tests.train.job import make_world
from train.checkpoint.manifest import SCHEDULE_NAME, ramp_schedule_name, write_manifest
from train.config import Fp8PrecisionConfig, TrainConfig
from train.core.replica import open_replica
from train.core.world import ReplicaConfig
from train.predict.timing import few_micro_batches, nominal_costs, planning_schedule
from train.start.plan import Plan, plan, tune_kernels


def config_of(folder: Path, kind: str, **changes: Any) -> TrainConfig:
    """Two pipeline ranks."""
    parallelism = ParallelismConfig(pipeline=2, data=1, expert=1)
    schedule = ScheduleConfig(kind=kind, chunks=None, pairing="overlapped")
    return tiny_config(folder, parallelism=parallelism, schedule=schedule, **changes)


def _planned(rank: int, world_size: int, config: TrainConfig) -> tuple[str, str, tuple[range, ...]]:
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    found = plan(config, layout, torch.device("cpu"))
    validate(found.schedule, config.memory_cap)
    return to_json(found.schedule), found.reason, found.cut


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dualpipe_split", "auto"])
def test_plan_is_the_same_on_every_rank(kind: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, _planned, config_of(tmp_path, kind))
    assert first == second
    assert ("the configured one" in first[1]) == (kind != "auto")


def _validations(rank: int, world_size: int, config: TrainConfig) -> tuple[int, int]:
    """Returns how often this rank validates while it plans, and while it compiles what was planned."""
    counted: list[Schedule] = []

    def count(schedule: Schedule, memory_cap: float | None = None) -> None:
        counted.append(schedule)
        validate_passes(schedule, memory_cap)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.start.plan.validate_passes", count)
        patch.setattr("train.core.replica.validate_passes", count)
        planned = plan(config, Layout(config.parallelism, config.cluster.ranks_per_node), torch.device("cpu"))
        in_plan = len(counted)
        world = make_world(config, planned.schedule)
        replica = open_replica(world, ReplicaConfig.of_run(config), planned.schedule, planned.cut, is_proven=True)
        for schedule in planned.ramp.values():
            replica.with_schedule(schedule, is_proven=True)
        proven = len(counted) - in_plan
        replica.with_schedule(planned.schedule)
        assert len(counted) == in_plan + proven + 1, "a schedule without proof was not validated"
        replica.close()
        world.close()
    return in_plan, proven


def test_plan_validates_every_schedule_once_on_rank_0(tmp_path: Path) -> None:
    ramp = BatchRamp(start_sequences=4, end_tokens=10**6, num_sizes=4)
    config = config_of(tmp_path, "dualpipe", batch=replace(BATCH, ramp=ramp))
    assert run_ranks(2, _validations, config) == [(4, 0), (0, 0)]


def _planned_after_a_change(rank: int, world_size: int, config: TrainConfig) -> str:
    """Returns the error of `plan`; rank 1 receives a schedule with another order."""
    broadcast = dist.broadcast_object_list

    def change(sent: list[Any], src: int) -> None:
        broadcast(sent, src=src)
        if rank == 1:
            sent[0] = replace(sent[0], schedule=to_json(build_schedule("dualpipe_split", 2, 3)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "broadcast_object_list", change)
        try:
            _planned(rank, world_size, config)
        except ScheduleError as error:
            return str(error)
    return ""


def test_plan_rejects_a_schedule_that_rank_0_has_not_proven(tmp_path: Path) -> None:
    first, second = run_ranks(2, _planned_after_a_change, config_of(tmp_path, "dualpipe_split"))
    assert first == ""
    assert second == "schedule: rank 1 received another schedule than rank 0 has proven"


def _planned_ramp(rank: int, world_size: int, config: TrainConfig) -> Plan:
    return plan(config, Layout(config.parallelism, config.cluster.ranks_per_node), torch.device("cpu"))


@pytest.mark.slow
def test_plan_under_auto_builds_every_size_of_a_ramp_with_one_placement(tmp_path: Path) -> None:
    """It measures once. A resumed run follows the saved schedules, as other measured times might give others."""
    ramp = BatchRamp(start_sequences=4, end_tokens=10**6, num_sizes=4)
    config = config_of(tmp_path, "auto", batch=replace(BATCH, ramp=ramp))
    first, second = run_ranks(2, _planned_ramp, config)
    assert first == second
    assert [schedule.num_micro_batches for schedule in first.ramp.values()] == [4, 8, 12]
    assert {schedule.placement for schedule in first.ramp.values()} == {first.schedule.placement}
    saved = {
        4: build_schedule("dualpipe_split", 2, 4),
        8: build_schedule("dualpipe", 2, 8),
        12: build_schedule("dualpipe", 2, 12),
    }
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / SCHEDULE_NAME).write_text(to_json(build_schedule("dualpipe", 2, 16)))
    for size, schedule in saved.items():
        (folder / ramp_schedule_name(size)).write_text(to_json(schedule))
    write_manifest(folder, 1, config, "f00d")
    for resumed in run_ranks(2, _planned_ramp, replace(config, resume=str(tmp_path / "run"))):
        assert resumed.ramp == saved


@pytest.mark.slow
def test_plan_under_auto_keeps_the_cap(tmp_path: Path) -> None:
    """2 of model/P rule out the published DualPipe, which keeps 3."""
    (text, reason, _), _ = run_ranks(2, _planned, config_of(tmp_path, "auto", memory_cap=2.0))
    assert from_json(text).kind != "dualpipe"
    assert "of the 2 allowed" in reason


@pytest.mark.slow
def test_plan_reuses_the_schedule_and_the_cut_of_the_checkpoint(tmp_path: Path) -> None:
    """Another order would sum gradients in another order: a resumed run would no longer be bitwise the same."""
    config = config_of(tmp_path, "auto")
    begun = build_schedule("dualpipe", 2, config.num_micro_batches)
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / SCHEDULE_NAME).write_text(to_json(begun))
    write_manifest(folder, 1, config, "f00d", cut=(range(1), range(1, 4)))
    resumed = replace(config, resume=str(tmp_path / "run"))
    for text, reason, cut in run_ranks(2, _planned, resumed):
        assert from_json(text) == begun
        assert cut == (range(1), range(1, 4))
        assert "step-00000001" in reason
    other = replace(resumed, schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"))
    listed = replace(resumed, parallelism=replace(resumed.parallelism, cut=Cut("listed", (2, 2))))
    for _, reason, cut in [*run_ranks(2, _planned, other), *run_ranks(2, _planned, listed)]:
        assert "step-00000001" not in reason
        assert cut != (range(1), range(1, 4))


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


@pytest.mark.slow
@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", SCHEDULES.names())
@pytest.mark.parametrize("pipeline", [2, 4])
def test_few_micro_batches_show_the_peak_of_many(tmp_path: Path, kind: str, pipeline: int) -> None:
    many = 6 * pipeline
    config = make_config(tmp_path, kind, pipeline, many)
    planned = planning_schedule(config, many)
    costs = nominal_costs(config, kind)
    whole = build_schedule(kind, pipeline, many, costs)
    assert whole.num_micro_batches == many
    spec = SCHEDULES.get(kind)
    is_whole = spec.grows or (spec.takes_costs and not (spec.is_fixed or is_closed_form(kind, None, 1)))
    assert (planned.num_micro_batches == many) == is_whole, f"{kind}: does its peak grow?"
    for pending in PENDING_WEIGHTS:
        assert max(peaks(planned, pending)) == pytest.approx(max(peaks(whole, pending)))


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 4), (4, 18), *exhaustive((4, 8), (6, 12), (8, 16))])
def test_dualpipe_split_with_exchange_keeps_the_activations_of_the_published_order(
    tmp_path: Path, pipeline: int, micro_batches: int
) -> None:
    config = make_config(tmp_path, "dualpipe_split", pipeline, micro_batches)
    whole = build_schedule("dualpipe_split", pipeline, micro_batches, nominal_costs(config, "dualpipe_split"))
    for pending in PENDING_WEIGHTS:
        assert max(peaks(planning_schedule(config, micro_batches), pending)) == max(peaks(whole, pending))


def test_other_costs_are_planned_without_the_shortcut(tmp_path: Path) -> None:
    """Without exchange, W fills gaps and many are deferred, so the published order would predict too little."""
    config = make_config(tmp_path, "dualpipe_split", 4, 8, expert=1)
    whole = build_schedule("dualpipe_split", 4, 8, nominal_costs(config, "dualpipe_split"))
    planned = planning_schedule(config, 8)
    assert peaks(planned, 1.5) == peaks(whole, 1.5)
    assert max(peaks(planned, 1.5)) > max(peaks(planning_schedule(make_config(tmp_path, "dualpipe", 4, 8), 8), 1.5))


def test_few_micro_batches_are_odd_if_the_run_has_an_odd_number() -> None:
    assert [few_micro_batches(4, number) for number in (3, 16, 17, 1000, 1001)] == [3, 16, 17, 16, 17]


_TILINGS = (Tiling(rows=64), Tiling(), Tiling(outputs=64))


def _tuned(rank: int, world_size: int, config: TrainConfig) -> tuple[list[int], list[str]]:
    """Tilings that this rank uses for three shapes, the last of which only rank 1 has measured, and its calls."""
    times = [{64: 1.0, 128: 2.0}, {64: 2.0, 128: 1.0}][rank]
    calls: list[str] = []

    def multiply(left: Quantized, shape: int, *, tiling: Tiling) -> Tensor:
        return torch.tensor(tiling.rows)

    product = TunedProduct(
        multiply, lambda left, shape: (torch.bfloat16, 1 + shape), _TILINGS, lambda call: times[int(call())]
    )
    left = Quantized(torch.empty(0), torch.empty(0))

    def probe(*arguments: object) -> None:
        calls.append("probe")
        for shape in range(2 + rank):
            product(left, shape)

    cuda = torch.device("cuda")
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.start.plan.measure", probe)
        patch.setattr(tuned, "PRODUCTS", {"product": product})
        tune_kernels(config, layout, cuda, has_probed=False)  # bf16 has nothing to tune
        tune_kernels(config, layout, torch.device("cpu"), has_probed=False)
        assert calls == []
        fp8 = replace(config, precision=Fp8PrecisionConfig(kind="fp8", scales="float32"))
        tune_kernels(fp8, layout, cuda, has_probed=False)
        tune_kernels(fp8, layout, cuda, has_probed=True)
    return [int(product(left, shape)) for shape in range(3)], calls


def test_tilings_are_measured_before_the_first_step_and_are_those_of_rank_0(tmp_path: Path) -> None:
    first, second = run_ranks(2, _tuned, config_of(tmp_path, "dualpipe_split"))
    assert first[0] == [64, 64, 64]
    assert second[0] == [64, 64, 128]  # rank 0 has no product of the last shape
    assert first[1] == second[1] == ["probe"]
