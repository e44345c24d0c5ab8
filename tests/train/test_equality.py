"""Many ranks equal one rank: losses, every gradient, norm, router bias and weights, step by step."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pytest
import torch

from base.registry import load_plugins, loaded_plugins
from comm.config import Cut, ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.costs import Costs, uniform
from dualpipe.generate.dualpipe import dualpipe_v
from dualpipe.generate.zb1p import zb1p
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Schedule
from dualpipe.registry import SCHEDULES, ScheduleConfig
from kernels.router_scores import ROUTERS
from model.config import ATTENTION_FORMS, cut_at
from tests.covering import exhaustive
from tests.dualpipe.random_schedules import bidirectional, looped, offloaded, random_schedule, straight, v_shaped
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, MUON, OPTIM, small_model, small_optimizer, tiny_config
from tests.train.job import Job, run_jobs, run_plain
from train.config import PrecisionConfig, TrainConfig
from train.optim.registry import OPTIMIZERS
from train.predict.cut import with_cut
from verify.equality import keeps_sums
from verify.steps import Difference, StepValues, rank_differences, tensor_differences

STEPS = 2

EXHAUSTIVE = pytest.mark.exhaustive


def split(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns dualpipe_split for costs under which neighbors are fused."""
    costs = Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0)
    return build_schedule("dualpipe_split", num_ranks, num_micro_batches, uniform(costs, num_ranks, num_ranks))


def layout_config(folder: Path, pipeline: int, data: int, expert: int) -> TrainConfig:
    """A layout of ranks, with as few micro-batches as DualPipe takes."""
    return tiny_config(
        folder,
        batch=replace(BATCH, global_sequences=max(4, 2 * pipeline) * data),
        # A cut by cost would differ between overlapped and sequential groups.
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert, cut=Cut("even")),
        schedule=ScheduleConfig(kind="1f1b" if pipeline == 1 else "dualpipe", chunks=None, pairing="overlapped"),
        model=replace(MODEL, num_layers=max(3, pipeline)),
    )


def assert_equal(ranks: list[StepValues], plain: StepValues, tolerance: float) -> None:
    names = set().union(*(seen.weights for seen in ranks))
    assert names == set(plain.weights)
    assert_none("all ranks", tensor_differences("gradient", sum_gradients(ranks), plain.gradients, tolerance))
    loss_names = [f"loss {index}" for index in range(len(plain.losses) - 1)]
    for rank, seen in enumerate(ranks):
        assert_none(f"rank {rank}", rank_differences(seen, plain, loss_names, tolerance))
        for name, weight in seen.weights.items():
            first = next(other.weights[name] for other in ranks if name in other.weights)
            assert torch.equal(weight, first), f"rank {rank}: weight {name} is not bitwise that of other holders"


def assert_none(subject: str, differences: Iterable[Difference]) -> None:
    for difference in differences:
        raise AssertionError(f"{subject}: {difference}")


def sum_gradients(ranks: Sequence[StepValues]) -> dict[str, torch.Tensor]:
    """The gradients of the batch, from the parts of all ranks."""
    totals: dict[str, torch.Tensor] = {}
    for seen in ranks:
        for name, gradient in seen.gradients.items():
            totals[name] = totals[name] + gradient if name in totals else gradient
    return totals


