"""Schedules over torch's stages have the gradients of one process. What torch cannot split is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bench.torch_steps import HIDDEN, TOKENS, Block, Errors, compare, compare_sharded, mse, orders_of
from dualpipe.api import build
from dualpipe.ir import Schedule, ScheduleError, from_json, to_json
from dualpipe.passes import merge_backwards
from dualpipe.runtime import torch as runtime
from dualpipe.runtime.torch import DualPipeStep
from dualpipe.validate import validate
from tests.ranks import run_ranks
from tests.refusals import assert_refused


def assert_equal(errors: Errors, name: str) -> None:
    assert max(errors.gradient, errors.norm, errors.loss) < 1e-12, f"{name}: {errors}"


SAMPLE = ("dualpipe_interleaved x 2", "dualpipe_v", "dualpipe_split, 3 slices")


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [3, *(pytest.param(size, marks=[pytest.mark.long, pytest.mark.exhaustive]) for size in (1, 2, 4, 5))]
)
def test_torch_steps_have_the_gradients_of_one_process(size: int) -> None:
    orders = orders_of(size)
    if size == 3:
        orders = {name: orders[name] for name in SAMPLE}
    for errors in run_ranks(size, compare, [to_json(order) for order in orders.values()], timeout_seconds=300):
        for name, both in zip(orders, errors, strict=True):
            for way in both:
                assert_equal(way, name)


@pytest.mark.slow
@pytest.mark.long
def test_torch_steps_have_the_gradients_of_one_process_with_shards_of_fsdp() -> None:
    orders = {
        name: order for name, order in orders_of(2).items() if name in ("dualpipe", "dualpipe_interleaved x 2", "zb_v")
    }
    for errors in run_ranks(4, compare_sharded, [to_json(order) for order in orders.values()], timeout_seconds=300):
        for name, each in zip(orders, errors, strict=True):
            assert_equal(each, name)


@pytest.mark.parametrize("kind", ["dualpipe_interleaved", "dualpipe_split", "zb_v"])
def test_merged_backwards_are_valid_and_whole(kind: str) -> None:
    merged = merge_backwards(build(kind, ranks=4, micro_batches=8, exchange=0.5).schedule)
    validate(merged)
    assert {op.kind for groups in merged.ranks for group in groups for op in group} == {"F", "B"}


class Checkpointed(Block):
    def forward(self, x_BTD: Tensor, *, past: tuple[Tensor, ...] = ()) -> Tensor:
        return checkpoint(super().forward, x_BTD, use_reentrant=False)


class Twice(Block):
    def forward(self, x_BTD: Tensor, *, past: tuple[Tensor, ...] = ()) -> Tensor:
        return self.up(super().forward(x_BTD))


def split() -> Schedule:
    return build("dualpipe_split", ranks=1, micro_batches=2).schedule


def step_of(
    module: nn.Module | Callable[[], Any], order: Any = None, stages: list[tuple[int, int]] | None = None
) -> DualPipeStep:
    """Returns a step of one rank with one module."""
    module = module if isinstance(module, nn.Module) else module()
    order = split() if order is None else order
    keys = (
        from_json(order).stages_of(0) if isinstance(order, str) else getattr(order, "stages_of", split().stages_of)(0)
    )
    return DualPipeStep(order, dict.fromkeys(keys if stages is None else stages, module), mse)


def run_step(step: DualPipeStep) -> None:
    inputs = torch.zeros(2, TOKENS, HIDDEN, dtype=torch.float64)
    step.step(inputs, target=inputs)


def refusals(rank: int, world_size: int) -> None:
    assert_refused(
        ScheduleError,
        ["stage 0", "DistributedDataParallel", "merge_backwards"],
        lambda: step_of(lambda: DistributedDataParallel(Block(0))),
    )
    assert_refused(
        ScheduleError, ["stage 0", "compiled", "merge_backwards"], lambda: step_of(lambda: torch.compile(Block(0)))
    )
    checkpointed = step_of(Checkpointed(0))
    assert_refused(ScheduleError, ["stage 0", "checkpointed", "merge_backwards"], lambda: run_step(checkpointed))
    run_step(step_of(Checkpointed(0), merge_backwards(split())))  # a full backward recomputes once
    assert_refused(ScheduleError, ["stages", "(0, 0)", "none"], lambda: step_of(Block(0), stages=[]))
    two = build("1f1b", ranks=2, micro_batches=2).schedule
    assert_refused(ScheduleError, ["schedule", "1 ranks", "has 2"], lambda: step_of(Block(0), two))
    assert_refused(ScheduleError, ["schedule", "is int"], lambda: step_of(Block(0), 3))
    copied = build("1f1b", ranks=2, micro_batches=8, offload=0.1, memory_cap=1.5).schedule
    assert copied.has_offload
    assert_refused(ScheduleError, ["schedule", "offload"], lambda: step_of(Block(0), copied))
    version = torch.__version__
    try:
        torch.__version__ = type(version)("2.12.1")
        assert_refused(ScheduleError, ["stage 0", "once", "2.13"], lambda: run_step(step_of(Twice(0))))
        torch.__version__ = type(version)("2.11.0")
        assert_refused(ScheduleError, ["torch", "2.12", "2.11.0"], lambda: step_of(Block(0)))
    finally:
        torch.__version__ = version
    run_step(step_of(Twice(0)))


def test_torch_steps_refuse_what_torch_cannot_split() -> None:
    run_ranks(1, refusals)


def one_refuses(rank: int, world_size: int) -> str:
    """Returns the error of ranks of which the last holds a stage that torch cannot split."""
    order = build("dualpipe_split", ranks=world_size, micro_batches=4).schedule
    module: Any = torch.compile(Block(0)) if rank else Block(0)
    with pytest.raises(ScheduleError) as refused:
        DualPipeStep(order, dict.fromkeys(order.stages_of(rank), module), mse)
    return str(refused.value)


def test_a_stage_of_one_rank_is_refused_on_all_ranks_that_name_it() -> None:
    first, last = run_ranks(2, one_refuses)
    assert first == last
    assert "compiled" in first
    assert first.endswith("(rank 1)")


def differing(rank: int, world_size: int) -> str:
    """Returns the error of ranks with unlike schedules, or with one that deadlocks."""
    order = build("1f1b", ranks=2, micro_batches=2 + 2 * rank).schedule
    with pytest.raises(ScheduleError) as differs:
        DualPipeStep(order, {(0, rank): Block(rank)}, mse)
    valid = build("1f1b", ranks=2, micro_batches=2).schedule
    first, last = valid.ranks
    reversed_order = type(valid)(
        **{name: getattr(valid, name) for name in valid.__slots__} | {"ranks": (first, last[::-1])}
    )
    with pytest.raises(ScheduleError) as broken:
        DualPipeStep(reversed_order, {(0, rank): Block(rank)}, mse)
    return f"{differs.value} / {broken.value}"


def test_torch_steps_prove_one_order_for_all_ranks() -> None:
    for message in run_ranks(2, differing):
        assert "differs on rank 1" in message
        assert "rank 1" in message.split(" / ")[1]


def test_threads_run_every_member_once() -> None:
    ran: list[int] = []
    runtime.in_threads([runtime.Member(None, None, lambda at=at: ran.append(at)) for at in range(3)])  # type: ignore[arg-type, misc]
    assert sorted(ran) == [0, 1, 2]
