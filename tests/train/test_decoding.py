"""Tests of decoding on the pipeline: every layout generates what one process does, and no weight moves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.traffic import TrafficSnapshot
from dualpipe.registry import ScheduleConfig
from infer.cohorts import AnsweredPrompt, CohortSizes, forecast_rounds
from infer.config import GenerateError, Sampling, Statistics
from infer.engines.local import LocalEngine
from infer.engines.pipelined import PipelinedEngine
from infer.protocol import NumberedPrompt, Request, Rollouts, RouteKey, Sample, SampledRoutes
from model.config import ModelConfig
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config
from tests.train.job import configured_schedule, make_world
from train.config import TrainConfig
from train.core.replica import Replica, open_replica
from train.core.world import ReplicaConfig
from train.post.pipeline import ReplicaPipeline
from train.post.routes import assign_homes, held_records
from train.predict.cut import run_cut

PROMPTS = tuple(
    NumberedPrompt(number=number, tokens=tuple((7 * number + 3 * at * at + 1) % 320 for at in range(length)))
    for number, length in enumerate((2, 7, 1, 3, 11, 5))
)
WARM = Request(
    samples=2,
    max_new_tokens=7,
    step=2,
    stop=frozenset(range(0, 320, 8)),
    sampling=Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, presence_penalty=0.1, seed=4),
    record_routes=True,
    record_kept=True,
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
    prefill: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What one rank saw of one request.

    `num_rounds` counts rounds of each cohort; `digest` is that of the weights afterwards; `held` are the records that
    the rank should have, with their numbers of tokens.
    """

    rollouts: tuple[Sample, ...]
    statistics: Statistics
    traffic: TrafficSnapshot
    num_rounds: int
    plan_bytes: int
    num_cohorts: int
    cut: tuple[range, ...]
    is_unchanged: bool
    routes: SampledRoutes | None
    held: dict[RouteKey, int]


LAYOUTS = {
    1: [Layout(kind="dualpipe_split", cohorts=2, rows=3)],
    2: [
        Layout(pipeline=2, cohorts=2, rows=2, prefill=4),
        Layout(pipeline=2, kind="dualpipe_interleaved", chunks=2),
        Layout(kind="1f1b", data=2, expert=2, cohorts=3, rows=2, prefill=3),
    ],
    4: [
        Layout(pipeline=2, data=2, expert=2, kind="1f1b", cohorts=2, rows=2),
        Layout(pipeline=4, kind="dualpipe_split", cohorts=3, rows=7),
    ],
}
MORE_LAYOUTS = {
    1: [Layout(kind="1f1b"), Layout(kind="1f1b", cohorts=1, rows=5)],
    2: [
        Layout(pipeline=2),
        Layout(pipeline=2, kind="dualpipe_v"),
        Layout(pipeline=2, kind="1f1b", cohorts=3, rows=2),
        Layout(kind="1f1b", data=2),
        Layout(kind="1f1b", data=2, expert=2),
    ],
    4: [
        Layout(pipeline=4),
        Layout(pipeline=4, cohorts=1, rows=5),
        Layout(pipeline=4, kind="1f1b"),
        Layout(pipeline=1, data=4, expert=2, kind="1f1b"),
        Layout(pipeline=2, data=2),
        Layout(pipeline=2, data=2, expert=2),
        Layout(pipeline=2, data=2, expert=2, kind="dualpipe_v", rows=4),
        Layout(pipeline=2, data=2, expert=2, kind="dualpipe_interleaved", chunks=2, cohorts=2, prefill=4),
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


def local(request: Request, *, speculative: bool, config: ModelConfig = MODEL) -> Rollouts:
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float64)
    initialize_weights(model, 7)
    foresee(model)
    return LocalEngine(model, speculative=speculative).generate(PROMPTS, request)


def config_of(layout: Layout, folder: Path) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=layout.pipeline, data=layout.data, expert=layout.expert),
        schedule=ScheduleConfig(kind=layout.kind, chunks=layout.chunks, pairing="overlapped"),
    )


def run(
    rank: int, world_size: int, folder: Path, layouts: Sequence[Layout], requests: Sequence[tuple[Request, bool]]
) -> list[list[Seen]]:
    return [_run_one(config_of(layout, folder), layout, requests) for layout in layouts]


