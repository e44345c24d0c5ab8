"""Agrees on small facts over all ranks, such as errors, without an object per rank in memory.

Unlike in `torch.distributed.all_gather_object`, ranks exchange numbers, then the objects of the few ranks that have
one. All ranks of a group, by default the world, call each function at the same point. Objects are pickled, so they must
come from ranks of the same job.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

MOST_REPORTS = 8  # maximum number of ranks whose reports are exchanged

_MOST_CHARACTERS = 4000

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class RankReport:
    """What one rank reports."""

    rank: int
    text: str


@dataclass(frozen=True, slots=True)
class Reports:
    """Reports of the ranks that have one, equal on all ranks."""

    total: int  # number of ranks that have a report
    first: tuple[RankReport, ...]  # reports of the lowest of these ranks, at most `MOST_REPORTS`, by rank

    @property
    def first_text(self) -> str:
        """Report of the lowest rank that has one; empty if there is none."""
        return self.first[0].text if self.first else ""

    def name_ranks(self) -> str:
        """Returns a text such as `rank 3`, `ranks 0, 3` or `ranks 0, 1, 2, 3, 4, 5, 6, 7 and 120 others`."""
        named = ", ".join(str(report.rank) for report in self.first)
        num_others = self.total - len(self.first)
        others = f" and {num_others} other{'s' * (num_others > 1)}" if num_others else ""
        return f"rank{'s' * (self.total > 1)} {named}{others}"


def sum_over_ranks(numbers: Sequence[int], group: ProcessGroup | None = None) -> list[int]:
    """Returns the sum of each number over all ranks; all ranks have equally many."""
    sums = torch.tensor(numbers, dtype=torch.int64, device=_device(group))
    distributed.all_reduce(sums, group=group)
    return [int(number) for number in sums.tolist()]  # host sync


def smallest_over_ranks(number: int, group: ProcessGroup | None = None) -> int:
    """Returns the smallest of the numbers of all ranks."""
    smallest = torch.tensor([number], dtype=torch.int64, device=_device(group))
    distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN, group=group)
    return int(smallest.item())  # host sync


def exchange_reports(report: str | None, group: ProcessGroup | None = None) -> Reports:
    """Exchanges reports of ranks, such as errors, cut to 4000 characters; without any, one all-reduce."""
    (total,) = sum_over_ranks([report is not None], group)
    rank = distributed.get_rank(group)
    size = distributed.get_world_size(group)
    reports: list[RankReport] = []
    for _ in range(min(total, MOST_REPORTS)):
        # The lowest rank with a report that was not exchanged yet.
        is_left = report is not None and (not reports or rank > reports[-1].rank)
        source = smallest_over_ranks(rank if is_left else size, group)
        text = [report[:_MOST_CHARACTERS] if report is not None and rank == source else None]
        distributed.broadcast_object_list(text, src=_global_rank(source, group), group=group)
        reports.append(RankReport(source, str(text[0])))
    return Reports(total, tuple(reports))


def compare_with_first_rank(text: str, group: ProcessGroup | None = None) -> tuple[str, Reports]:
    """Returns the text of the group's first rank, and the reports of the ranks with another text."""
    expected = broadcast_first(text, group)
    return expected, exchange_reports(text if text != expected else None, group)


def broadcast_first(value: ValueT, group: ProcessGroup | None = None) -> ValueT:
    """Returns the value of the group's first rank. A rank alone gets its own object."""
    if distributed.get_world_size(group) == 1:
        return value
    shared = [value]
    distributed.broadcast_object_list(shared, src=_global_rank(0, group), group=group)
    return shared[0]


def gather_present(value: ValueT | None, group: ProcessGroup | None = None) -> list[ValueT]:
    """Returns the values of the ranks that have one on every rank, in order, none padded to the longest.

    A rank alone gets its own object.
    """
    rank = distributed.get_rank(group)
    size = distributed.get_world_size(group)
    if size == 1:
        return [] if value is None else [value]
    content = b"" if value is None else pickle.dumps(value)
    device = _device(group)
    lengths_R = torch.zeros(size, dtype=torch.int64, device=device)
    lengths_R[rank] = len(content)
    distributed.all_reduce(lengths_R, group=group)
    lengths_R = lengths_R.cpu()  # host sync
    total = int(lengths_R.sum())
    first = int(lengths_R[:rank].sum())
    if total == 0:
        return []
    # Each rank fills its own part of the result and leaves zeros elsewhere, so a sum joins all parts.
    joined = torch.zeros(total, dtype=torch.uint8, device=device)
    if content:
        joined[first : first + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
    distributed.all_reduce(joined, group=group)
    parts = joined.cpu().split(lengths_R[lengths_R > 0].tolist())  # host sync
    return [pickle.loads(part.numpy().tobytes()) for part in parts]


def gather_on_first(value: ValueT, group: ProcessGroup | None = None) -> list[ValueT] | None:
    """Returns all ranks' values, in order, on the group's first rank, which alone needs memory for them."""
    content = pickle.dumps(value)
    device = _device(group)
    longest = -smallest_over_ranks(-len(content), group)
    row = torch.zeros(longest, dtype=torch.uint8)
    row[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if distributed.get_rank(group) != 0:
        distributed.gather(row.to(device), None, dst=_global_rank(0, group), group=group)
        return None
    rows_RB = torch.empty(distributed.get_world_size(group), longest, dtype=torch.uint8, device=device)
    distributed.gather(row.to(device), list(rows_RB.unbind()), dst=_global_rank(0, group), group=group)
    # Zeros after the end of a pickle are ignored.
    return [pickle.loads(row_B.tobytes()) for row_B in rows_RB.cpu().numpy()]  # host sync


def _global_rank(rank: int, group: ProcessGroup | None) -> int:
    return rank if group is None else distributed.get_global_rank(group, rank)


def _device(group: ProcessGroup | None) -> torch.device:
    if distributed.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
