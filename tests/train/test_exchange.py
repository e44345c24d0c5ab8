"""Training over every way of exchange: the same gradients as one rank, and records of what was sent that add up."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig, Payload, TwoHopDispatchConfig
from comm.dispatch.traffic import LayerTraffic, TrafficSnapshot
from dualpipe.registry import ScheduleConfig
from model.transformer import routers
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config
from tests.train.job import close_job, open_job, open_loader
from tests.train.test_equality import assert_starved_equal_one_rank
from train.config import TrainConfig
from train.core.replica import StepBatch
from train.core.step import accumulate, rates_of, train_step
from train.records.step_record import PipelineTimeline, exchange_metrics, record_of, traffic_parts

TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=4, node_cap="verify", chunks=2, partial_sums="rows"
)


def over_nodes(folder: Path, pipeline: int, expert: int, ranks_per_node: int) -> TrainConfig:
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=expert, expert=expert),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
        dispatch=TWO_HOP,
        batch=replace(BATCH, global_sequences=max(2, 2 * pipeline) * expert),
        model=replace(MODEL, num_layers=3),
    )
    return replace(config, cluster=replace(config.cluster, ranks_per_node=ranks_per_node))


@pytest.mark.parametrize(
    ("pipeline", "expert", "ranks_per_node", "payload", "starved", "balance"),
    [
        pytest.param(1, 4, 2, "fp8", 2, "exact", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, "full", 0, "none", marks=pytest.mark.slow),
        pytest.param(2, 4, 2, "full", 2, "node", marks=pytest.mark.long),
        *exhaustive((2, 4, 1, "full", 2, "none"), (1, 4, 2, "fp8", 0, "none"), (2, 2, 1, "full", 4, "none")),
    ],
)
def test_training_in_two_hops_equals_one_rank(
    folder: Path,
    pipeline: int,
    expert: int,
    ranks_per_node: int,
    payload: Payload,
    starved: int,
    balance: Literal["none", "node", "exact"],
) -> None:
    """Without tokens: no expert, or every expert of a rank. With a balance, ranks hold copies of hot experts."""
    config = over_nodes(folder, pipeline, expert, ranks_per_node)
    config = replace(config, dispatch=replace(TWO_HOP, payload=payload, balance=balance))
    assert_starved_equal_one_rank(config, [starved], repeats=pipeline > 1)


def _count_one_step(rank: int, world_size: int, config: TrainConfig) -> tuple[dict[str, Any], dict[str, str]]:
    learner, loader = open_job(config), open_loader(config)
    rates = rates_of(config.task, config.optim, loader.sizes, 0)
    accumulate(learner, config.task, StepBatch((lambda first, count: loader.batch(0, first, count),)), rates)
    model = config.model
    observers, num_layers = learner.replica.observers, model.num_layers + model.mtp_depth
    parts = [traffic_parts(observers.traffic.take(), observers.clips.take(), num_layers)]
    metrics = exchange_metrics(*learner.world.reduce_parts(parts, "record")[0], num_layers, world_size)
    hashes = learner.world.log.order_hashes()
    dist.barrier()
    close_job(learner)
    return metrics, hashes


@pytest.mark.slow
def test_records_of_a_step_add_up_and_ranks_agree_on_the_order(folder: Path) -> None:
    config = over_nodes(folder, 2, 4, 2)
    results = run_ranks(8, _count_one_step, config)
    metrics = results[0][0]
    assert {rank: other for rank, (other, _) in enumerate(results) if other != metrics} == {}
    layers = metrics["exchange"]
    assert set(layers) == {"layer_1", "layer_2", "layer_3"}  # the first is dense, the last is the MTP module
    for layer in layers.values():
        assert layer["rows_across_nodes"] > 0
        for what in ("rows_within_nodes", "rows_across_nodes", "bytes_within_nodes", "bytes_across_nodes"):
            assert layer[f"predicted_{what}"] == layer[what], what
        assert layer["lower_bound_share"] == 1.0
        assert 1.0 <= layer["nodes_per_token"] <= 2.0
        assert layer["nic_imbalance"] >= 1.0
    batch = config.batch
    hidden_bytes = batch.micro_sequences * batch.sequence_length_tokens * config.model.hidden_size * 8
    messages = metrics["inter_node_bytes"] - sum(layer["bytes_across_nodes"] for layer in layers.values())
    assert messages == 2 * batch.global_sequences * hidden_bytes  # pipeline ranks sit on different nodes
    by_group: dict[str, dict[int, str]] = {}
    for rank, (_, hashes) in enumerate(results):
        for group, digest in hashes.items():
            by_group.setdefault(group, {})[rank] = digest
    assert by_group
    assert {group: digests for group, digests in by_group.items() if len(set(digests.values())) > 1} == {}


def _merge(rank: int, world_size: int) -> dict[str, Any]:
    counted = LayerTraffic(
        num_tokens=10,
        num_touched_nodes=15 + rank,
        min_rows_across_nodes=3,
        num_rows_across_nodes=6,
        num_bytes_across_nodes=60,
        num_bytes_from_nodes=100 * rank,
        predicted_bytes_across_nodes=60,
    )
    layers: dict[int | None, LayerTraffic] = {2: counted} if rank else {1: LayerTraffic(num_tokens=4), 2: counted}
    snapshot = TrafficSnapshot(
        layers=layers,
        num_message_bytes_across_nodes=1000,
        num_message_bytes_within_node=rank,
        num_context_bytes_across_nodes=500,
        num_context_bytes_within_node=7,
    )
    summed, largest = traffic_parts(snapshot, {2: rank}, 4)
    dist.all_reduce(summed)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return exchange_metrics(summed, largest, 4, world_size)


def _record_one_step(rank: int, world_size: int, config: TrainConfig) -> tuple[list[str], list[str], dict[str, Any]]:
    """World collectives of a step and of its record, and what the record says of routers and memory."""
    learner, loader = open_job(config), open_loader(config)
    timeline = PipelineTimeline(learner.world, config.name, Path(config.out_dir))
    calls: list[str] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if group is learner.world.groups.world:
            calls.append(str(op))
        return reduce(tensor, op=op, group=group, async_op=async_op)

    with mock.patch.object(dist, "all_reduce", counted):
        result = train_step(learner, config.task, loader, 0)
        of_step = calls[:]
        record = record_of(learner.replica, timeline, 1, result, None)
    biases = [gate.e_score_correction_bias for gate in routers(learner.replica.model).values()]
    extremes = {"least": min(float(bias.min()) for bias in biases), "most": max(float(bias.max()) for bias in biases)}
    close_job(learner)
    return of_step, calls[len(of_step) :], {**record, **extremes}


@pytest.mark.slow
def test_step_needs_four_world_collectives_and_its_record_one_sum_and_one_maximum(folder: Path) -> None:
    """Targets, losses, norm and loads decide the step; all other numbers are reduced together."""
    config = over_nodes(folder, 2, 2, 2)
    results = run_ranks(4, _record_one_step, config)
    for of_step, of_record, record in results:
        assert of_step == ["RedOpType.SUM"] * 4
        assert of_record == ["RedOpType.SUM", "RedOpType.MAX"]
        assert record["exchange"] == results[0][2]["exchange"]
        assert record["router"] == results[0][2]["router"]
    layers = results[0][2]["router"].values()
    assert min(layer["bias_least"] for layer in layers) == min(record["least"] for _, _, record in results)
    assert max(layer["bias_most"] for layer in layers) == max(record["most"] for _, _, record in results)
    assert all(math.isfinite(layer["bias_std"]) for layer in layers)


@pytest.mark.slow
def test_exchange_metrics_are_sums_and_extremes_over_ranks() -> None:
    first, second, third = run_ranks(3, _merge)
    assert first == second == third
    assert first["inter_node_bytes"] == 3 * 1560
    assert first["intra_node_bytes"] == 0 + 1 + 2 + 3 * 7
    assert first["lower_bound_share"] == 0.5
    assert first["nic_imbalance"] == 2.0  # of 0, 100 and 200
    assert first["clipped_tokens"] == first["exchange"]["layer_2"]["clipped_tokens"] == 0 + 1 + 2
    assert set(first["exchange"]) == {"layer_1", "layer_2"}
    layer = first["exchange"]["layer_2"]
    assert layer["nodes_per_token"] == (15 + 16 + 17) / 30
    assert (layer["rows_across_nodes"], layer["bytes_across_nodes"]) == (18, 180)
    assert (layer["predicted_bytes_across_nodes"], layer["nic_imbalance"]) == (180, 2.0)
    assert first["exchange"]["layer_1"]["nic_imbalance"] == 1.0
