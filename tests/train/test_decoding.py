"""Tests of decoding on the pipeline: every layout generates what one process does, and no weight moves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.traffic import TrafficSnapshot
from dualpipe.config import ScheduleConfig
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.engines.pipelined.engine import CohortSizes, PipelinedEngine
from infer.engines.protocol import NumberedPrompt, Request, Rollout
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config
from tests.train.job import configured_schedule, make_world
from train.config import TrainConfig
from train.decoding import ReplicaPipeline
from train.network import ReplicaConfig
from train.replica import open_replica
from train.schedule.cut import run_cut

PROMPTS = tuple(
    NumberedPrompt(number=number, tokens=tuple((7 * number + 3 * at * at + 1) % 320 for at in range(length)))
    for number, length in enumerate((2, 7, 1, 3, 4, 12, 1, 5, 9, 2, 6))
)
WARM = Request(
    samples=3,
    max_new_tokens=9,
    step=2,
    stop=frozenset((3, 50, 111, 230, 17)),
    sampling=Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, presence_penalty=0.1, seed=4),
)
GREEDY = Request(samples=1, max_new_tokens=12, sampling=Sampling())


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A layout, and sizes of cohorts."""

    kind: str = "dualpipe"
    pipeline: int = 1
    data: int = 1
    expert: int = 1
    chunks: int | None = None
    cohorts: int | None = None
    rows: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one rank saw of one request."""

    rollouts: tuple[Rollout, ...]
    offered: int
    accepted: int
    passes: int
    traffic: TrafficSnapshot
    num_values: int
    num_rounds: int


LAYOUTS = {
    1: [Layout(kind="1f1b"), Layout(kind="1f1b", cohorts=1, rows=2), Layout(kind="dualpipe_split", cohorts=2, rows=3)],
    2: [
        Layout(pipeline=2),
        Layout(pipeline=2, cohorts=1, rows=1),
        Layout(pipeline=2, kind="1f1b", cohorts=3, rows=2),
        Layout(pipeline=2, kind="dualpipe_v"),
        Layout(pipeline=2, kind="dualpipe_interleaved", chunks=2),
        Layout(kind="1f1b", data=2),
        Layout(kind="1f1b", data=2, expert=2),
        Layout(kind="1f1b", data=2, expert=2, cohorts=5, rows=1),
    ],
    4: [
        Layout(pipeline=4),
        Layout(pipeline=4, cohorts=1, rows=5),
        Layout(pipeline=4, kind="1f1b"),
        Layout(pipeline=2, data=2),
        Layout(pipeline=2, data=2, expert=2),
        Layout(pipeline=2, data=2, expert=2, kind="1f1b", cohorts=2, rows=2),
        Layout(pipeline=2, data=2, expert=2, kind="dualpipe_v", rows=4),
        Layout(pipeline=2, data=2, expert=2, kind="dualpipe_interleaved", chunks=2, cohorts=3),
        Layout(pipeline=1, data=4, expert=2, kind="1f1b"),
        Layout(pipeline=4, kind="dualpipe_split", cohorts=3, rows=7),
    ],
}


def foresee(model: Transformer) -> None:
    """Changes weights of a model or a part so that its MTP module often, but not always, drafts the right token."""
    size = model.config.hidden_size
    for name, weight in named_tensors(model).items():
        if name == "model.embed_tokens.weight":
            weight.mul_(4.0)
        if name.endswith("eh_proj.weight"):
            eye = torch.eye(size, dtype=weight.dtype)
            weight.copy_(torch.cat((eye, 0.5 * eye), 1) * 0.4)


def local(request: Request, speculative: bool, dtype: torch.dtype = torch.float64) -> tuple[Rollout, ...]:
    model = Transformer(MODEL, LocalDispatcher(MODEL.num_routed_experts), dtype)
    initialize_weights(model, 7)
    foresee(model)
    return LocalEngine(model, speculative=speculative).generate(PROMPTS, request).rollouts


def config_of(layout: Layout, folder: Path) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=layout.pipeline, data=layout.data, expert=layout.expert),
        schedule=ScheduleConfig(kind=layout.kind, chunks=layout.chunks, pairing="overlapped"),
    )


def run(
    rank: int, world_size: int, folder: Path, layouts: Sequence[Layout], requests: Sequence[tuple[Request, bool]]
) -> list[list[Seen]]:
    """Returns what this rank saw of each request under each layout."""
    return [_run_one(config_of(layout, folder), layout, requests) for layout in layouts]


def _run_one(config: TrainConfig, layout: Layout, requests: Sequence[tuple[Request, bool]]) -> list[Seen]:
    schedule = configured_schedule(config)
    world = make_world(config, schedule)
    replica = open_replica(world, ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement))
    foresee(replica.network)
    pipeline, seen = ReplicaPipeline(replica), []
    for request, speculative in requests:
        sizes = CohortSizes(cohorts=layout.cohorts, max_rows=layout.rows)
        engine = PipelinedEngine(pipeline, speculative=speculative, sizes=sizes)
        rollouts = engine.generate(PROMPTS, request)
        seen.append(
            Seen(
                rollouts=rollouts.rollouts,
                offered=rollouts.statistics.drafts_offered,
                accepted=rollouts.statistics.drafts_accepted,
                passes=rollouts.statistics.passes,
                traffic=replica.observers.traffic.take(),
                num_values=0,
                num_rounds=0,
            )
        )
    dist.barrier()
    pipeline.close()
    replica.close()
    world.close()
    return seen


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_rollouts_are_those_of_one_process(world_size: int, tmp_path: Path) -> None:
    requests = [(WARM, True), (WARM, False), (GREEDY, True)]
    expected = [local(request, speculative) for request, speculative in requests]
    seen = run_ranks(world_size, run, tmp_path, LAYOUTS[world_size], requests)
    for rank in range(world_size):
        for layout, by_request in zip(LAYOUTS[world_size], seen[rank], strict=True):
            for found, rollouts in zip(by_request, expected, strict=True):
                for ours, theirs in zip(found.rollouts, rollouts, strict=True):
                    assert replace(ours, log_probs=()) == replace(theirs, log_probs=()), (rank, layout)
                    assert ours.log_probs == pytest.approx(theirs.log_probs, rel=0, abs=1e-12), (rank, layout)
