"""Predicted memory of reductions: it is added to what the passes hold once a stage has finished."""

from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from tests.tiny import BATCH, MODEL, tiny_config
from train.memory import predict_memory


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
