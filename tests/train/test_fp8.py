"""Training in FP8 and with recomputed layers over gloo ranks: one result under every order, exchange and layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.config import DispatchConfig, LocalDispatchConfig, ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.process_group import RowFormat, RowPart
from dualpipe.builder import build_schedule
from dualpipe.registry import SCHEDULES, ScheduleConfig, candidates
from model.config import LAYER
from tests.dualpipe.random_schedules import bidirectional, offloaded, random_schedule
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, OPTIM, tiny_config
from tests.train.job import Job, run_jobs
from tests.train.test_equality import assert_same, in_sequence, layout_config, scheduled
from tests.train.test_exchange import _count_one_step as count_one_step
from tests.train.test_optim import assert_equal, go_on
from train.checkpoint.locate import check_compatible
from train.checkpoint.manifest import CheckpointError
from train.config import Fp8PrecisionConfig, PrecisionConfig, TrainConfig
from verify.steps import StepValues, relative_error

SHAPE = replace(
    MODEL,
    num_layers=2,
    hidden_size=64,
    dense_intermediate_size=160,
    q_lora_rank=48,
    kv_lora_rank=32,
    expert_intermediate_size=40,
)

# A node's rows are summed in float32, not in their own type, so that rounding does not depend on the dispatcher.
TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=4, node_cap="verify", chunks=2, partial_sums="float32"
)


def make_config(folder: Path, pipeline: int, data: int, **changes: Any) -> TrainConfig:
    """Returns the recipe's configuration: bf16 weights and moments, float32 masters, experts over all data ranks."""
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
        precision=Fp8PrecisionConfig(kind="fp8", scales="float32"),
        optim=replace(OPTIM, sharding="zero1", moments="bf16"),
        batch=replace(BATCH, global_sequences=4 * data),
        model=SHAPE,
    )
    return replace(config, **changes)


def masked(config: TrainConfig) -> TrainConfig:
    """Documents do not see each other; scales are powers of two."""
    batch = replace(config.batch, document_mask=True, sequence_length_tokens=40)
    return replace(config, batch=batch, precision=Fp8PrecisionConfig(kind="fp8", scales="power_of_two"))


def is_expert(name: str) -> bool:
    return ".experts." in name


def total(ranks: list[StepValues], name: str) -> torch.Tensor:
    return torch.stack([seen.gradients[name] for seen in ranks if name in seen.gradients]).sum(0)


@pytest.mark.slow
def test_pipeline_with_experts_over_data_ranks_gives_the_same_bits_in_every_order(folder: Path) -> None:
    config = make_config(folder, 2, 2)
    # payload=fp8 changes nothing, because the rows are already FP8.
    asked = replace(config, dispatch=replace(config.dispatch, payload="fp8"))
    runs = [config, masked(config), in_sequence(masked(asked))]
    results = run_ranks(4, run_jobs, [Job(config=run, starved=1) for run in runs], 1)
    for rank in results:
        assert_same(rank[1], rank[2])
    alone = make_config(folder, 1, 1, batch=config.batch)
    plain = run_ranks(1, run_jobs, [Job(config=alone, starved=1)], 1)[0][0][0]
    for rank in results:
        assert rank[0][0].losses == plain.losses
    for name, expected in plain.gradients.items():
        # A step's gradients are summed in float32, in another order. And an expert sees the rows of both data ranks at
        # once: other rows then share a tile, and its scale, in its weights' gradients.
        most = 0.05 if is_expert(name) else 1e-6
        error = (total([rank[0][0] for rank in results], name) - expected).norm()
        assert float(error) <= most * float(expected.norm()), name


@pytest.mark.slow
def test_two_directions_equal_one_rank(folder: Path) -> None:
    """The first loss to the bit, as micro-batches are the same; gradients but for the order of their sums.

    The same with slices, of equal micro-batches on both sides, in which earlier latents come from FP8 rows.
    """
    whole = [make_config(folder, pipeline, 1) for pipeline in (2, 1)]
    sliced = [
        replace(config, schedule=replace(config.schedule, kind=kind, slices=2, link_depth=2))
        for config, kind in zip(whole, ("dualpipe_split", "1f1b"), strict=True)
    ]
    on_two, on_one = ([Job(config=config, starved=1) for config in pair] for pair in zip(whole, sliced, strict=True))
    both, plain = run_ranks(2, run_jobs, on_two, 1), run_ranks(1, run_jobs, on_one, 1)[0]
    for index, (expected,) in enumerate(plain):
        for rank in both:
            assert rank[index][0].losses == expected.losses
            assert rank[index][0].norm == pytest.approx(expected.norm, rel=1e-6)
        for name, gradient in expected.gradients.items():
            assert relative_error(total([rank[index][0] for rank in both], name), gradient) <= 1e-6, name


