"""Static memory of real ranks, messages of links, and reductions next to the last passes, against the prediction."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.ir import MOST_LINK_DEPTH, Link
from dualpipe.registry import ScheduleConfig
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.program import Action, Lane
from model.attention.mla import LatentAttention
from model.config import Computing
from model.size import HeldParameters
from planner.job_plan import build_ranks
from tests.model.live_memory import make_sizes
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.job import close_job, open_job
from train.checkpoint.parts import HostCopy, state_of
from train.config import Precision, PrecisionConfig, TrainConfig
from train.core.learner import Learner
from train.core.world import weight_dtype
from train.optim.adamw import MOMENTS, Slice, moments_of
from train.predict.memory import predict_memory
from train.predict.rank_bytes import PhaseBytes, RankBytes, ReplicaCounts, RunSizes, update_bytes
from train.predict.timing import planning_schedule

LAYOUTS = (
    (ParallelismConfig(pipeline=1, data=8, expert=1), "1f1b"),
    (ParallelismConfig(pipeline=1, data=8, expert=8), "1f1b"),
    (ParallelismConfig(pipeline=2, data=4, expert=2), "dualpipe"),
    (ParallelismConfig(pipeline=2, data=2, expert=2), "1f1b"),  # MTP modules and the embedding are on different ranks
    (ParallelismConfig(pipeline=4, data=2, expert=2), "dualpipe"),
    (ParallelismConfig(pipeline=4, data=2, expert=1), "zb_v"),
    (ParallelismConfig(pipeline=4, data=1, expert=2, context=2), "dualpipe_split"),
    (ParallelismConfig(pipeline=8, data=1, expert=1), "1f1b"),
)
PADDED_ELEMENTS = 2
"""DeepSpeed rounds the shard of every parameter group up to an even number of elements."""


def make_config(folder: Path, number: int) -> TrainConfig:
    mesh, kind = LAYOUTS[number]
    precision: Precision = PrecisionConfig(kind="float32" if number % 3 == 1 else "bf16")
    config = tiny_config(
        folder,
        parallelism=mesh,
        precision=precision,
        model=replace(MODEL, num_layers=2 * mesh.pipeline, num_dense_layers=1 + number % 2),
        batch=replace(BATCH, global_sequences=2 * mesh.world_size),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
    )
    moments = "bf16" if number % 2 else "float32"
    return replace(config, optim=replace(config.optim, sharding="zero1", moments=moments))  # type: ignore[arg-type]


def measure(rank: int, world_size: int, configs: list[TrainConfig]) -> list[tuple[int, int, int, int, int]]:
    """Returns the bytes of weights, gradients, a checkpoint's copy, optimizer, and the number of sharded tensors."""
    found = []
    for config in configs:
        learner = open_job(config, planning_schedule(config, config.num_micro_batches))
        gradients = sum(gradient.nbytes for gradient in learner.store.gradients())
        copy = HostCopy().of(state_of(learner, learner.extras))
        copied = sum((value.local if isinstance(value, Slice) else value).nbytes for value in copy.values())
        found.append((_weight_bytes(learner), gradients, copied, *_optimizer_bytes(learner)))
        dist.barrier()
        close_job(learner)
    return found


def _weight_bytes(learner: Learner) -> int:
    """Returns the bytes of weights, buffers and rotation tables, which each block makes in its first forward."""
    network = learner.replica.network
    tokens = learner.replica.config.batch.sequence_length_tokens // learner.world.layout.parallelism.context
    rows = torch.empty(1, tokens, 1, dtype=weight_dtype(learner.replica.config.precision))
    layers = [module for module in network.modules() if isinstance(module, LatentAttention)]
    tables = [layer._table.turns(rows, network.context) for layer in layers]
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers(), *tables))


def _optimizer_bytes(learner: Learner) -> tuple[int, int]:
    """Returns the bytes of DeepSpeed's own tensors, and their number."""
    masters: list[tuple[object, Tensor]] = []
    for _, unit in learner.optimizer._units:
        optimizer = unit._optimizer  # type: ignore[union-attr]
        masters += [(optimizer.optimizer, master) for master in optimizer.single_partition_of_fp32_groups]  # type: ignore[union-attr]
    moments = [moments_of(optimizer, master)[name] for optimizer, master in masters for name in MOMENTS]  # type: ignore[arg-type]
    held = [master for _, master in masters] + moments
    return sum(tensor.untyped_storage().nbytes() for tensor in held), len(masters)


