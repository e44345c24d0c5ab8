"""Plans of runs whose ranks share sequences: tokens of a rank, work, exchange of latents, and the search."""

from dataclasses import astuple, replace

import pytest

from comm.config import ParallelismConfig
from dualpipe.registry import FALLBACK
from launch.config.rules import check_rules
from launch.plan import search_space
from tests.train.planner.planned import PUBLISHED, SMALL, request_of
from train.config import TrainConfig
from train.planner.config import KernelRates, MeasuredRates
from train.planner.context_exchange import context_seconds
from train.planner.job_plan import plan_job, require_time, untimed_reason
from train.planner.scaling import part_seconds, scaled_times
from train.planner.space import context_sizes
from train.schedule.layer_times import PartTimes
from train.schedule.measured import layer_parameters


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
    own, alone, eight = rates(), scaled_times(rates(), shared(1)), scaled_times(rates(), shared(8, 8 * 4096))
    reference = own.reference
    expanded = 512 * 128 * (128 + 128)
    products = own.attention.forward.products * 7 * expanded / reference.attention_parameters
    sent = context_seconds(shared(8, 8 * 4096), reference)
    added = 7 * own.attention.forward.scores + products + sent.forward
    assert eight.moe.forward - alone.moe.forward == pytest.approx(added)
    assert eight.moe.forward_exchange == pytest.approx(alone.moe.forward_exchange)
    assert astuple(eight.head) == pytest.approx(astuple(alone.head))


def test_exchange_is_576_values_of_seven_eighths_of_the_tokens_each_way() -> None:
    config = shared(8, 131072)
    found = context_seconds(config, rates().reference)
    bytes_sent = 131072 // 8 * 7 * 576 * 2
    assert found.forward == found.backward == pytest.approx(bytes_sent / 160e9)
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
    (schedule,) = (each for each in space.schedules if each.kind == FALLBACK)
    seen = set()
    for setting in space.settings():
        assert setting.pipeline * setting.data * setting.context == space.ranks
        if setting.context not in seen and setting.dispatch == long.dispatch:
            seen.add(setting.context)
            check_rules(space.layout_config(setting, schedule))
    assert seen == {1, 2, 4, 8}


def test_measured_rates_hold_for_their_own_context_group() -> None:
    config = request_of(*SMALL).config
    part = PartTimes(forward=1.0, backward_input=1.0, backward_weight=1.0)
    measured = MeasuredRates(
        kind="measured",
        precision="bf16",
        layer_parameters=layer_parameters(config.model),
        expert=2,
        tokens=2048,
        dense=part,
        moe=part,
        embedding=part,
        head=part,
        mtp=part,
        alone=1.0,
        latency_seconds=0.0,
        optimizer_seconds=0.0,
        sources=(),
    )
    assert untimed_reason(config, measured) == ""
    halved = replace(config, parallelism=replace(config.parallelism, data=1, context=2))
    reason = "rates: must be of a run with parallelism.context=2, are of 1; nearest: parallelism.context=1"
    assert untimed_reason(halved, measured) == reason
    assert untimed_reason(halved, replace(measured, context=2)) == ""
    moe = part_seconds(replace(measured, context=2), halved).moe
    assert moe.forward == pytest.approx(config.batch.micro_sequences * 2048 / 2 / 2048)
