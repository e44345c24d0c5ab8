"""Measures what a quickstart step on gloo costs besides its blocks, and what conversions cost.

Rank 0 runs the blocks of all micro-batches alone, between steps of the job.
"""

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

import torch
from torch import distributed as dist

from comm.dispatch.local import LocalDispatcher
from comm.watchdog.collective_log import CollectiveLog
from data.loader import Loader
from launch.ranks.machine import apply_rank_environment
from model.linear import GradientStore
from model.objective import LossSums
from model.stage import Stage
from model.transformer import Transformer, initialize_weights
from tests.launch.conversion_memory import LARGE, make
from tests.ranks import run_ranks
from tests.train.job import close_job, open_job, open_loader, task_of
from train.config import TrainConfig
from train.core.replica import StepBatch
from train.core.step import accumulate, rates_of, train_step

MOST_SECONDS = 2.2
MOST_OVER_BLOCKS = 1.15
_EXCHANGING = ("expert", "rail", "node")
_NUM_WARM_STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineCost:
    """One rank's part of a step, or the sums over ranks. `passes` and `blocks` are of the step's micro-batches.

    Attributes:
        gloo: CPU seconds in a step of threads that are not Python's.
        switches: voluntary context switches of all threads in a step.
        exchanges: exchanges that the rank started in a step, counts included.
    """

    step: float
    passes: float
    blocks: float
    gloo: float
    switches: int
    exchanges: int

    @classmethod
    def total(cls, ranks: Sequence["PipelineCost"]) -> "PipelineCost":
        """Adds the parts of all ranks."""
        return cls(**{name: sum(getattr(rank, name) for rank in ranks) for name in cls.__slots__})


def measure_pipeline(config: TrainConfig, num_rounds: int) -> list[PipelineCost]:
    """Returns the costs of each round, summed over ranks."""
    apply_rank_environment(config.cluster)
    ranks = run_ranks(config.parallelism.world_size, _run_rank, config, num_rounds, timeout_seconds=600.0)
    return [PipelineCost.total(found) for found in zip(*ranks, strict=True)]


def pipeline_text(config: TrainConfig, costs: Sequence[PipelineCost]) -> str:
    """Formats medians and minima of all rounds."""
    model, num_ranks = config.model, config.parallelism.world_size
    num_layers = model.num_layers - model.num_dense_layers + model.mtp_depth
    num_tokens = config.batch.global_sequences * config.batch.sequence_length_tokens
    per_layer = num_layers * config.batch.global_sequences // config.batch.micro_sequences
    rows: list[tuple[str, list[float], str]] = [
        (f"CPU s of {num_tokens:,} tokens", [cost.step for cost in costs], f"<= {MOST_SECONDS}"),
        ("passes / bare blocks", [cost.passes / cost.blocks for cost in costs], f"<= {MOST_OVER_BLOCKS}"),
        ("exchanges / layer, micro-batch", [cost.exchanges / per_layer for cost in costs], ""),
        ("voluntary switches / rank", [cost.switches / num_ranks for cost in costs], ""),
        ("share of gloo's threads", [cost.gloo / cost.step for cost in costs], ""),
    ]
    return "\n".join(
        [
            f"A quickstart step on {num_ranks} gloo ranks, {len(costs)} interleaved rounds",
            f"{'':32}{'median':>10}{'least':>10}{'target':>10}",
            *(f"{name:32}{statistics.median(found):10.3f}{min(found):10.3f}{most:>10}" for name, found, most in rows),
        ]
    )


def conversion_text(num_rounds: int) -> str:
    """Converts random weights with one process and with two, in turns, and formats the medians."""
    config = replace(LARGE, num_layers=24)
    runs: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        make(source, config, fp8=False)
        megabytes = sum(path.stat().st_size for path in source.glob("*.safetensors")) / 1e6
        for turn in range(num_rounds):
            for processes, found in runs.items():
                target = f"to={folder}/{processes}-{turn}"
                command = [sys.executable, "-m", "launch.convert", "from=hf", f"path={source}", target]
                found.append(_timed([*command, f"processes={processes}", "max_shard_bytes=16000000"]))
    cpu, wall = zip(*runs[1], strict=True)
    gain = statistics.median(wall) / statistics.median(seconds for _, seconds in runs[2])
    return (
        f"Conversion of {megabytes:.0f} MB, imports included: {megabytes / statistics.median(cpu):.1f} MB per CPU "
        f"second in one process, {gain:.2f} times as fast in wall time with two"
    )


