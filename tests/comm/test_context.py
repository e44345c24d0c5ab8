"""Context groups: which tokens a rank holds, what it sends, and sums that do not depend on timing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, distributed

from comm.config import ParallelismConfig
from comm.context_group import ContextExchange, from_bytes, open_context, to_bytes
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic, TrafficSnapshot
from comm.layout import MOST_GATHERED_RANKS, ContextBytes, Layout, forecast_context_bytes, num_kept_ranks
from comm.protocol import ALONE, ContextGroup, Rows, segment_tokens, segments_of, zigzag_parts
from comm.watchdog.collective_log import CollectiveLog
from tests.context_parts import join_held, take_held
from tests.ranks import run_ranks

SIZES = (1, 2, 3, 8)
TOKENS, WIDTH = 6, 5


@pytest.mark.parametrize("size", SIZES)
def test_ranks_hold_all_tokens_once_and_have_equal_work(size: int) -> None:
    num_tokens = 2 * size * 3
    slices = [zigzag_parts(num_tokens, size).slices(index) for index in range(size)]
    held = [[place for each in own for place in range(each.start, each.stop)] for own in slices]
    assert sorted(place for places in held for place in places) == list(range(num_tokens))
    assert len({sum(place + 1 for place in places) for places in held}) == 1, "visible tokens of a rank"
    whole = torch.arange(2 * num_tokens).view(2, num_tokens, 1).expand(2, num_tokens, 3)
    parts = [take_held(whole, index, size) for index in range(size)]
    for index, part in enumerate(parts):
        assert part[0, :, 0].tolist() == held[index]
        assert torch.equal(part, torch.cat([whole[:, each] for each in slices[index]], 1))
    assert torch.equal(join_held(parts), whole)
    assert [segments_of(index, size)[0] for index in range(size)] == list(range(size))


def test_unequal_segments_are_refused_with_the_nearest_length() -> None:
    assert segment_tokens(32, 4) == 4
    with pytest.raises(ValueError, match=r"a multiple of 8, two segments .* is 30; nearest valid: 32$"):
        segment_tokens(30, 4)
    with pytest.raises(ValueError, match=r"nearest valid: 8$"):
        zigzag_parts(1, 4)


def test_rows_of_several_types_return_from_one_message() -> None:
    rows = torch.randn(2, 3, 5), torch.randn(7).to(torch.float8_e4m3fn), torch.randn(4, 0), torch.randn(3).bfloat16()
    for given in (rows, rows[:1], tuple(each.t() if each.dim() == 2 else each for each in rows)):
        read = from_bytes(to_bytes(given), given)
        assert [(each.dtype, each.shape) for each in read] == [(each.dtype, each.shape) for each in given]
        for ours, theirs in zip(read, given, strict=True):
            assert torch.equal(ours.float(), theirs.float())


def test_group_of_one_rank_returns_what_it_was_given() -> None:
    rows = (torch.ones(2),)
    assert list(ALONE.visit(rows)) == [(0, rows)]
    assert ALONE.collect(rows, {}, lambda index, each: 2 * each[0]).wait().tolist() == [2, 2]
    assert ALONE.sum(rows[0]) is rows[0]


def _rows(index: int, dtype: torch.dtype) -> Rows:
    generator = torch.Generator().manual_seed(index)
    values = torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    return values, torch.full((2, TOKENS), index, dtype=torch.int32)


def _part(index: int, by: int, dtype: torch.dtype) -> Tensor:
    """Returns the part of rank `by` of the gradient of rank `index`."""
    generator = torch.Generator().manual_seed(1000 * index + by)
    return torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def _exchange(
    rank: int, world_size: int, exchange: ContextExchange, dtype: torch.dtype
) -> tuple[TrafficSnapshot, TrafficSnapshot, Tensor, Tensor, dict[str, str]]:
    observers, world = Observers(Traffic(), CollectiveLog()), distributed.group.WORLD
    layout = Layout(ParallelismConfig(pipeline=1, data=world_size, expert=1), ranks_per_node=2)
    group = open_context(world, layout, observers, exchange)
    assert (group.size, group.index) == (world_size, rank)
    visited, kept, rows = [], {}, _rows(rank, dtype)
    for index, given in group.visit(rows):
        visited.append(index)
        assert all(map(torch.equal, given, _rows(index, dtype))), f"rows of rank {index}"
        if group.keeps_rows and index != rank:
            kept[index] = tuple(each.clone() for each in given)
    assert visited == [(rank - distance) % world_size for distance in range(world_size)]
    forward = observers.traffic.take()

    def contribute(index: int, given: Rows) -> Tensor:
        assert all(map(torch.equal, given, _rows(index, dtype))), f"rows of rank {index}"
        return _part(index, rank, dtype)

    gradient = group.collect(rows, kept, contribute).wait()
    backward = observers.traffic.take()
    summed = group.sum(torch.tensor([0.1 * (rank + 1), 1e8 * (-1) ** rank], dtype=torch.float64))
    assert observers.log.awaited() == []
    return forward, backward, gradient, summed, observers.log.order_hashes()


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "size"), [("gather", 2), ("gather", 4), ("ring", 3), ("ring", 4)])
def test_rows_and_gradients_reach_their_ranks_and_bytes_are_as_predicted(exchange: ContextExchange, size: int) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        results = run_ranks(size, _exchange, exchange, dtype)
        value = dtype.itemsize
        tokens = 2 * TOKENS * size
        row_bytes = WIDTH * value + 4
        # Each tensor of a message begins at a multiple of 16 bytes.
        padding = (-2 * TOKENS * WIDTH * value % 16 + -2 * TOKENS * 4 % 16) * (size - 1)
        predicted = forecast_context_bytes(
            size=size,
            num_tokens=tokens,
            row_bytes=row_bytes,
            gradient_bytes=WIDTH * value,
            wide_gradient_bytes=WIDTH * max(value, 4),
            is_ring=exchange == "ring",
        )
        for rank, (forward, backward, gradient, _, _) in enumerate(results):
            parts = [_part(rank, by, dtype) for by in range(size)]
            expected = sum(part.double() for part in parts)
            assert gradient.dtype == dtype
            assert torch.allclose(gradient.double(), expected, rtol=1e-14 if value == 8 else 2**-8, atol=1e-13)  # type: ignore[arg-type]
            sent = ContextBytes(forward=total(forward), backward=total(backward))
            again = padding if exchange == "ring" else 0
            exact = replace(predicted, forward=predicted.forward + padding, backward=predicted.backward + again)
            assert sent == exact, f"rank {rank}"
        assert all(torch.equal(summed, results[0][3]) for *_, summed, _ in results)
        assert all(hashes == results[0][4] for *_, hashes in results)


def total(snapshot: TrafficSnapshot) -> int:
    return snapshot.num_bytes_within_node + snapshot.num_bytes_across_nodes


def _chosen(rank: int, world_size: int) -> list[str]:
    layout = Layout(ParallelismConfig(pipeline=1, data=world_size, expert=1), ranks_per_node=2)
    observers = Observers(Traffic(), CollectiveLog())

    def kind(group: ContextGroup) -> str:
        return type(group).__name__

    opened = [open_context(distributed.group.WORLD, layout, observers, each) for each in ("auto", "ring")]
    return [*map(kind, opened), kind(open_context(None, layout, observers))]


def test_large_groups_pass_rows_around_a_ring() -> None:
    assert MOST_GATHERED_RANKS == 16
    assert [num_kept_ranks(size) for size in (1, 2, 16, 17, 32)] == [0, 1, 15, 0, 0]
    assert run_ranks(2, _chosen) == [["GatherContext", "RingContext", "SingleRankContext"]] * 2
