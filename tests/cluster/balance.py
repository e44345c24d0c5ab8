"""Times training steps with and without copies of hot experts: `python -m tests.cluster.balance [BIAS...]`.

Eight ranks on four nodes share the experts, and train as a run does, in float32. A fixed router bias falls from BIAS at
the first expert to 0 at the last, so that the first node has the most rows, and its first rank more than its second.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, distributed

from comm.config import AllToAllDispatchConfig, ParallelismConfig
from dualpipe.ir import Schedule
from model.transformer import routers
from tests.cluster.namespaces import Cluster, Links, missing, open_cluster, read_counted
from tests.cluster.ranks_in_nodes import begin_together, run_in_nodes
from tests.tiny import BATCH, MODEL, OPTIM, TASK, tiny_config
from tests.train.job import configured_schedule, make_world
from train.config import PrecisionConfig, TokenSchedule, TrainConfig
from train.core.learner import Learner, open_learner
from train.core.replica import open_replica
from train.core.step import train_step
from train.core.world import ReplicaConfig, World
from train.predict.cut import run_cut
from verify.runs import loader_of

Mode = Literal["none", "node", "exact"]
NUM_NODES = 4
RANKS_PER_NODE = 2
LINKS = Links(eth0_megabits=100.0)
BIASES = (0.1, 0.2, 0.3)
_NUM_TOKENS = 512
_NUM_EXPERTS = 32


@dataclass(frozen=True, slots=True)
class RankStep:
    """Step of one rank: seconds from the common start, and bytes to other nodes of its exchanges."""

    seconds: float
    counted_bytes: int
    predicted_bytes: int
    link_bytes: int  # sent and received by the node on eth0, which has the sums of dense gradients too
    loss: float
    loads_E: Tensor  # rows of each expert over all ranks


@dataclass(frozen=True, slots=True)
class Measured:
    """Steps of one mode, by round and rank."""

    rounds: Sequence[Sequence[RankStep]]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step, until the last rank has ended."""
        return [max(step.seconds for step in ranks) for ranks in self.rounds]

    @property
    def counted_bytes(self) -> int:
        """Bytes of exchanges between nodes in all steps."""
        return sum(step.counted_bytes for ranks in self.rounds for step in ranks)

    @property
    def predicted_bytes(self) -> int:
        """Predicted bytes of exchanges between nodes in all steps."""
        return sum(step.predicted_bytes for ranks in self.rounds for step in ranks)

    @property
    def fullest_link_bytes(self) -> float:
        """Bytes on the fullest link in a typical step, both directions."""
        return statistics.median(max(step.link_bytes for step in ranks) for ranks in self.rounds)

    @property
    def loads_E(self) -> Tensor:
        """Rows of each expert in the last step."""
        return self.rounds[-1][0].loads_E

    def fullest(self, parts: int) -> float:
        """Returns the most rows of an equal part of the experts over the mean."""
        loads = self.loads_E.view(parts, -1).sum(1)
        return float(loads.max() / loads.mean())


def config_of(mode: Mode) -> TrainConfig:
    """Returns a run with the proportions of DeepSeek-V3: a copy's weights are as large as few of its rows."""
    size = NUM_NODES * RANKS_PER_NODE
    config = tiny_config(
        Path("run"),
        parallelism=ParallelismConfig(pipeline=1, data=size, expert=size),
        dispatch=AllToAllDispatchConfig(
            kind="all_to_all", payload="full", max_nodes=NUM_NODES, node_cap="verify", balance=mode
        ),
        precision=PrecisionConfig(kind="float32"),
        optim=replace(OPTIM, learning_rate=1e-6),  # so that routing stays skewed
        recompute=(),
        task=replace(TASK, bias_update_rate=TokenSchedule.constant(0.0)),
        model=replace(
            MODEL,
            hidden_size=256,
            num_layers=2,
            num_routed_experts=_NUM_EXPERTS,
            expert_intermediate_size=128,
            num_expert_groups=1,
            num_limited_groups=1,
            mtp_depth=0,
            max_position_tokens=_NUM_TOKENS,
            initializer_range=0.02,
        ),
        batch=replace(BATCH, sequence_length_tokens=_NUM_TOKENS, global_sequences=size),
    )
    return replace(config, cluster=replace(config.cluster, ranks_per_node=RANKS_PER_NODE))


