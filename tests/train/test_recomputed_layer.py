"""Runs that recompute layers have the same bits as runs that keep them, and send each row once more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.config import ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.row_format import RowFormat, RowPart
from dualpipe.build import build
from dualpipe.registry import SCHEDULES, candidates
from kernels.quantize.layout import packed_bytes
from model.config import LAYER
from tests.dualpipe.random_schedules import bidirectional, offloaded, random_schedule
from tests.ranks import run_ranks
from tests.tiny import BATCH, OPTIM, write_text
from tests.train.job import Job, run_jobs
from tests.train.test_equality import assert_same, in_sequence, layout_config, scheduled
from tests.train.test_exchange import _count_one_step as count_one_step
from tests.train.test_fp8 import SHAPE, make_config
from train.config import PrecisionConfig, TrainConfig

TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=2, node_cap="clip", chunks=2, partial_sums="rows"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recomputed")
    write_text(folder)
    return folder


def recomputed(job: Job) -> Job:
    """Returns the same job with recomputed layers."""
    return replace(job, config=replace(job.config, recompute=(LAYER,)))


def check_bits(num_ranks: int, jobs: list[Job], steps: int = 2) -> None:
    """Compares losses, gradients, weights and router biases of every step with and without recomputed layers."""
    results = run_ranks(num_ranks, run_jobs, [*jobs, *map(recomputed, jobs)], steps)
    for rank in results:
        for kept, again in zip(rank[: len(jobs)], rank[len(jobs) :], strict=True):
            assert_same(kept, again)


def masked(config: TrainConfig) -> TrainConfig:
    """Documents do not see each other."""
    return replace(config, batch=replace(config.batch, document_mask=True, sequence_length_tokens=40))


def test_recomputed_layers_change_no_bit_over_exchanges(folder: Path) -> None:
    """Two ranks share the experts: in one hop, in FP8, and over two nodes with choices that are clipped."""
    plain = layout_config(folder, 1, 2, 2)
    nodes = replace(plain, cluster=replace(plain.cluster, ranks_per_node=1), dispatch=replace(TWO_HOP, max_nodes=1))
    bf16 = replace(masked(nodes), precision=PrecisionConfig(kind="bf16"), optim=replace(OPTIM, sharding="zero1"))
    bf16 = replace(bf16, dispatch=replace(TWO_HOP, payload="fp8"))
    fp8 = make_config(folder, 1, 2, batch=replace(BATCH, global_sequences=4))
    check_bits(
        2, [Job(config=plain, starved=4), Job(config=nodes), Job(config=bf16), Job(config=fp8, starved=1)], steps=1
    )


def test_recomputed_layers_change_no_bit_in_a_pipeline(folder: Path) -> None:
    """Both directions with MTP, I and W apart, activations offloaded, documents masked, members in sequence."""
    schedule = random_schedule(bidirectional(2), 4, 0, split_share=0.5)
    job = scheduled(folder, schedule)
    job = replace(job, config=masked(job.config))
    away = replace(job, schedule=offloaded(schedule, 0, share=1.0))
    wide = replace(away, config=replace(away.config, model=replace(away.config.model, hidden_size=128)))
    check_bits(2, [job, wide, replace(job, config=in_sequence(job.config))])


@pytest.mark.long
def test_recomputed_layers_change_no_bit_of_ranks_that_share_sequences(folder: Path) -> None:
    """The balance loss is summed over the context group again, so that all its ranks make the same calls."""
    config = layout_config(folder, 1, 2, 2)
    batch = replace(config.batch, global_sequences=4, sequence_length_tokens=48)
    mesh = ParallelismConfig(pipeline=1, data=1, context=2, expert=2)
    shared = replace(config, parallelism=mesh, batch=batch)
    check_bits(2, [Job(config=shared, starved=1), Job(config=masked(shared), starved=1)], steps=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", candidates())
def test_recomputed_layers_change_no_bit_under_a_schedule(folder: Path, kind: str) -> None:
    sizes = (number for number in range(3, 9) if SCHEDULES.get(kind).limit(2, number) is None)
    check_bits(2, [scheduled(folder, build(kind, 2, next(sizes)))], steps=1)


def count_each(rank: int, world_size: int, configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Returns the traffic of a step of each run, by layer."""
    return [count_one_step(rank, world_size, config)[0]["exchange"] for config in configs]


def test_rows_of_recomputed_layers_are_sent_once_more_without_weights(folder: Path) -> None:
    """Bytes as the plan predicts them and as they were counted, in FP8 and in bf16."""
    hidden = 256
    model = replace(SHAPE, num_layers=2, hidden_size=hidden)
    batch = replace(BATCH, global_sequences=2, sequence_length_tokens=12)
    fp8 = make_config(folder, 1, 2, model=model, batch=batch)
    fp8 = replace(fp8, cluster=replace(fp8.cluster, ranks_per_node=1))
    bf16 = replace(fp8, precision=PrecisionConfig(kind="bf16"))
    configs = [replace(each, recompute=kinds) for each in (fp8, bf16) for kinds in (fp8.recompute, (LAYER,))]
    kept_fp8, again_fp8, kept_bf16, again_bf16 = run_ranks(2, count_each, configs)[0]
    packed, plain = RowPart(packed_bytes(hidden), torch.uint8), RowPart(hidden, torch.bfloat16)
    for kept, again, sent in ((kept_fp8, again_fp8, packed), (kept_bf16, again_bf16, plain)):
        assert set(kept) == set(again) == {"layer_1", "layer_2"}
        for layer, before in kept.items():
            more, (rows, left) = again[layer], divmod(before["rows_across_nodes"], 4)
            assert (rows > 0, left) == (True, 0)
            assert more["rows_across_nodes"] == 5 * rows
            extra = rows * RowFormat.of_parts(sent).bytes_per_row
            assert more["bytes_across_nodes"] == before["bytes_across_nodes"] + extra
            assert more["bytes_across_nodes"] == more["predicted_bytes_across_nodes"]
