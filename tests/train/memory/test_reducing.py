"""Predicted memory of reductions: it is added to what the passes hold once a stage has finished."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig
from model.config import Computing
from model.size import HeldParameters
from tests.model.live_memory import make_sizes
from tests.tiny import BATCH, MODEL, tiny_config
from train.memory import predict_memory
from train.memory.rank_bytes import ReplicaCounts, update_bytes


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