@pytest.mark.parametrize(
    ("numbers", "built_numbers"),
    [
        pytest.param((3,), (), id="one", marks=pytest.mark.slow),
        pytest.param((2, 5, 6), (6,), id="some", marks=pytest.mark.long),
        pytest.param((0, 1, 2, 4, 5, 6, 7), (2, 6), id="every", marks=pytest.mark.exhaustive),
    ],
)
def test_static_bytes_of_real_ranks_are_those_of_arithmetic_and_of_ranks_built_alone(
    tmp_path: Path, numbers: tuple[int, ...], built_numbers: tuple[int, ...]
) -> None:
    write_text(tmp_path)
    configs = {number: make_config(tmp_path, number) for number in numbers}
    measured = run_ranks(configs[numbers[0]].parallelism.world_size, measure, list(configs.values()))
    results = [dict(zip(numbers, rank, strict=True)) for rank in measured]
    built = {number: build_ranks(configs[number]) for number in built_numbers}
    for number, config in configs.items():
        for rank, memory in enumerate(predict_memory(config).ranks):
            for index in range(config.parallelism.stage_ranks):
                weights, gradients, copied, optimizer, num_shards = results[
                    rank * config.parallelism.stage_ranks + index
                ][number]
                name = f"{LAYOUTS[number]}, pipeline rank {rank}, member {index}"
                assert memory.weights == weights, name
                assert memory.gradients == gradients, name
                assert memory.host == pytest.approx(copied, rel=0.02), name  # routers' biases are left out
                assert 0 <= optimizer - memory.optimizer <= num_shards * PADDED_ELEMENTS * 12, name
        for each in built.get(number, ()):
            for rank in each["pipeline_ranks"]:
                memory = predict_memory(config).ranks[rank]
                assert (each["weights_bytes"], each["gradients_bytes"]) == (memory.weights, memory.gradients), (
                    f"{name}: {each}"
                )
                assert math.isclose(each["optimiser_bytes"], memory.optimizer, abs_tol=num_shards * 12), (
                    f"{name}: {each}"
                )


@pytest.mark.parametrize("kind", ["dualpipe", "dualpipe_split", "1f1b"])
def test_total_covers_passes_and_reductions_next_to_the_last_of_them(kind: str, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        parallelism=ParallelismConfig(pipeline=4, data=2, expert=1),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
        batch=replace(BATCH, global_sequences=32),
        model=replace(MODEL, num_layers=8, mtp_depth=0),
    )
    for rank in predict_memory(config).ranks:
        # A rank's only stage finishes with the passes. With two of them, one still runs.
        kept = rank.cool_down.activations + rank.cool_down.pending
        assert (kept > 0) == (kind != "1f1b"), rank
        assert rank.cool_down.total < rank.pipeline.total
        assert rank.total - rank.static - rank.reserve == max(rank.passes, rank.reducing)
        assert rank.update > 0


@pytest.mark.parametrize(
    ("sharding", "bucket", "expected"),
    [
        # A bucket is filled, and at most all of it flattened again.
        ("zero1", 500, 4 * (500 + 500)),
        ("zero1", 2000, 4 * (1400 + 1000)),
        ("replicated", 100, 4 * 100),
        ("replicated", 2000, 4 * 1000),
    ],
)
def test_update_needs_a_bucket_and_no_copy_of_a_shard(
    sharding: Literal["zero1", "replicated"], bucket: int, expected: int, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path)
    config = replace(config, optim=replace(config.optim, sharding=sharding, bucket_elements=bucket))
    held = HeldParameters(ordinary=1000, embedding=0, routed=400, num_blocks=1, num_routers=0, code_bytes=0)
    sizes = make_sizes(MODEL, torch.float32, Computing(), sequences=1, tokens=8, pads_heads=False)
    replicas = ReplicaCounts(dense=4, embedding=4, experts=2)
    assert update_bytes(config, held, sizes, replicas) == expected


@pytest.mark.parametrize("link_depth", range(1, MOST_LINK_DEPTH + 1))
def test_every_message_that_a_link_holds_is_counted(link_depth: int) -> None:
    """Posted receives until the end of the first phase that reads them, and on NCCL the last messages sent."""
    schedule = replace(build_schedule("dualpipe", 4, 10), link_depth=link_depth)
    lanes: dict[int, tuple[Lane, ...]] = dict.fromkeys(range(4), ("compute", "compute"))
    sizes = RunSizes(stages=[dict.fromkeys(lanes, [PhaseBytes()] * 2)], messages=[1])
    most = 0
    for rank in range(4):
        account = RankBytes(sizes, kept_sent=link_depth)
        posted, sent = Counter[str](), Counter[Link]()
        for step in compile_rank(schedule, rank, lanes, overlapped).steps:
            account.perform(step)
            if step.action is Action.RECEIVE:
                assert step.message is not None
                posted[step.message.kind] += 1
            elif step.action is Action.SEND:
                assert step.message is not None
                sent[step.message.link] = min(sent[step.message.link] + 1, link_depth)
            elif step.action is Action.FORWARD and step.phase == 0:
                posted["activation"] -= step.run.stage > 0
            elif step.action is Action.BACKWARD and step.phase == 1:
                posted["gradient"] -= step.run.stage < 3
            assert account.alive().total == posted.total() + sent.total(), step
        most = max(most, max(sent.values()))
    assert most == link_depth