def _timed(command: list[str]) -> tuple[float, float]:
    """Returns the CPU seconds and the wall time of a command."""
    before, began = getrusage(RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    after = getrusage(RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.perf_counter() - began


def _run_rank(rank: int, world_size: int, config: TrainConfig, num_rounds: int) -> list[PipelineCost]:
    learner, loader = open_job(config), open_loader(config)
    run_blocks = _bare_blocks(config, loader) if rank == 0 else None
    costs = []
    for step in range(_NUM_WARM_STEPS + num_rounds):
        blocks = 0.0 if run_blocks is None else run_blocks(step)
        dist.barrier()
        exchanges, cpu = _num_exchanges(learner.world.log), time.process_time()
        gloo, switches = _threads()
        train_step(learner, config.task, loader, step)
        learner.replica.weight_updates.wait_all()
        dist.barrier()
        step_seconds, (gloo_after, switches_after) = time.process_time() - cpu, _threads()
        exchanges = _num_exchanges(learner.world.log) - exchanges
        cpu = time.process_time()
        rates = rates_of(config.task, config.optim, loader.sizes, step)
        accumulate(learner, config.task, StepBatch((partial(loader.batch, step),)), rates)
        dist.barrier()
        passes = time.process_time() - cpu
        learner.optimizer.discard()
        costs.append(
            PipelineCost(
                step=step_seconds,
                passes=passes,
                blocks=blocks,
                gloo=gloo_after - gloo,
                switches=switches_after - switches,
                exchanges=exchanges,
            )
        )
    close_job(learner)
    return costs[_NUM_WARM_STEPS:]


def _bare_blocks(config: TrainConfig, loader: Loader) -> Callable[[int], float]:
    """Returns a function that runs a step's micro-batches through all blocks, and returns its CPU seconds."""
    shape = config.model
    dispatcher = LocalDispatcher(shape.num_routed_experts)
    model = Transformer(shape, dispatcher, torch.float32, computing=config.computing)
    initialize_weights(model, config.seed)
    stage = Stage(model, range(shape.num_layers), first=True, last=True)
    store, task = GradientStore(model.parameters()), task_of(config)
    size = config.batch.micro_sequences

    def run(step: int) -> float:
        cpu = time.process_time()
        starts = range(0, config.batch.global_sequences, size)
        batches = [task.read(loader.batch(step, start, size), torch.device("cpu")) for start in starts]
        counts = torch.stack([task.count(batch) for batch in batches]).sum(0)
        objective = task.objective(counts, rates_of(config.task, config.optim, loader.sizes, step))
        sums = LossSums(task.names)
        with model.weights_unchanged():
            for batch in batches:
                block_run = stage.start(batch, objective, sums, store)
                for phase, lane in enumerate(stage.lanes):
                    block_run.forward(phase)
                    if lane == "comm":
                        block_run.wait()
                for phase, lane in reversed(list(enumerate(stage.lanes))):
                    block_run.backward(phase)
                    if lane == "comm":
                        block_run.wait()
                    else:
                        block_run.weight(phase)
        seconds = time.process_time() - cpu
        store.clear()
        return seconds

    return run


def _num_exchanges(log: CollectiveLog) -> int:
    groups = log.progress().items()
    return sum(progress.started for group, progress in groups if group.split()[0] in _EXCHANGING)


def _threads() -> tuple[float, int]:
    """Returns the CPU seconds of threads that are not Python's, and the voluntary switches of all. Linux only."""
    of_python = {thread.native_id for thread in threading.enumerate()}
    seconds, switches = 0.0, 0
    for thread in Path("/proc/self/task").iterdir():
        status = (thread / "status").read_text().split()
        switches += int(status[status.index("voluntary_ctxt_switches:") + 1])
        if int(thread.name) not in of_python:
            seconds += int((thread / "schedstat").read_text().split()[0]) / 1e9
    return seconds, switches