def assert_same(ours: list[StepValues], theirs: list[StepValues]) -> None:
    """Bitwise, step by step."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.losses == other.losses
        assert one.norm == other.norm
        for name, weight in one.weights.items():
            assert torch.equal(weight, other.weights[name]), name
        for name, gradient in one.gradients.items():
            assert torch.equal(gradient, other.gradients[name]), name


_plain_steps = lru_cache(maxsize=8)(run_plain)
"""Steps of the whole model, which layouts and schedules do not change."""


def assert_equal_one_rank(
    ranks: Sequence[list[StepValues]], config: TrainConfig, starved: int = 0, tolerance: float = 1e-10
) -> list[StepValues]:
    """Compares each step of all ranks with the whole model in this process, whose steps are returned."""
    alone = replace(
        config,
        out_dir="",
        parallelism=ParallelismConfig(pipeline=1, data=1, expert=1),
        schedule=ScheduleConfig(kind="1f1b", chunks=None, pairing="sequential"),
        optim=replace(config.optim, bucket_elements=1),
    )
    plain = _plain_steps(alone, starved, len(ranks[0]))
    for step, expected in enumerate(plain):
        assert_equal([rank[step] for rank in ranks], expected, tolerance)
    return plain


def assert_starved_equal_one_rank(config: TrainConfig, starved: Sequence[int], *, repeats: bool = False) -> None:
    """Compares runs in which so many experts get no tokens, and on request the last one with a run in sequence."""
    jobs = [Job(config=config, starved=number) for number in starved]
    repeated = [Job(config=in_sequence(config), starved=starved[-1])] if repeats else []
    results = run_ranks(config.parallelism.world_size, run_jobs, jobs + repeated, STEPS)
    for index, number in enumerate(starved):
        assert_equal_one_rank([rank[index] for rank in results], config, number)
    for rank in results if repeats else []:
        assert_same(rank[-2], rank[-1])


def in_sequence(config: TrainConfig) -> TrainConfig:
    """The same, the members of a group one after the other."""
    return replace(config, schedule=replace(config.schedule, pairing="sequential"))


@pytest.mark.parametrize(
    ("pipeline", "data", "expert", "starved"),
    [
        # Without tokens: no expert; one expert; every expert of the first rank of an expert group.
        pytest.param(2, 2, 2, (1, 4), marks=pytest.mark.slow),
        pytest.param(4, 1, 1, (0,), marks=pytest.mark.slow),
        pytest.param(1, 4, 2, (4,), marks=pytest.mark.slow),
        pytest.param(2, 4, 2, (4,), marks=pytest.mark.long),
        pytest.param(1, 2, 2, (0, 1, 4), marks=EXHAUSTIVE),
        pytest.param(2, 1, 1, (0, 1, 4), marks=EXHAUSTIVE),
        pytest.param(4, 2, 2, (4,), marks=EXHAUSTIVE),
        pytest.param(2, 4, 4, (2,), marks=EXHAUSTIVE),
    ],
)
def test_many_ranks_equal_one_rank(
    folder: Path, pipeline: int, data: int, expert: int, starved: tuple[int, ...]
) -> None:
    config = layout_config(folder, pipeline, data, expert)
    assert_starved_equal_one_rank(config, starved, repeats=len(starved) > 1)


@pytest.mark.parametrize(
    ("pipeline", "data", "expert"),
    [pytest.param(2, 2, 1, marks=pytest.mark.slow), *exhaustive((1, 4, 2), (1, 3, 1), (4, 2, 2))],
)
def test_whole_matrices_of_many_ranks_equal_one_rank(folder: Path, pipeline: int, data: int, expert: int) -> None:
    """Muon; four ranks hold the same experts, so that a rank owns one or two matrices of a stack."""
    config = replace(layout_config(folder, pipeline, data, expert), optim=MUON)
    assert_starved_equal_one_rank(config, (4,), repeats=False)


KINDS = [
    *(("router", name) for name in ROUTERS.names() if name != MODEL.router),
    *(("attention", name) for name in ATTENTION_FORMS.names() if name != MODEL.attention),
    *(("optim", name) for name in OPTIMIZERS.names() if name != OPTIM.kind),
]


def kind_config(folder: Path, key: str, kind: str) -> TrainConfig:
    """Returns a run on four ranks with a router, a form of attention or an optimizer."""
    config = layout_config(folder, 2, 2, 2)
    if key == "optim":
        return replace(config, optim=small_optimizer(kind))
    model = replace(MODEL, router=kind) if key == "router" else small_model(kind)
    return replace(config, model=replace(model, num_layers=config.model.num_layers))


def run_kind(
    rank: int, world_size: int, plugins: tuple[Path, ...], folder: Path, key: str, kind: str
) -> list[list[StepValues]]:
    """Loads plugins, whose classes the configuration may have, and runs the steps of one rank."""
    load_plugins(plugins)
    return run_jobs(rank, world_size, [Job(config=kind_config(folder, key, kind))], STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "kind"), KINDS)
def test_every_registered_kind_on_four_ranks_equals_one_rank(folder: Path, key: str, kind: str) -> None:
    results = run_ranks(4, run_kind, loaded_plugins(), folder, key, kind)
    assert_equal_one_rank([rank[0] for rank in results], kind_config(folder, key, kind), tolerance=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pipeline", "depth"),
    [
        ("1f1b", 2, 0),
        ("dualpipe", 2, 2),
        pytest.param("1f1b", 4, 0, marks=EXHAUSTIVE),
        pytest.param("dualpipe", 2, 0, marks=EXHAUSTIVE),
    ],
)
def test_other_depths_and_single_direction_equal_one_rank(
    folder: Path, kind: Literal["1f1b", "dualpipe"], pipeline: int, depth: int
) -> None:
    config = layout_config(folder, pipeline, 1, 1)
    model = replace(
        MODEL,
        num_layers=config.model.num_layers,
        mtp_depth=depth,
        mtp_hidden="pre_norm",
        q_lora_rank=None,
        num_shared_experts=0,
    )
    config = replace(config, schedule=replace(config.schedule, kind=kind), model=model)
    results = run_ranks(pipeline, run_jobs, [Job(config=config)], STEPS)
    assert_equal_one_rank([rank[0] for rank in results], config)


def scheduled(folder: Path, schedule: Schedule, data: int = 1, expert: int = 1) -> Job:
    """A small run under a schedule: as few sequences as it has micro-batches, a layer for each stage or more."""
    config = layout_config(folder, schedule.num_ranks, data, expert)
    model = replace(config.model, num_layers=max(3, schedule.num_stages), mtp_depth=1)
    batch = schedule.num_micro_batches // schedule.slices * data
    sizes = replace(config.batch, global_sequences=batch, sequence_length_tokens=12)
    slices = replace(config.schedule, slices=schedule.slices)
    return Job(config=replace(config, model=model, batch=sizes, schedule=slices), starved=1, schedule=schedule)


def is_repeated(schedule: Schedule) -> bool:
    """Whether groups have several members whose order changes no sum."""
    return keeps_sums(schedule, has_mtp=True) and any(len(group) > 1 for groups in schedule.ranks for group in groups)


def assert_schedules_equal_one_rank(world_size: int, jobs: Sequence[Job], num_steps: int = STEPS) -> None:
    """Compares every job with the plain model, and its overlapped run with its sequential one.

    The second comparison is bitwise, if groups have several members and none adds to one sum twice. Otherwise the order
    of additions may differ.
    """
    again = [index for index, job in enumerate(jobs) if job.schedule is not None and is_repeated(job.schedule)]
    repeated = [replace(jobs[index], config=in_sequence(jobs[index].config)) for index in again]
    results = run_ranks(world_size, run_jobs, [*jobs, *repeated], num_steps)
    for index, job in enumerate(jobs):
        assert_equal_one_rank([rank[index] for rank in results], job.config, job.starved)
    for rank in results:
        for place, index in enumerate(again):
            assert_same(rank[index], rank[len(jobs) + place])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "dualpipe" else pytest.mark.slow) for kind in SCHEDULES.names()]
)
def test_registered_schedule_on_two_ranks_equals_one_rank(folder: Path, kind: str) -> None:
    """The smallest size that the kind accepts with more micro-batches than ranks; plugins' kinds too."""
    sizes = (number for number in range(3, 9) if SCHEDULES.get(kind).limit(2, number) is None)
    assert_schedules_equal_one_rank(2, [scheduled(folder, build_schedule(kind, 2, next(sizes)))])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_schedules", "cuts"),
    [
        (lambda: [split(2, 3)], [(4, 0)]),
        pytest.param(
            lambda: [zb_v(2, 3), build_schedule("dualpipe", 2, 4), build_schedule("1f1b", 2, 3)],
            [(0, 2, 1, 1), (1, 3), (4, 0)],
            marks=pytest.mark.slow,
        ),
        *exhaustive((lambda: [split(4, 8), split(4, 8)], [(2, 1, 1, 0), (0, 1, 2, 1)])),
    ],
)
def test_uneven_cut_equals_one_rank(
    folder: Path, make_schedules: Callable[[], list[Schedule]], cuts: list[tuple[int, ...]]
) -> None:
    """With MTP; the first stage may hold only the embedding, the last only MTP and the heads."""
    jobs = []
    for schedule, cut in zip(make_schedules(), cuts, strict=True):
        job = scheduled(folder, schedule)
        model = replace(job.config.model, num_layers=sum(cut), mtp_depth=1)
        jobs.append(replace(job, config=with_cut(replace(job.config, model=model), cut_at(cut))))
    assert_schedules_equal_one_rank(jobs[0].config.parallelism.pipeline, jobs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "make_schedules"),
    [
        (1, lambda: [split(1, 3), random_schedule(v_shaped(1), 3, 0, 1.0)]),
        # Several chunks for each rank, and first and last stage on different ranks.
        (1, lambda: [random_schedule(bidirectional(2, 2), 3, 0), random_schedule(looped(2, 2), 3, 0, 1.0)]),
        pytest.param(2, lambda: [random_schedule(bidirectional(2), 5, 1, 1.0)], marks=pytest.mark.slow),
        pytest.param(1, lambda: [random_schedule(bidirectional(5), 7, 0, 1.0)], marks=pytest.mark.long),
        pytest.param(2, lambda: [random_schedule(bidirectional(2, 2), 5, 0, 1.0)], marks=pytest.mark.long),
        *exhaustive(
            (1, lambda: [zb_v(1, 3), dualpipe_v(1, 2), zb1p(1, 2), random_schedule(bidirectional(1), 3, 0)]),
            (1, lambda: [split(2, 4), random_schedule(bidirectional(2), 1, 0)]),
            (1, lambda: [dualpipe_v(2, 5), random_schedule(v_shaped(2), 3, 1)]),
            (2, lambda: [zb_v(2, 3), random_schedule(looped(2, 2), 3, 1)]),
            (1, lambda: [random_schedule(straight(4), 3, 0)]),
            (1, lambda: [random_schedule(bidirectional(3, 2), 5, 0), random_schedule(looped(3, 2), 4, 0)]),
            (1, lambda: [random_schedule(straight(3), 4, 0), zb1p(3, 5)]),
            (1, lambda: [split(2, 3), zb_v(2, 3), zb1p(2, 3)]),
            (1, lambda: [split(3, 5), split(3, 2)]),
            (1, lambda: [random_schedule(bidirectional(3), 5, 0, 1.0), random_schedule(v_shaped(3), 3, 0)]),
            (2, lambda: [split(3, 5), random_schedule(bidirectional(3), 5, 1)]),
            (1, lambda: [split(5, 7)]),
            (2, lambda: [split(4, 9), zb_v(4, 3), zb1p(4, 5)]),
            (1, lambda: [split(8, 8), split(8, 17)]),
        ),
    ],
)
def test_any_schedule_equals_one_rank(folder: Path, data: int, make_schedules: Callable[[], list[Schedule]]) -> None:
    # Made here, as ranks import this module too, and a search takes seconds.
    schedules = make_schedules()
    jobs = [scheduled(folder, schedule, data, data) for schedule in schedules]
    assert_schedules_equal_one_rank(schedules[0].num_ranks * data, jobs, num_steps=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_schedule", "data"),
    [
        (lambda: random_schedule(bidirectional(2), 8, 0, slices=2, link_depth=2), 1),
        *exhaustive(
            (lambda: random_schedule(bidirectional(2), 4, 0), 1),
            (lambda: build_schedule("dualpipe_split", 1, 3), 1),
            (lambda: random_schedule(v_shaped(2), 3, 0), 2),
        ),
    ],
)
def test_offload_to_host_memory_changes_no_bit(folder: Path, make_schedule: Callable[[], Schedule], data: int) -> None:
    """Every activation leaves the device and returns. The rows are wide enough that their memory moves."""
    schedule = make_schedule()
    job = scheduled(folder, schedule, data, data)
    batch = replace(job.config.batch, sequence_length_tokens=48)
    job = replace(job, config=replace(job.config, batch=batch, model=replace(job.config.model, hidden_size=128)))
    away = replace(job, schedule=offloaded(schedule, 0, share=1.0))
    for rank in run_ranks(schedule.num_ranks * data, run_jobs, [job, away], STEPS):
        assert_same(rank[0], rank[1])


