"""Checks the streams of a configured run: whether its ranks make progress on NCCL, and whether events order its tensors.

The check needs neither torch nor a GPU. A stage is represented by its first dense and its first MoE layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from comm.config import group_ctas
from comm.dispatch.registry import DISPATCHERS
from comm.layout import Layout
from dualpipe.ir import Schedule
from dualpipe.runtime import pairing
from dualpipe.runtime.program import Lane
from model.config import LAYER, ModelConfig
from train.config import TrainConfig
from train.schedule.cut import embedding_ranks, is_mirrored, run_cut
from train.schedule.timing import few_micro_batches, planning_schedule
from train.streams.rules import DeviceRules, find_cycle
from train.streams.step import StepShape, record_step

CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
RANK_CONNECTIONS = 32
"""Queues that the launcher configures, more than a rank has streams. CUDA's own number is 8."""
_NUM_SMS = 132


@dataclass(frozen=True, slots=True)
class StreamCheck:
    """Result of the check of a run.

    Attributes:
        cycle: operations that can wait for each other, one a line; empty if all ranks make progress.
        unordered: uses of tensors that no event orders.
    """

    schedule: Schedule
    cycle: tuple[str, ...]
    unordered: tuple[str, ...]

    @property
    def text(self) -> str:
        """Returns the result in one line."""
        size = f"schedule {self.schedule.kind} with {self.schedule.num_micro_batches} micro-batches"
        if self.cycle:
            return f"ranks can wait for each other in {size}: {' '.join(self.cycle)}"
        if self.unordered:
            return f"{len(self.unordered)} uses of tensors have no order in {size}, the first: {self.unordered[0]}"
        return f"all ranks make progress, and events order all uses of tensors, in every order of threads: {size}"


def check_streams(config: TrainConfig, environment: Mapping[str, str]) -> StreamCheck:
    """Checks a run on NCCL with at most about three micro-batches for each rank."""
    few = few_micro_batches(config.parallelism.pipeline, config.num_micro_batches, config.schedule.slices)
    schedule = planning_schedule(config, few)
    traces = record_step(step_shape(config, schedule))
    queues = int(environment.get(CONNECTIONS, str(RANK_CONNECTIONS)))
    orders_starts = environment.get(LAUNCH_ORDER, "0") != "0"
    rules = DeviceRules(sms=config.cluster.num_sms or _NUM_SMS, queues=queues, orders_starts=orders_starts)
    unordered = tuple(problem for trace in traces for problem in trace.problems)
    return StreamCheck(schedule, tuple(find_cycle(traces, rules)), unordered)


def step_shape(config: TrainConfig, schedule: Schedule) -> StepShape:
    """Returns what decides the operations of a run's steps."""
    mesh = config.parallelism
    layout = Layout(mesh, config.cluster.ranks_per_node)
    model = config.model
    holders = embedding_ranks(schedule, model.mtp_depth)
    replicas = layout.stage_group(layout.rank(holders[0], 0), mirrored=is_mirrored(schedule))
    dispatch = replace(config.dispatch, payload="full")
    return StepShape(
        schedule=schedule,
        pairing={"overlapped": pairing.overlapped, "sequential": pairing.sequential}[config.schedule.pairing],
        lanes=dict(enumerate(stage_lanes(model, run_cut(config, schedule.placement)))),
        calls=DISPATCHERS.get(dispatch.kind).calls(dispatch, [layout.node_of(rank) for rank in layout.expert_group(0)]),
        dispatch_is_local=dispatch.kind == "local",
        num_replicas=mesh.stage_ranks,
        expert=mesh.expert,
        context=mesh.context,
        gathers=config.optim.sharding == "zero1",
        recomputes=LAYER in config.computing.recomputed,
        embedding=() if set(layout.ranks_at(holders)) <= set(replicas) else holders,
        ctas=group_ctas(config.cluster.communication_sms),
    )


def stage_lanes(model: ModelConfig, cut: Sequence[range]) -> list[tuple[Lane, ...]]:
    """Returns the lanes of each stage's phases: embedding, a dense layer, an MoE layer, and heads with MTP modules."""
    moe: tuple[Lane, ...] = ("compute", "comm", "compute", "comm")
    lanes = []
    for stage, layers in enumerate(cut):
        phases: tuple[Lane, ...] = ("compute",) if stage == 0 else ()
        if any(layer < model.num_dense_layers for layer in layers):
            phases += ("compute",)
        if any(layer >= model.num_dense_layers for layer in layers):
            phases += moe
        if stage == len(cut) - 1:
            phases += ("compute", *(*moe, "compute") * min(model.mtp_depth, 1))
        lanes.append(phases)
    return lanes
