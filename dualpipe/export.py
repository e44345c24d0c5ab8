"""Writes schedules in the forms that other programs run."""

from typing import Literal

from dualpipe.ir import Group, Op, Schedule, ScheduleError
from dualpipe.passes import order_members

TorchGroups = Literal["none", "pairs", "all"]


def torch_csv(schedule: Schedule, groups: TorchGroups = "none") -> str:
    """Returns a line for each rank, with operations as cells: stage, kind, micro-batch.

    `torch.distributed.pipelining` loads it. A group is a cell such as `(0F1;7B0)OVERLAP_F_B`, which torch runs in turn
    unless the trainer has registered a function for it.

    Args:
        schedule: a valid schedule.
        groups: none: a group becomes a sequence. pairs: only a forward and a full backward stay a group, which is what
            torchtitan overlaps. all: every group stays.

    Raises:
        ScheduleError: for two directions, slices or offload, which torch's runtime has no operations for.
    """
    if schedule.num_directions > 1 or schedule.slices > 1 or schedule.has_offload:
        rule = "must have one direction, whole sequences and no offload for torch's runtime"
        raise ScheduleError(f"kind: {rule}, is {schedule.kind}; nearest: zb_v or dualpipe_v")
    return "\n".join(",".join(_cell(group, groups) for group in rank_groups) for rank_groups in schedule.ranks)


def _cell(group: Group, groups: TorchGroups) -> str:
    members = order_members(group)
    cells = [f"{op.stage}{op.kind}{op.micro_batch}" for op in members]
    is_pair = [op.kind for op in members] == [Op.FORWARD, Op.BACKWARD]
    is_group = len(members) > 1 and (groups == "all" or (groups == "pairs" and is_pair))
    return f"({';'.join(cells)})OVERLAP_F_B" if is_group else ",".join(cells)