def _run_one(config: TrainConfig, layout: Layout, requests: Sequence[tuple[Request, bool]]) -> list[Seen]:
    with opened(config) as (replica, pipeline):
        seen = []
        for request, speculative in requests:
            before = {name: weight.clone() for name, weight in named_tensors(replica.model).items()}
            sizes = CohortSizes(cohorts=layout.cohorts, max_rows=layout.rows, prefill_tokens=layout.prefill)
            engine = PipelinedEngine(pipeline, speculative=speculative, sizes=sizes)
            made = engine.generate(PROMPTS, request)
            if not speculative and request.max_new_tokens:
                assert_forecast(made, engine, request, layout, sizes, replica)
            after = named_tensors(replica.model)
            seen.append(
                Seen(
                    rollouts=made.rollouts,
                    statistics=made.statistics,
                    traffic=replica.observers.traffic.take(),
                    num_rounds=engine.num_rounds,
                    plan_bytes=engine.plan_bytes,
                    num_cohorts=engine.num_cohorts,
                    cut=replica.cut,
                    is_unchanged=all(torch.equal(weight, after[name]) for name, weight in before.items()),
                    routes=made.routes,
                    held=held_keys(replica, made.rollouts),
                )
            )
    return seen


def assert_forecast(
    made: Rollouts, engine: PipelinedEngine, request: Request, layout: Layout, sizes: CohortSizes, replica: Replica
) -> None:
    """Checks that rounds, visits and rows of each visit follow from the numbers of tokens alone."""
    answers: dict[int, list[int]] = {prompt.number: [] for prompt in PROMPTS}
    for rollout in made.rollouts:
        answers[rollout.prompt].append(rollout.num_tokens)
    longest = replica.config.model.max_position_tokens
    prompts = [
        AnsweredPrompt(
            prompt=len(prompt.tokens),
            answers=tuple(answers[prompt.number]),
            limit=min(request.max_new_tokens, longest - len(prompt.tokens)),
        )
        for prompt in PROMPTS
    ]
    forecast = forecast_rounds(prompts, replica.schedule.placement, layout.data, sizes)
    counts = made.statistics
    assert (forecast.rounds, forecast.cohorts) == (engine.num_rounds, engine.num_cohorts), f"{layout}"
    assert counts.rounds == engine.num_rounds
    assert forecast.visits_R.sum() == counts.visits, f"{layout}"
    assert forecast.rows_per_visit == pytest.approx(counts.passes / counts.visits, rel=1e-12), f"{layout}"


def held_keys(replica: Replica, rollouts: Sequence[Sample]) -> dict[RouteKey, int]:
    """Returns the records that this rank should have, with their numbers of tokens."""
    answers: dict[int, list[int]] = {prompt.number: [] for prompt in PROMPTS}
    for rollout in rollouts:
        answers[rollout.prompt].append(len(rollout.tokens))
    lengths = [(prompt.number, len(prompt.tokens), answers[prompt.number]) for prompt in PROMPTS]
    return held_records(replica, assign_homes(replica, [list(answers)]), lengths)


def sorted_ids(routes: SampledRoutes | None) -> dict[RouteKey, list[list[int]]]:
    """Returns the experts of each token of each record, in rising order."""
    assert routes is not None
    return {key: np.sort(ids_TK, -1).tolist() for key, ids_TK in routes.ids.items()}


@contextmanager
def opened(config: TrainConfig) -> Iterator[tuple[Replica, ReplicaPipeline]]:
    """Opens a replica of the tests' model and closes it with its world; all ranks call it."""
    schedule = configured_schedule(config)
    world = make_world(config, schedule)
    replica = open_replica(world, ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement))
    foresee(replica.network)
    pipeline = ReplicaPipeline(replica)
    yield replica, pipeline
    dist.barrier()
    pipeline.close()
    replica.close()
    world.close()


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        *(pytest.param(size, few, id=str(size), marks=pytest.mark.slow) for size, few in LAYOUTS.items()),
        *(pytest.param(size, more, id=f"{size}+", marks=pytest.mark.exhaustive) for size, more in MORE_LAYOUTS.items()),
    ],
)
def test_rollouts_are_those_of_one_process(world_size: int, layouts: list[Layout], tmp_path: Path) -> None:
    expected = local(WARM, speculative=True)
    assert len({len(rollout.tokens) for rollout in expected.rollouts}) > 2, "no sequence stops early"
    assert 0 < expected.statistics.drafts_accepted < expected.statistics.drafts_offered
    seen = run_ranks(world_size, run, tmp_path, layouts, [(WARM, True)])
    for rank in range(world_size):
        for layout, (found,) in zip(layouts, seen[rank], strict=True):
            assert_equal(found.rollouts, expected.rollouts, (rank, layout))
            assert found.is_unchanged, (rank, layout)
            ours, theirs = found.statistics, expected.statistics
            assert (ours.tokens, ours.drafts_offered) == (theirs.tokens, theirs.drafts_offered), (rank, layout)
            assert ours.drafts_accepted == theirs.drafts_accepted, (rank, layout)
    # Every record is held by one rank. A rank holds those of its own layers and sequences, in 4 bytes for each token.
    whole = sorted_ids(expected.routes)
    for number, layout in enumerate(layouts):
        found = [seen[rank][number][0] for rank in range(world_size)]
        parts = [sorted_ids(each.routes) for each in found]
        assert sum(len(part) for part in parts) == len(whole), layout
        assert {key: ids for part in parts for key, ids in part.items()} == whole, layout
        for rank, each in enumerate(found):
            assert each.routes is not None
            assert {key: len(ids_TK) for key, ids_TK in each.routes.ids.items()} == each.held, (rank, layout)
            assert each.routes.num_bytes == 4 * sum(each.held.values()), (rank, layout)