@pytest.mark.parametrize(
    ("pipeline", "data", "expert"),
    [
        pytest.param(1, 4, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, marks=pytest.mark.long),
        *exhaustive((1, 1, 1), (2, 4, 2)),
    ],
)
def test_zero1_in_float32_equals_one_rank(folder: Path, pipeline: int, data: int, expert: int) -> None:
    config = zero1(layout_config(folder, pipeline, data, expert))
    # The bucket holds less than the largest weight, so that it is filled again and again.
    config = replace(config, optim=replace(config.optim, bucket_elements=3000))
    assert_zero1_equal(run_ranks(pipeline * data, run_jobs, [Job(config=config, starved=1)], STEPS), config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "data"),
    [
        (random_schedule(looped(2, 2), 3, 0), 1),
        *exhaustive(
            (random_schedule(straight(2), 3, 0), 2),
            (random_schedule(bidirectional(3), 5, 0), 1),
            (random_schedule(bidirectional(2, 2), 3, 0), 2),
            (random_schedule(v_shaped(2), 3, 0), 2),
        ),
    ],
)
def test_zero1_shards_over_replicas_of_unequal_number(folder: Path, schedule: Schedule, data: int) -> None:
    job = scheduled(folder, schedule, data, data)
    job = replace(job, config=zero1(job.config))
    assert_zero1_equal(run_ranks(schedule.num_ranks * data, run_jobs, [job], STEPS), job.config)


def zero1(config: TrainConfig) -> TrainConfig:
    optim = replace(OPTIM, sharding="zero1", eps=1e-3)
    return replace(config, precision=PrecisionConfig(kind="float32"), optim=optim)


def assert_zero1_equal(results: list[list[list[StepValues]]], config: TrainConfig) -> None:
    replicated = replace(config, optim=replace(config.optim, sharding="replicated"))
    assert_equal_one_rank([rank[0] for rank in results], replicated, 1, 1e-5)
