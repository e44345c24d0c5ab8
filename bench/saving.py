"""Measures how long a checkpoint blocks a step, relative to the whole time of writing it.

`python -m bench.saving` prints both times and their ratio for two ranks in float32.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from comm.config import ParallelismConfig
from data.prepare import prepare
from tests.ranks import run_ranks
from tests.tiny import CHECKPOINTING, MODEL, OPTIM, tiny_config, write_text
from tests.train.job import close_job, open_job
from train.checkpoint.save import CheckpointSaver
from train.config import PrecisionConfig, TrainConfig

NUM_SAVES = 5


def measure(rank: int, world_size: int, config: TrainConfig) -> tuple[list[float], list[float], int]:
    """Returns seconds of the copies and of the whole saves after the first, and bytes of the checkpoint."""
    learner = open_job(config)
    saver = CheckpointSaver(config, learner, prepare(config.data, config.batch.sequence_length_tokens))
    stalls, wholes = [], []
    for step in range(NUM_SAVES + 1):
        started = time.perf_counter()
        saver.save(step)
        stalls.append(time.perf_counter() - started)
        saver.wait()
        wholes.append(time.perf_counter() - started)
    folder = saver.close()
    assert folder is not None
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    close_job(learner)
    return stalls[1:], wholes[1:], num_bytes


def main() -> int:
    """Measures and prints. The exit code is 1 if the ratio is above a tenth."""
    with tempfile.TemporaryDirectory(prefix="saving-") as name:
        folder = Path(name)
        write_text(folder)
        config = tiny_config(
            folder,
            parallelism=ParallelismConfig(pipeline=1, data=2, expert=2),
            model=replace(MODEL, hidden_size=256, expert_intermediate_size=512, vocab_size=8192),
            checkpointing=replace(CHECKPOINTING, keep=1),
            precision=PrecisionConfig(kind="float32"),
            optim=replace(OPTIM, sharding="zero1"),
        )
        stalls, wholes, num_bytes = run_ranks(2, measure, config, timeout_seconds=600)[0]
    stall, whole = statistics.median(stalls), statistics.median(wholes)
    print(
        f"checkpoint of {num_bytes / 1e6:.0f} MB by 2 ranks: a step waits {stall * 1e3:.1f} ms, written after "
        f"{whole * 1e3:.0f} ms: {100 * stall / whole:.1f} % of the time of a save that is waited for"
    )
    return 0 if stall <= 0.1 * whole else 1


if __name__ == "__main__":
    sys.exit(main())
