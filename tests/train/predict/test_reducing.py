"""Predicted memory of messages, and of reductions, which is added to what the passes hold once a stage has ended."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from comm.config import ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.ir import MOST_LINK_DEPTH, Link
from dualpipe.registry import ScheduleConfig
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.pairing import overlapped
from dualpipe.runtime.program import Action, Lane
from model.config import Computing
from model.size import HeldParameters
from tests.model.live_memory import make_sizes
from tests.tiny import BATCH, MODEL, tiny_config
from train.predict.memory import predict_memory
from train.predict.rank_bytes import PhaseBytes, RankBytes, ReplicaCounts, RunSizes, update_bytes


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
