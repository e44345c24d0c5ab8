"""Weights, gradients and optimizer state of every rank by arithmetic against ranks that are built without devices."""

import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from torch import distributed

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from dualpipe.ir import ScheduleError
from dualpipe.registry import candidates
from launch.config.groups import options
from launch.config.run_config import compose_run
from model.config import CutError
from model.size import stage_shapes
from train.config import Fp8PrecisionConfig, PrecisionConfig, TrainConfig
from train.memory import fitted_config, predict_memory
from train.memory.predict import rank_memory
from train.planner.built_ranks import BuiltRank, build_ranks
from train.planner.fake_world import build_distinct_ranks
from train.schedule.cut import run_cut
from train.schedule.nominal import planning_schedule

NO_FILES = ["data.paths=[corpus]", "data.tokenizer=null"]
PRESETS = tuple(name for name in options("model") if name != "of_checkpoint")
PIPELINES = (1, 2, 4, 8, 16)
FEW = (("quickstart", "v3_671b"), (1, 4), ("dualpipe", "dualpipe_split", "1f1b", "zb_v"))
EVERY = (PRESETS, PIPELINES, tuple(candidates()))


def make_config(base: TrainConfig, pipeline: int, kind: str, number: int) -> TrainConfig:
    """Returns a run with this pipeline, whose precision and optimizer alternate with `number`."""
    mesh = ParallelismConfig(pipeline=pipeline, data=16, expert=8 if number % 2 else 4)
    sequences = mesh.data * 2 * pipeline * base.batch.micro_sequences
    precision = (
        PrecisionConfig(kind="float32"),
        PrecisionConfig(kind="bf16"),
        Fp8PrecisionConfig(kind="fp8", scales="float32"),
    )
    optim = replace(
        base.optim,
        sharding="zero1" if number % 3 else "replicated",
        moments="bf16" if number % 3 == 2 else "float32",
    )
    return replace(
        base,
        parallelism=mesh,
        batch=replace(base.batch, global_sequences=sequences, ramp=None),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
        precision=precision[number % 3],
        optim=optim,
    )


def arithmetic(config: TrainConfig) -> dict[int, tuple[int, int, int, int]]:
    """Returns parameters and bytes of weights, gradients and optimizer of every pipeline rank."""
    schedule = planning_schedule(config, config.num_micro_batches)
    shapes = stage_shapes(run_cut(config, schedule.placement))
    memories = [rank_memory(config, schedule, rank, shapes) for rank in range(schedule.num_ranks)]
    return {each.pipeline_rank: (each.parameters, each.weights, each.gradients, each.optimizer) for each in memories}


def counts(built: BuiltRank) -> tuple[int, int, int, int]:
    return built.parameters, built.weights, built.gradients, built.optimizer


def count_differences(
    bases: Sequence[TrainConfig], pipelines: Sequence[int], kinds: Sequence[str]
) -> tuple[int, list[str]]:
    """Builds ranks of all combinations that are defined; returns their number, and the differences."""
    num_ranks, differences = 0, []
    for number, (base, pipeline, kind) in enumerate(product(bases, pipelines, kinds)):
        config = make_config(base, pipeline, kind, number)
        try:
            expected = arithmetic(config)
        except (ScheduleError, CutError):
            continue  # this kind has no schedule or cut of that size
        built = build_distinct_ranks(config)
        assert sorted(rank for each in built for rank in each.pipeline_ranks) == list(range(pipeline))
        for rank, each in [(rank, one) for one in built for rank in one.pipeline_ranks]:
            num_ranks += 1
            # ZeRO rounds the shard of every parameter group up to whole elements.
            if expected[rank][:3] != counts(each)[:3] or abs(expected[rank][3] - each.optimizer) > 12 * 12:
                differences.append(f"{base.model} {kind} {config.parallelism}: rank {rank} {expected[rank]} {each}")
    return num_ranks, differences


@pytest.mark.parametrize(
    ("few", "at_least"),
    [
        pytest.param(FEW, 30, id="few", marks=pytest.mark.slow),
        pytest.param(EVERY, 2000, id="every", marks=pytest.mark.long),
    ],
)
def test_arithmetic_equals_built_ranks(few: tuple[Sequence[str], Sequence[int], Sequence[str]], at_least: int) -> None:
    presets, pipelines, kinds = few
    bases = [compose_run([f"model={name}"]) for name in presets]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        num_ranks, differences = pool.submit(count_differences, bases, pipelines, kinds).result()
    assert not differences, "\n".join(differences[:5])
    assert num_ranks >= at_least


@pytest.mark.slow
def test_distinct_ranks_of_2048_hold_what_the_plan_says() -> None:
    config = fitted_config(compose_run(["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even", *NO_FILES]))
    built = build_ranks(config)
    assert not distributed.is_initialized()
    assert [each.rank for each in built] == list(range(0, 1024, 128))
    predicted = predict_memory(config).ranks
    for each in built:
        for rank in each.pipeline_ranks:
            memory = predicted[rank]
            assert counts(each) == (memory.parameters, memory.weights, memory.gradients, memory.optimizer)
    assert built[0].parameters == 5_343_227_904
    assert built[7].parameters == 3_273_261_056, "global rank 1023 is a replica of pipeline rank 7"


@pytest.mark.long
def test_building_of_distinct_ranks_of_2048_takes_seconds_and_less_than_a_gigabyte() -> None:
    """Both are measured in a process with no other children."""
    arguments = ["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even", *NO_FILES]
    code = (
        "import resource\n"
        "from launch.config.run_config import compose_run\n"
        "from train.planner.built_ranks import build_ranks\n"
        "if __name__ == '__main__':\n"
        f"    build_ranks(compose_run({arguments!r}))\n"
        "    used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    print(used.ru_utime + used.ru_stime, used.ru_maxrss)\n"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=120
    )
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 30
    assert kilobytes < 1e6


@pytest.mark.slow
def test_error_of_a_process_that_builds_ranks_arrives() -> None:
    config = compose_run(["model=quickstart", "schedule=dualpipe", "parallelism.pipeline=3"])
    with pytest.raises(ScheduleError, match="even number"):
        build_ranks(config)
