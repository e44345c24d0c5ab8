"""The probe: times that all ranks agree on, stages that add them up, and a run that does not notice it."""

import gc
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.layout import Layout
from dualpipe.costs import StageCosts
from dualpipe.registry import ScheduleConfig
from model.config import cut_layers
from model.transformer import named_tensors
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader
from train.config import TrainConfig
from train.core.step import train_step
from train.predict.layer_times import LayerTimes, PartTimes, stage_costs
from train.start.probe import _partners, measure

FOUR_RANKS = ParallelismConfig(pipeline=2, data=2, expert=2)


PARTS = ("forward", "backward_input", "backward_weight", "forward_exchange", "backward_exchange")


def part(unit: float) -> PartTimes:
    """Times whose sums identify the parts that they contain."""
    return PartTimes(**{name: factor * unit for factor, name in enumerate(PARTS, 1)})


TIMES = LayerTimes(
    dense=part(1), moe=part(10), embedding=part(100), head=part(1000), mtp=part(10000), latency_seconds=0.5
)


def config_of(folder: Path, pipeline: int, num_layers: int, pairing: str = "overlapped") -> TrainConfig:
    model = replace(MODEL, num_layers=num_layers, num_dense_layers=2, mtp_depth=1)
    return tiny_config(
        folder,
        model=model,
        parallelism=ParallelismConfig(pipeline=pipeline, data=1, expert=1),
        schedule=ScheduleConfig(kind="auto", chunks=None, pairing=pairing),  # type: ignore[arg-type]
    )


def stage(unit: float, activation: float) -> StageCosts:
    return StageCosts(**asdict(part(unit)), activation=activation)


def test_stage_costs_are_those_of_its_layers_and_ends(tmp_path: Path) -> None:
    # Of seven layers the last, with the MTP module, stands for two: two stages of four.
    costs = stage_costs(TIMES, config_of(tmp_path, pipeline=2, num_layers=7), cut_layers(7, 2, 1))
    assert costs.stages == (stage(1 + 1 + 10 + 10 + 100, 1.0), stage(30 + 1000 + 10000, 1.0))
    assert costs.latency == 0.5


def test_stage_keeps_its_share_of_layers_in_units_of_model_over_ranks(tmp_path: Path) -> None:
    config = config_of(tmp_path, pipeline=2, num_layers=7)
    four = stage_costs(TIMES, config, cut_layers(7, 4, 1)).stages
    assert [stage.activation for stage in four] == [0.5] * 4
    uneven = stage_costs(TIMES, config_of(tmp_path, pipeline=2, num_layers=6), cut_layers(6, 2, 1))
    assert [stage.activation for stage in uneven.stages] == pytest.approx([2 * 4 / 7, 2 * 3 / 7])


def test_copies_to_host_memory_take_the_configured_multiple_of_measured_computation(tmp_path: Path) -> None:
    config = config_of(tmp_path, pipeline=2, num_layers=7)
    cut = cut_layers(7, 2, 1)
    assert not stage_costs(TIMES, config, cut).can_offload
    costs = replace(config.costs, forward=1, backward_input=2, backward_weight=3, offload=0.5)
    stages = stage_costs(TIMES, replace(config, costs=costs), cut).stages
    # All computation is a multiple of (1, 2, 3), so a copy takes half of the mean forward.
    forward = sum(each.forward for each in stages) / 2
    assert [each.offload for each in stages] == pytest.approx([0.5 * forward, 0.5 * forward])


def test_exchange_that_nothing_hides_counts_as_computation(tmp_path: Path) -> None:
    config = config_of(tmp_path, pipeline=2, num_layers=7, pairing="sequential")
    sequential = stage_costs(TIMES, config, cut_layers(7, 2, 1)).stages[1]
    assert (sequential.forward, sequential.backward_input, sequential.backward_weight) == (55150, 77210, 33090)
    assert (sequential.forward_exchange, sequential.backward_exchange) == (0, 0)


def _layout(config: TrainConfig) -> Layout:
    return Layout(config.parallelism, config.cluster.ranks_per_node)


def _measure_each(rank: int, world_size: int, configs: list[TrainConfig]) -> list[tuple[LayerTimes, int, int]]:
    """The times, and what of it is left: parameters, and groups."""
    seen = []
    for config in configs:
        gc.collect()
        before, groups = _num_parameters(), len(dist.distributed_c10d._world.pg_map)
        times = measure(config, _layout(config), torch.device("cpu"))
        left = _num_parameters() - before, len(dist.distributed_c10d._world.pg_map) - groups
        seen.append((times, *left))
    return seen