@pytest.mark.slow
def test_one_rank_gives_the_same_bits_over_every_exchange(folder: Path) -> None:
    config = make_config(folder, 1, 1, batch=replace(BATCH, global_sequences=2))
    others: list[DispatchConfig] = [
        LocalDispatchConfig(kind="local", payload="full"),
        LocalDispatchConfig(kind="local", payload="fp8"),
        TWO_HOP,
    ]
    jobs = [Job(config=config, starved=1), *(Job(config=replace(config, dispatch=each), starved=1) for each in others)]
    ((first, *rest),) = run_ranks(1, run_jobs, jobs, 1)
    for seen in rest:
        assert_same(first, seen)


def nodes_of_one(config: TrainConfig) -> TrainConfig:
    return replace(config, cluster=replace(config.cluster, ranks_per_node=1))


@pytest.mark.slow
def test_two_ranks_give_the_same_bits_in_one_hop_and_in_two(folder: Path) -> None:
    config = make_config(folder, 1, 2, batch=replace(BATCH, global_sequences=4))
    jobs = [config, nodes_of_one(config), nodes_of_one(replace(config, dispatch=TWO_HOP))]
    for one_hop, over_nodes, two_hops in run_ranks(2, run_jobs, [Job(config=job, starved=4) for job in jobs], 1):
        assert_same(one_hop, over_nodes)
        assert_same(one_hop, two_hops)


@pytest.mark.slow
def test_copies_of_experts_change_no_bit_but_in_their_weight_gradients(folder: Path) -> None:
    """Scales of rows differ where the rows of one expert are on two ranks. Recomputed layers change no bit."""
    config = make_config(folder, 1, 2, batch=replace(BATCH, global_sequences=4))
    balanced = Job(config=replace(config, dispatch=replace(TWO_HOP, balance="node")))
    jobs = [Job(config=replace(config, dispatch=TWO_HOP)), balanced, recomputed(balanced)]
    num_changed = 0
    for (plain,), (copied,), (again,) in run_ranks(2, run_jobs, jobs, 1):
        assert_same([copied], [again])
        assert copied.losses == plain.losses
        for name, gradient in plain.gradients.items():
            if torch.equal(gradient, copied.gradients[name]):
                continue
            assert is_expert(name)
            assert relative_error(copied.gradients[name], gradient) < 0.03, name
            num_changed += 1
    assert num_changed > 0


def count_each(rank: int, world_size: int, configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Returns the traffic of a step of each run, by layer."""
    return [count_one_step(rank, world_size, config)[0]["exchange"] for config in configs]


@pytest.mark.slow
def test_rows_are_dispatched_in_fp8_combined_in_bf16_and_sent_once_more_if_recomputed(folder: Path) -> None:
    """Bytes as the run's own account has them, predicted and counted, in FP8 and in bf16."""
    hidden = 256
    batch = replace(BATCH, global_sequences=2, sequence_length_tokens=12)
    fp8 = nodes_of_one(make_config(folder, 1, 2, model=replace(SHAPE, hidden_size=hidden), batch=batch))
    bf16 = replace(fp8, precision=PrecisionConfig(kind="bf16"))
    configs = [replace(config, recompute=kinds) for config in (fp8, bf16) for kinds in (fp8.recompute, (LAYER,))]
    stored_fp8, again_fp8, stored_bf16, again_bf16 = run_ranks(2, count_each, configs)[0]
    weight, plain = RowPart(1, torch.float32), RowPart(hidden, torch.bfloat16)
    packed = RowPart(hidden + 4 * 2, torch.uint8)  # codes and a float32 scale for every 128
    for stored, again, sent in ((stored_fp8, again_fp8, packed), (stored_bf16, again_bf16, plain)):
        assert set(stored) == set(again) == {"layer_1", "layer_2"}
        # Out and back, forward and backward; a row's weight goes out with it, and the weight's gradient back.
        forms = [(sent, weight), (plain,), (plain, weight), (sent,)]
        bytes_per_row = sum(RowFormat.of_parts(*parts).bytes_per_row for parts in forms)
        for layer, before in stored.items():
            more, (rows, left) = again[layer], divmod(before["rows_across_nodes"], len(forms))
            assert (rows > 0, left) == (True, 0)
            assert before["bytes_across_nodes"] == before["predicted_bytes_across_nodes"] == rows * bytes_per_row
            assert more["rows_across_nodes"] == 5 * rows
            extra = rows * RowFormat.of_parts(sent).bytes_per_row
            assert more["bytes_across_nodes"] == before["bytes_across_nodes"] + extra
            assert more["bytes_across_nodes"] == more["predicted_bytes_across_nodes"]


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_bitwise_and_bf16_cannot_resume_it(folder: Path) -> None:
    batch = replace(BATCH, global_sequences=2)
    config = make_config(folder, 1, 2, out_dir=str(folder / "resumed"), batch=batch)
    results = run_ranks(2, go_on, config, [config.optim])
    for uninterrupted, resumed in results:
        assert resumed["loss"] == uninterrupted["loss"]
        assert_equal(resumed["later"], uninterrupted["later"])
        assert {value.dtype for name, value in resumed["loaded"].items() if "exp_avg" in name} == {torch.bfloat16}
    written = results[0][0]["folder"]
    later = replace(config, task=replace(config.task, steps=3))
    check_compatible(written, later)
    with pytest.raises(CheckpointError, match=r"precision\.kind is fp8 there and bf16 here"):
        check_compatible(written, replace(later, precision=PrecisionConfig(kind="bf16")))


RECOMPUTED_TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="fp8", max_nodes=1, node_cap="clip", chunks=2, partial_sums="rows"
)