def measure(cluster: Cluster, bias: float, modes: Sequence[Mode], num_rounds: int) -> dict[Mode, Measured]:
    """Runs a step of each mode in turn on the same ranks, after one unmeasured round."""
    ranks = run_in_nodes(cluster, RANKS_PER_NODE, _measure_rank, bias, modes, num_rounds)
    return {mode: Measured(list(zip(*(of[mode] for of in ranks), strict=True))) for mode in modes}


def _measure_rank(
    rank: int, world_size: int, bias: float, modes: Sequence[Mode], num_rounds: int
) -> dict[Mode, list[RankStep]]:
    configs = {mode: config_of(mode) for mode in modes}
    config = configs[modes[0]]
    schedule = configured_schedule(config)
    world = make_world(config, schedule)
    learners = {mode: _open(configs[mode], world, schedule, bias) for mode in modes}
    loader = loader_of(config)
    steps: dict[Mode, list[RankStep]] = {mode: [] for mode in modes}
    for step in range(1 + num_rounds):
        for mode, learner in learners.items():
            before = read_counted("eth0")
            start = begin_together()
            result = train_step(learner, config.task, loader, step)
            seconds = time.monotonic() - start
            distributed.barrier()
            link = read_counted("eth0") - before
            traffic = learner.replica.observers.traffic.take().total
            steps[mode].append(
                RankStep(
                    seconds,
                    traffic.num_bytes_across_nodes,
                    traffic.predicted_bytes_across_nodes,
                    link.sent_bytes + link.received_bytes,
                    result.losses.total,
                    result.balance.load_LE.sum(0),
                )
            )
    distributed.barrier()
    for learner in learners.values():
        learner.close()
    world.close()
    return {mode: of[1:] for mode, of in steps.items()}


def _open(config: TrainConfig, world: World, schedule: Schedule, bias: float) -> Learner:
    replica = open_replica(world, ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement))
    for router in routers(replica.model).values():
        router.e_score_correction_bias.copy_(torch.linspace(bias, 0.0, _NUM_EXPERTS))
    return open_learner(replica, config.optim, config.ema)


def text(bias: float, found: dict[Mode, Measured]) -> str:
    """Formats the measurements of a skew as a table."""
    first = next(iter(found.values()))
    lines = [
        f"bias {bias:g}: MaxVio {first.fullest(_NUM_EXPERTS) - 1:.2f}, rows without copies over the mean: fullest node "
        f"{first.fullest(NUM_NODES):.2f}, fullest rank {first.fullest(NUM_NODES * RANKS_PER_NODE):.2f}",
        f"{'':8}{'step s':>8}{'least':>8}{'faster':>8}{'MB between nodes':>18}{'/ none':>8}"
        f"{'MB on fullest link':>20}{'/ none':>8}",
    ]
    for mode, of in found.items():
        seconds = statistics.median(of.seconds)
        lines.append(
            f"{mode:8}{seconds:8.2f}{min(of.seconds):8.2f}{statistics.median(first.seconds) / seconds:8.2f}"
            f"{of.counted_bytes / len(of.rounds) / 1e6:18.2f}{of.counted_bytes / first.counted_bytes:8.3f}"
            f"{of.fullest_link_bytes / 1e6:20.2f}{of.fullest_link_bytes / first.fullest_link_bytes:8.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    reason = missing()
    if reason is not None:
        sys.exit(f"balance: left out: {reason}")
    print(
        f"Steps of {NUM_NODES} nodes x {RANKS_PER_NODE} ranks, {LINKS.eth0_megabits:g} Mbit/s between nodes, "
        f"{LINKS.lo_megabits:g} within, {_NUM_EXPERTS} experts, top-{MODEL.num_experts_per_token}, "
        f"{_NUM_TOKENS} tokens a rank, float32"
    )
    for bias in map(float, sys.argv[1:] or BIASES):
        with open_cluster(NUM_NODES, LINKS) as cluster:
            print(text(bias, measure(cluster, bias, get_args(Mode), num_rounds=7)))


if __name__ == "__main__":
    main()
