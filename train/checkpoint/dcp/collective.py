"""Saves and loads a state by torch's DCP on all ranks, without objects of all ranks on each of them.

torch's own functions send the list of all tensors to every rank after saving, and the names of the tensors of every
rank to every other before loading. Here rank 0 alone has plans and list, and loading needs no plan of other ranks.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from comm.agreement import Reports, exchange_reports, gather_on_first
from train.checkpoint.state import State, first_line

ValueT = TypeVar("ValueT")


class PartError(RuntimeError):
    """Ranks could not save or load their part. Raised on every rank; `reports` says which ranks and why."""

    def __init__(self, reports: Reports) -> None:
        super().__init__(f"{reports.name_ranks()}: {reports.first_text}")
        self.reports = reports


def run_on_all(act: Callable[[], ValueT], group: ProcessGroup | None = None) -> ValueT:
    """Calls a function on each rank, and returns its result if no rank failed. All ranks call it.

    Args:
        group: process group of all ranks; the world by default.

    Raises:
        PartError: on every rank, if the function raised an exception on one of them.
    """
    found: list[ValueT] = []
    problem: Exception | None = None
    try:
        found.append(act())
    except Exception as error:
        problem = error
    reports = exchange_reports(None if problem is None else first_line(problem), group)
    if reports.total:
        raise PartError(reports) from problem
    return found[0]


def save_on_all(state: State, writer: StorageWriter, planner: SavePlanner, group: ProcessGroup) -> None:
    """Saves the state of all ranks. All ranks call it.

    Args:
        planner: of this rank. That of rank 0 decides which rank writes what several ranks hold.
        group: process group of all ranks.

    Raises:
        PartError: on every rank, if one of them failed.
    """
    is_first = dist.get_rank(group) == 0
    metadata: list[Metadata] = []

    def plan_own() -> SavePlan:
        planner.set_up_planner(state, writer.storage_meta(), is_first)
        writer.set_up_storage_writer(is_first)
        return writer.prepare_local_plan(planner.create_local_plan())

    plans = gather_on_first(run_on_all(plan_own, group), group)

    def plan_all() -> list[SavePlan] | None:
        if plans is None:
            return None
        planned, listed = planner.create_global_plan(plans)
        metadata.append(listed)
        return writer.prepare_global_plan(planned)

    plan = _scatter(run_on_all(plan_all, group), group)

    def write() -> list[WriteResult]:
        return writer.write_data(planner.finish_plan(plan), planner).wait()

    written = gather_on_first(run_on_all(write, group), group)
    run_on_all(lambda: None if written is None else writer.finish(metadata[0], written), group)


def load_on_all(state: State, metadata: Metadata, reader: StorageReader, planner: LoadPlanner) -> None:
    """Fills the state of each rank, which reads what it needs by itself. All ranks call it.

    Raises:
        PartError: on every rank, if one of them failed.
    """
    is_first = dist.get_rank() == 0

    def read() -> None:
        planner.set_up_planner(state, metadata, is_first)
        reader.set_up_storage_reader(metadata, is_first)
        reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()

    run_on_all(read)


def _scatter(plans: list[SavePlan] | None, group: ProcessGroup) -> SavePlan:
    """Returns this rank's plan of those that the group's first rank has."""
    received: list[Any] = [None]
    dist.scatter_object_list(received, plans, src=dist.get_global_rank(group, 0), group=group)
    plan = received[0]
    assert isinstance(plan, SavePlan)
    return plan