def recomputed(job: Job) -> Job:
    return replace(job, config=replace(job.config, recompute=(LAYER,)))


def check_bits(num_ranks: int, jobs: list[Job]) -> None:
    """Compares losses, gradients, weights and router biases of a step with and without recomputed layers."""
    results = run_ranks(num_ranks, run_jobs, [*jobs, *map(recomputed, jobs)], 1)
    for rank in results:
        for kept, again in zip(rank[: len(jobs)], rank[len(jobs) :], strict=True):
            assert_same(kept, again)


def masked_recomputed(config: TrainConfig) -> TrainConfig:
    """Documents do not see each other."""
    return replace(config, batch=replace(config.batch, document_mask=True, sequence_length_tokens=40))


@pytest.mark.slow
def test_recomputed_layers_change_no_bit_over_exchanges(folder: Path) -> None:
    """Two ranks share the experts: in one hop, in FP8, and over two nodes with choices that are clipped."""
    plain = layout_config(folder, 1, 2, 2)
    bf16 = replace(
        nodes_of_one(masked_recomputed(plain)),
        precision=PrecisionConfig(kind="bf16"),
        optim=replace(OPTIM, sharding="zero1"),
        dispatch=RECOMPUTED_TWO_HOP,
    )
    fp8 = make_config(folder, 1, 2, batch=replace(BATCH, global_sequences=4))
    check_bits(2, [Job(config=plain, starved=4), Job(config=bf16), Job(config=fp8, starved=1)])


@pytest.mark.slow
def test_recomputed_layers_change_no_bit_in_a_pipeline(folder: Path) -> None:
    """Both directions with MTP, I and W apart, activations offloaded, documents masked, members in sequence."""
    schedule = random_schedule(bidirectional(2), 4, 0, split_share=0.5)
    job = scheduled(folder, schedule)
    job = replace(job, config=masked_recomputed(job.config))
    away = replace(job, schedule=offloaded(schedule, 0, share=1.0))
    wide = replace(away, config=replace(away.config, model=replace(away.config.model, hidden_size=128)))
    check_bits(2, [wide, replace(job, config=in_sequence(job.config))])


@pytest.mark.long
def test_recomputed_layers_change_no_bit_of_ranks_that_share_sequences(folder: Path) -> None:
    """The balance loss is summed over the context group again, so that all its ranks make the same calls."""
    config = layout_config(folder, 1, 2, 2)
    batch = replace(config.batch, global_sequences=4, sequence_length_tokens=48)
    mesh = ParallelismConfig(pipeline=1, data=1, context=2, expert=2)
    shared = replace(config, parallelism=mesh, batch=batch)
    check_bits(2, [Job(config=shared, starved=1), Job(config=masked_recomputed(shared), starved=1)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", candidates())
def test_recomputed_layers_change_no_bit_under_a_schedule(folder: Path, kind: str) -> None:
    sizes = (number for number in range(3, 9) if SCHEDULES.get(kind).limit(2, number) is None)
    check_bits(2, [scheduled(folder, build_schedule(kind, 2, next(sizes)))])
