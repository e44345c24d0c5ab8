"""Built ranks against arithmetic, and plans of runs whose ranks share sequences."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from comm.config import ParallelismConfig
from dualpipe.ir import ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES, ScheduleConfig, candidates
from launch.config.compose import options
from launch.config.rules import check_rules
from launch.config.run import compose_run
from launch.plan import search_space
from model.config import CutError
from model.size import stage_shapes
from planner.axes import context_seconds
from planner.fake_world import build_distinct_ranks
from planner.forms import built_text
from planner.job_plan import build_ranks, compared_kind, plan_job, require_time, untimed_reason
from planner.scaling import KernelRates
from tests.planner.planned import PUBLISHED, SMALL, request_of
from tests.ranks import fork_context
from tests.tiny import MUON
from train.config import Fp8PrecisionConfig, PrecisionConfig, TrainConfig
from train.predict.cut import run_cut
from train.predict.fit import context_sizes, fitted_config
from train.predict.layer_times import LayerTimes, PartTimes
from train.predict.measured import TimesScope, layer_parameters
from train.predict.memory import predict_memory, rank_memory
from train.predict.timing import MeasuredRates, planning_schedule

PRESETS = tuple(name for name in options("model") if name != "of_checkpoint")

PIPELINES = (1, 2, 4, 8, 16)

KINDS = tuple(candidates())

EVERY = tuple(product(PRESETS, PIPELINES, KINDS))

FEW = (
    ("v3_671b", 16, "dualpipe"),
    ("quickstart", 1, "1f1b"),
    ("v2_lite_16b", 2, "v_min"),
    *((preset, PIPELINES[1 + row % 2], KINDS[row % len(KINDS)]) for row, preset in enumerate(PRESETS)),
)
"""A long and a trivial pipeline, and every preset and every kind with one of two sizes."""


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
        MUON if number // 3 % 2 else base.optim,
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


def counts(built: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(built[key] for key in SIZES)


def count_differences(cases: Sequence[tuple[TrainConfig, int, str]]) -> tuple[int, list[str]]:
    """Builds ranks of those combinations that are defined; returns their number, and the differences."""
    num_ranks, differences = 0, []
    for number, (base, pipeline, kind) in enumerate(cases):
        config = make_config(base, pipeline, kind, number)
        try:
            expected = arithmetic(config)
        except (ScheduleError, CutError):
            continue  # this kind has no schedule or cut of that size
        built = build_distinct_ranks(config)
        assert sorted(rank for each in built for rank in each["pipeline_ranks"]) == list(range(pipeline))
        for rank, each in [(rank, one) for one in built for rank in one["pipeline_ranks"]]:
            num_ranks += 1
            # ZeRO rounds the shard of every parameter group up to whole elements.
            if expected[rank][:3] != counts(each)[:3] or abs(expected[rank][3] - counts(each)[3]) > 12 * 12:
                differences.append(f"{base.model} {kind} {config.parallelism}: rank {rank} {expected[rank]} {each}")
    return num_ranks, differences


@pytest.mark.parametrize(
    ("cases", "at_least"),
    [
        pytest.param(FEW, 50, id="few", marks=pytest.mark.slow),
        pytest.param(EVERY, 1800, id="every", marks=pytest.mark.exhaustive),
    ],
)
def test_arithmetic_equals_built_ranks(cases: Sequence[tuple[str, int, str]], at_least: int) -> None:
    bases = {name: compose_run([f"model={name}"]) for name in PRESETS}
    with ProcessPoolExecutor(1, mp_context=fork_context()) as pool:
        built = pool.submit(count_differences, [(bases[name], pipeline, kind) for name, pipeline, kind in cases])
        num_ranks, differences = built.result()
    assert not differences, "\n".join(differences[:5])
    assert num_ranks >= at_least


@pytest.mark.long
def test_distinct_ranks_of_2048_hold_what_the_plan_says() -> None:
    config = fitted_config(compose_run(["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even"]))
    built = build_ranks(config)
    assert not distributed.is_initialized()
    assert [each["pipeline_ranks"][0] for each in built] == list(range(8))
    predicted = predict_memory(config).ranks
    for each in built:
        for rank in each["pipeline_ranks"]:
            memory = predicted[rank]
            assert counts(each) == (memory.parameters, memory.weights, memory.gradients, memory.optimizer)
    assert built[0]["parameters"] == 5_343_227_904
    assert built[7]["parameters"] == 3_273_261_056, "global rank 1023 is a replica of pipeline rank 7"


@pytest.mark.long
def test_building_of_distinct_ranks_of_2048_takes_seconds_and_less_than_a_gigabyte() -> None:
    """Both are measured in a process with no other children."""
    arguments = ["experiment=v3_671b", "schedule=dualpipe", "parallelism.cut=even"]
    code = (
        "import resource\n"
        "from launch.config.run import compose_run\n"
        "from planner.job_plan import build_ranks\n"
        "if __name__ == '__main__':\n"
        f"    build_ranks(compose_run({arguments!r}))\n"
        "    used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    print(used.ru_utime + used.ru_stime, used.ru_maxrss)\n"
    )
    root = Path(__file__).resolve().parents[2]
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


SIZES = {
    "parameters": 5_343_227_904,
    "weights_bytes": 10_693_808_128,
    "gradients_bytes": 21_372_911_616,
    "optimiser_bytes": 1_554_241_920,
}


def built(*ranks: int) -> dict[str, Any]:
    return {"pipeline_ranks": list(ranks), **SIZES}


def test_equal_counts_and_padding_differ_in_nothing() -> None:
    padded = {**SIZES, "optimiser_bytes": SIZES["optimiser_bytes"] + 144}
    kind = compared_kind(built(0, 15), {0: SIZES, 15: padded})
    assert kind == {"pipeline_ranks": [0, 15], **SIZES, "equal": True, "differences": []}


def test_each_difference_of_any_rank_has_both_numbers() -> None:
    other = dict(zip(SIZES, (1, 2, 3, 4), strict=True))
    assert compared_kind(built(0, 15), {0: SIZES, 15: other})["differences"] == [
        "parameters: built 5,343,227,904, by arithmetic 1",
        "bytes of weights: built 10,693,808,128, by arithmetic 2",
        "bytes of gradients: built 21,372,911,616, by arithmetic 3",
        "bytes of optimizer: built 1,554,241,920, by arithmetic 4",
    ]


def test_lines_name_all_ranks_within_100_columns() -> None:
    others = range(1, 15)
    counted = {rank: {**SIZES, "parameters": 1} for rank in others}
    header, equal, differs = built_text(
        [compared_kind(built(0, 15), {0: SIZES, 15: SIZES}), compared_kind(built(*others), counted)]
    )
    assert max(map(len, (header, equal, differs))) <= 100
    assert equal.split()[0] == "0,15"
    assert equal.endswith("equal")
    assert differs.split()[:2] == ["1..14", "(14)"]
    assert differs.endswith("differs")


def rates() -> KernelRates:
    found = request_of(*PUBLISHED).planner.rates
    assert isinstance(found, KernelRates)
    return found


def shared(context: int, length: int = 4096) -> TrainConfig:
    """The published run with longer sequences, each shared by ranks."""
    config = request_of(*PUBLISHED).config
    mesh = ParallelismConfig(pipeline=16, data=128 // context, expert=64, context=context)
    batch = replace(config.batch, sequence_length_tokens=length)
    return replace(config, parallelism=mesh, batch=batch)


def test_shared_sequence_costs_its_scores_its_products_and_its_exchange() -> None:
    """With as many tokens on a rank, eight times the length adds eight times the scores and expanded latents."""
    own, alone, eight = rates(), rates().part_seconds(shared(1)), rates().part_seconds(shared(8, 8 * 4096))
    reference = own.reference
    curve, maps = own.products, reference.attention_maps

    def slowed(outputs: int, inputs: int) -> float:
        return outputs * inputs * (1 + curve.inner_size / inputs) * (1 + curve.output_size / outputs)

    # Reads of weights, which are part of the measured time, are once for each micro-batch.
    read = curve.exposed_reads * sum(outputs * inputs for outputs, inputs in maps) / 3.35e12
    products = (own.attention.forward.products - read) * 7 * slowed(128 * (128 + 128), 512)
    products /= sum(slowed(*sizes) for sizes in maps)
    sent = context_seconds(shared(8, 8 * 4096), reference)
    added = 7 * own.attention.forward.scores + products + sent.forward
    assert eight.moe.forward - alone.moe.forward == pytest.approx(added)
    assert eight.moe.forward_exchange == pytest.approx(alone.moe.forward_exchange)
    assert astuple(eight.head) == pytest.approx(astuple(alone.head))


def test_exchange_is_576_values_of_seven_eighths_of_the_tokens_each_way() -> None:
    config = shared(8, 131072)
    found = context_seconds(config, rates().reference)
    bytes_sent = 131072 // 8 * 7 * 576 * 2
    assert found.forward == found.backward_input == pytest.approx(bytes_sent / 160e9)
    assert context_seconds(shared(1), rates().reference).forward == 0
    # A group over two nodes sends to eight of fifteen ranks on the slower link.
    across = context_seconds(shared(16, 131072), rates().reference)
    assert across.forward == pytest.approx(131072 // 16 * 8 * 576 * 2 / 50e9)


def test_ranks_of_a_shared_sequence_add_up_to_the_same_tokens_per_second() -> None:
    base = request_of(*SMALL)
    mesh = replace(base.config.parallelism, data=1, context=2)
    plan = plan_job(replace(base.config, parallelism=mesh), base.planner)
    time = require_time(plan).time
    tokens = base.config.batch.global_sequences * base.config.batch.sequence_length_tokens
    assert time.tokens_per_second_per_gpu * time.step * mesh.world_size == pytest.approx(tokens)
    assert plan.config.num_micro_batches == 2 * base.config.num_micro_batches


def test_search_offers_context_groups_that_leave_a_rank_the_tokens_of_a_short_sequence() -> None:
    short = request_of(*SMALL)
    assert context_sizes(short.config) == (1,)
    long = replace(
        short.config,
        batch=replace(short.config.batch, sequence_length_tokens=32768),
        model=replace(short.config.model, max_position_tokens=32768),
    )
    assert context_sizes(long) == (1, 2, 4, 8)
    space = search_space(replace(short, config=long, options=replace(short.options, search=True)))
    fallback = SCHEDULES.current_name(FALLBACK)
    (schedule,) = (each for each in space.schedules if each.kind == fallback and each.slices == 1)
    seen = set()
    for setting in space.settings():
        assert setting.mesh.world_size == space.ranks
        if setting.mesh.context not in seen and setting.dispatch == long.dispatch:
            seen.add(setting.mesh.context)
            check_rules(space.layout_config(setting, schedule))
    assert seen == {1, 2, 4, 8}


def test_measured_rates_hold_for_their_own_context_group() -> None:
    config = request_of(*SMALL).config
    part = PartTimes(forward=1.0, backward_input=1.0, backward_weight=1.0)
    measured = MeasuredRates(
        kind="measured",
        scope=TimesScope(precision="bf16", layer_parameters=layer_parameters(config.model), expert=2, tokens=2048),
        times=LayerTimes(dense=part, moe=part, embedding=part, head=part, mtp=part, latency_seconds=0.0),
        alone=1.0,
        optimizer_seconds=0.0,
        sources=(),
    )
    assert untimed_reason(config, measured) == ""
    halved = replace(config, parallelism=replace(config.parallelism, data=1, context=2))
    reason = "rates: must be of a run with parallelism.context=2, are of 1; nearest: parallelism.context=1"
    assert untimed_reason(halved, measured) == reason
    assert untimed_reason(halved, replace(measured, scope=replace(measured.scope, context=2))) == ""
    moe = replace(measured, scope=replace(measured.scope, context=2)).part_seconds(halved).moe
    assert moe.forward == pytest.approx(config.batch.micro_sequences * 2048 / 2 / 2048)
