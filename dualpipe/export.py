"""Writes schedules in the forms that other programs run."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from shlex import quote
from typing import Literal

from dualpipe.ir import Group, Op, Schedule, ScheduleError
from dualpipe.passes import order_members

MEGATRON_KINDS = ("1f1b", "interleaved_1f1b", "megatron_1f1b")
"""Kinds with the order of Megatron-Core, which has stage s on rank s mod P and reads no order from a file."""

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


def megatron_flags(schedule: Schedule, layout: str | None = None) -> dict[str, object]:
    """Returns the flags of Megatron-Core for a pipeline's stages, which it cuts evenly without a layout.

    Raises:
        ScheduleError: if Megatron-Core cannot run the schedule.
    """
    kind = schedule.kind
    ranks = schedule.num_ranks
    batches = schedule.num_micro_batches
    chunks = schedule.num_stages // ranks
    if kind not in MEGATRON_KINDS or schedule.slices > 1 or schedule.has_offload:
        rule = "must be a kind of Megatron's, with whole sequences and no offload"
        raise ScheduleError(f"schedule: {rule}, is {kind}; nearest: {' or '.join(MEGATRON_KINDS)}")
    is_interleaved = kind != "1f1b"
    if is_interleaved and (chunks == 1 or ranks == 1):
        rule = "must have 2 or more ranks and chunks in Megatron's interleaved order"
        raise ScheduleError(f"schedule.chunks: {rule}, has {ranks} and {chunks}; nearest: 2, or schedule=1f1b")
    if is_interleaved and batches % ranks:
        rule = f"micro-batches must be a multiple of the {ranks} ranks for Megatron's interleaved order"
        raise ScheduleError(f"schedule: {rule}, are {batches}; nearest: {-(-batches // ranks) * ranks}, or 1f1b")
    flags: dict[str, object] = {"pipeline-model-parallel-size": ranks}
    if layout is not None:
        return flags | {"pipeline-model-parallel-layout": layout}
    return flags | ({"num-virtual-stages-per-pipeline-rank": chunks} if is_interleaved else {})


def megatron_layout(layers: Sequence[int], mtp_depth: int) -> str:
    """Returns Megatron-Core's `--pipeline-model-parallel-layout` of the numbers of layers of all stages.

    E is the embedding, t a layer, m an MTP module, L the loss. Stages end at `|`, and `(x)*n` and `x*n` repeat.
    """
    stages = ["t" * number if number < 4 else f"t*{number}" for number in layers]
    stages[0] = "E" + stages[0]
    stages[-1] += "m" * mtp_depth + "L"
    runs = [(text, len([*run])) for text, run in groupby(stages)]
    return "".join(f"({text}|)*{count}" if count > 1 else f"{text}|" for text, count in runs)[:-1]


def flag_lines(flags: Mapping[str, object]) -> str:
    """Returns a line for each flag, quoted for a shell."""
    return "\n".join(f"--{flag} {quote(str(value))}" if value != "" else f"--{flag}" for flag, value in flags.items())