def _num_parameters() -> int:
    return sum(type(thing) is nn.Parameter for thing in gc.get_objects())


@pytest.mark.slow
def test_probe_returns_equal_positive_times_on_all_ranks_and_changes_nothing(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, parallelism=FOUR_RANKS)
    all_moe = replace(config, model=replace(MODEL, num_dense_layers=0, mtp_depth=0))
    all_dense = replace(config, model=replace(MODEL, num_dense_layers=4, mtp_depth=0))
    ranks = run_ranks(4, _measure_each, [config, all_moe, all_dense])
    for seen in zip(*ranks, strict=True):
        assert {rank: times for rank, (times, _, _) in enumerate(seen) if repr(times) != repr(seen[0][0])} == {}
        assert [left for _, *left in seen] == [[0, 0]] * 4
    both, moe, dense = (times for times, _, _ in ranks[0])
    assert min(asdict(both.moe).values()) > 0
    assert min(both.head.forward, both.head.backward_input, both.head.backward_weight) > 0
    assert both.head.forward_exchange == both.head.backward_exchange == 0
    assert min(asdict(both.mtp).values()) > 0
    assert both.latency_seconds > 0
    for times in (both, dense):
        assert min(times.dense.forward, times.dense.backward_input, times.dense.backward_weight) > 0
        assert times.dense.forward_exchange == times.dense.backward_exchange == 0
    assert min(asdict(moe.moe).values()) > 0
    assert moe.mtp == dense.mtp == PartTimes()
    assert moe.dense == dense.moe == PartTimes()


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_probe_measures_every_link_of_the_pipeline_once(num_ranks: int) -> None:
    """The ring's links, each with one sender. A round trip needs both ranks, so the order must not deadlock."""
    left = [list(_partners(rank, num_ranks)) for rank in range(num_ranks)]
    done: list[tuple[int, int]] = []
    while ready := [
        (rank, other)
        for rank, partners in enumerate(left)
        for other, sends_first in partners[:1]
        if sends_first and left[other][:1] == [(rank, False)]
    ]:
        for sender, receiver in ready:
            del left[sender][0], left[receiver][0]
        done += ready
    assert not any(left)
    ring = {(rank, (rank + 1) % num_ranks) for rank in range(num_ranks)}
    assert sorted(map(sorted, done)) == sorted(
        map(list, {(min(pair), max(pair)) for pair in ring if len(set(pair)) > 1})
    )


def test_probe_of_one_rank_has_no_latency(tmp_path: Path) -> None:
    ((seen,),) = run_ranks(1, _measure_each, [tiny_config(tmp_path)])
    assert seen[0].latency_seconds == 0
    assert seen[0].embedding.forward > 0


def _train(
    rank: int, world_size: int, config: TrainConfig, probed: bool
) -> tuple[list[float], dict[str, Tensor], Tensor]:
    torch.manual_seed(11)
    if probed:
        measure(config, _layout(config), torch.device("cpu"))
    learner, loader = open_job(config), open_loader(config)
    results = [train_step(learner, config.task, loader, step) for step in range(2)]
    dist.barrier()
    close_job(learner)
    numbers = [
        number
        for result in results
        for number in (result.losses.total, result.grad_norm, max(result.balance.violations))
    ]
    weights = {name: tensor.clone() for name, tensor in named_tensors(learner.replica.model).items()}
    return numbers, weights, torch.get_rng_state()


@pytest.mark.slow
def test_probed_run_equals_another_bitwise(tmp_path: Path) -> None:
    write_text(tmp_path)
    mesh = ParallelismConfig(pipeline=2, data=1, expert=1)
    schedule = ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped")
    config = tiny_config(tmp_path, parallelism=mesh, schedule=schedule, batch=replace(BATCH, global_sequences=4))
    plain, probed = (run_ranks(2, _train, config, probed) for probed in (False, True))
    for rank, (ours, theirs) in enumerate(zip(probed, plain, strict=True)):
        (numbers, weights, state), (expected, expected_weights, expected_state) = ours, theirs
        assert numbers == expected, f"rank {rank}"
        assert weights.keys() == expected_weights.keys(), f"rank {rank}"
        for name, weight in weights.items():
            largest = (weight - expected_weights[name]).abs().max().item()
            assert torch.equal(weight, expected_weights[name]), f"rank {rank}: {name} differs by up to {largest}"
        assert torch.equal(state, expected_state), f"rank {rank}"
