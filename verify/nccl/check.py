"""Checks a configured run: ranks do not wait for each other, and events order its tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comm.config import CONTEXT_CTAS, EXCHANGE_CTAS, LINK_CTAS, REDUCTION_CTAS, SMALL_CTAS
from comm.layout import Layout
from dualpipe.ir import Schedule
from dualpipe.runtime import pairing
from dualpipe.runtime.program import Lane
from dualpipe.validate import embedding_ranks, is_mirrored
from model.config import LAYER, ModelConfig
from train.config import TrainConfig
from train.predict.cut import run_cut
from train.predict.timing import planning_schedule
from verify.nccl.calls import Calls
from verify.nccl.rules import DeviceRules, find_cycle
from verify.nccl.step import StepShape, record_step

_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
_QUEUES = 32  # as the launcher sets it
_NUM_SMS = 132


@dataclass(frozen=True, slots=True)
class StreamFindings:
    """What was checked, and what is wrong with it; empty if nothing is."""

    size: str
    problem: str


def check_streams(config: TrainConfig, calls: Calls, environment: Mapping[str, str]) -> StreamFindings:
    """Checks a run with at most two micro-batches for each rank, whose dispatcher makes these calls.

    The launcher refuses other values of the environment under which ranks can wait for each other.
    """
    slices = config.schedule.slices
    few = -(-2 * config.parallelism.pipeline // slices) * slices
    schedule = planning_schedule(config, min(config.num_micro_batches, few))
    size = f"{schedule.kind} with {schedule.num_micro_batches} micro-batches and {config.dispatch.kind}"
    traces = record_step(step_shape(config, schedule, calls))
    problems = [problem for trace in traces for problem in trace.problems]
    if problems:
        return StreamFindings(size, f"{len(problems)} uses of tensors have no order, the first: {problems[0]}")
    queues = environment.get(_CONNECTIONS) if config.cluster.backend == "nccl" else None
    rules = DeviceRules(sms=config.cluster.num_sms or _NUM_SMS, queues=int(queues or _QUEUES), orders_starts=False)
    return StreamFindings(size, " ".join(find_cycle(traces, rules)))


def group_ctas(communication_sms: int | None) -> dict[str, int]:
    """Returns the most SMs that an operation occupies, by kind of communicator."""
    return {
        "link": LINK_CTAS,
        **dict.fromkeys(("expert", "rail", "node", "deepep"), communication_sms or EXCHANGE_CTAS),
        **dict.fromkeys(("stage", "expert_data", "embedding"), REDUCTION_CTAS),
        "context": CONTEXT_CTAS,
        "world": SMALL_CTAS,
    }


def step_shape(config: TrainConfig, schedule: Schedule, calls: Calls) -> StepShape:
    """Returns what decides the operations of a run's steps."""
    mesh = config.parallelism
    layout = Layout(mesh, config.cluster.ranks_per_node)
    holders = embedding_ranks(schedule, config.model.mtp_depth)
    replicas = layout.stage_group(layout.rank(holders[0], 0), mirrored=is_mirrored(schedule))
    return StepShape(
        schedule=schedule,
        pairing={"overlapped": pairing.overlapped, "sequential": pairing.sequential}[config.schedule.pairing],
        lanes=dict(enumerate(stage_lanes(config.model, run_cut(config, schedule.placement)))),
        calls=None if config.dispatch.kind == "local" else calls,
        num_replicas=mesh.stage_ranks,
        expert=mesh.expert,
        context=mesh.context,
        gathers=config.optim.sharding == "zero1",
        recomputes=LAYER in config.computing.recomputed,
        embedding=() if set(layout.ranks_at(holders)) <= set(replicas) else holders,
        ctas=group_ctas(config.cluster.communication_sms),
    )


def stage_lanes(model: ModelConfig, cut: Sequence[range]) -> list[tuple[Lane, ...]]:
    """Returns the lanes of each stage's phases, with one layer of each kind and one MTP module."""
    dense: list[Lane] = ["compute"]
    moe: list[Lane] = ["compute", "comm", "compute", "comm"]
    lanes = []
    for stage, layers in enumerate(cut):
        phases = dense * (stage == 0)
        phases += dense * any(layer < model.num_dense_layers for layer in layers)
        phases += moe * any(layer >= model.num_dense_layers for layer in layers)
        if stage == len(cut) - 1:
            phases += dense + (moe + dense) * min(model.mtp_depth, 1)
        lanes.append(tuple(phases))
    return lanes