def assert_equal(ours: Sequence[Sample], theirs: Sequence[Sample], where: object) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert replace(mine, log_probs=()) == replace(other, log_probs=()), where
        assert mine.log_probs == pytest.approx(other.log_probs, rel=0, abs=1e-12), where


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        Layout(pipeline=2, data=2, expert=2),
        *exhaustive(
            Layout(pipeline=4),
            Layout(pipeline=2, data=2, expert=2, kind="1f1b"),
            Layout(pipeline=2, data=2, kind="dualpipe_v", cohorts=3),
        ),
    ],
    ids=str,
)
def test_only_hidden_states_and_token_ids_travel(layout: Layout, tmp_path: Path) -> None:
    """Predicts the bytes of all messages. Text is greedy, without drafts."""
    expected = local(GREEDY, speculative=False).rollouts
    seen = [found for ((found,),) in run_ranks(4, run, tmp_path, [layout], [(GREEDY, False)])]
    placement = configured_schedule(config_of(layout, tmp_path)).placement
    # The last token of a sequence is chosen and never read.
    directions: list[int] = [0] * len(placement)
    for number, rollout in enumerate(expected):
        direction = number // layout.data % len(placement)
        directions[direction] += len(PROMPTS[number].tokens) + len(rollout.tokens) - 1
    predicted = 0
    for row, num_tokens in zip(placement, directions, strict=True):
        crossings = sum(rank != after for rank, after in pairwise(row))
        feedback = int(row[0] != row[-1])
        plans = layout.data * seen[0].num_rounds * seen[0].num_cohorts * seen[0].plan_bytes
        predicted += crossings * (plans + num_tokens * MODEL.hidden_size * 8) + feedback * (plans + num_tokens * 8)
    sent = sum(
        each.traffic.num_message_bytes_within_node + each.traffic.num_message_bytes_across_nodes for each in seen
    )
    assert sent == predicted
    for rank, each in enumerate(seen):
        assert_equal(each.rollouts, expected, rank)
        assert each.is_unchanged, rank
        total = each.traffic.total
        assert total.num_bytes_within_node == total.predicted_bytes_within_node, rank
        assert total.num_bytes_across_nodes == total.predicted_bytes_across_nodes, rank
        assert (total.num_bytes_within_node + total.num_bytes_across_nodes > 0) == (layout.expert > 1), rank


def fail_on_one_rank(rank: int, world_size: int, folder: Path) -> str:
    """Returns the error of a request in which only the first prompt's embedding is not finite."""
    with opened(config_of(Layout(pipeline=2), folder)) as (replica, pipeline):
        for name, weight in named_tensors(replica.network).items():
            if name == "model.embed_tokens.weight":
                weight[PROMPTS[0].tokens[0]] = torch.nan
        with pytest.raises(GenerateError) as caught:
            PipelinedEngine(pipeline).generate(PROMPTS, GREEDY)
        # The engine can be used again.
        assert len(PipelinedEngine(pipeline).generate(PROMPTS[1:2], GREEDY).rollouts) == 1
    return str(caught.value)


def test_error_of_one_rank_ends_the_request_on_all(tmp_path: Path) -> None:
    errors = run_ranks(2, fail_on_one_rank, tmp_path)
    assert len(set(errors)) == 1
    assert errors[0].startswith("prompt 1: the model's logits must be finite, are not after 0 new tokens")
