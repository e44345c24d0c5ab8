"""Tests that training sends tokens to the experts that the sampler chose, and that no rank receives other records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from comm.protocol import Label
from data.loader import Batch
from infer.config import Sampling
from infer.engines.pipelined import PipelinedEngine
from infer.protocol import PROMPT_SAMPLE, Request, RouteKey, Sample, SampledRoutes
from model.objective import LossSums
from model.router import ReplayedRoutes, RouteError, Router, Routes, Routing
from model.transformer import routers
from tests.ranks import run_ranks
from tests.tiny import MODEL
from tests.train.job import task_of
from tests.train.test_decoding import PROMPTS, Layout, config_of, held_keys, local, opened, sorted_ids
from train.config import TrainConfig
from train.core.replica import BatchReader, Replica
from train.core.step import rates_of
from train.files.run_files import RankFiles
from train.post.pack import BatchShape, fill, place_answers
from train.post.routes import BatchRoutes, TrainedRoutes, assign_homes, exchange_routes, read_routes, write_routes
from train.post.sample import AnswerPlace

# Many experts, so that scores are close to each other.
MANY_EXPERTS = replace(MODEL, num_routed_experts=64, num_experts_per_token=8, num_expert_groups=1, num_limited_groups=1)
LENGTH = 18
NUM_SEQUENCES = 8
STEP = 3
REQUEST = Request(
    samples=4,
    max_new_tokens=7,
    stop=frozenset(range(0, 320, 8)),
    sampling=Sampling(temperature=1.0, seed=4),
    record_routes=True,
)
LAYOUTS = [Layout(pipeline=4), Layout(pipeline=2, data=2, expert=2, kind="dualpipe_interleaved", chunks=2)]
Known = Mapping[RouteKey, list[list[int]]]


@dataclass(slots=True)
class Spy:
    """Follows other routes, or lets routers choose, and keeps the choices."""

    routes: Routes | None = None
    ids: dict[Label, Tensor] = field(default_factory=dict)

    def route(self, label: Label, router: Router, logits_BTE: Tensor) -> Routing:
        routing = router.route(logits_BTE) if self.routes is None else self.routes.route(label, router, logits_BTE)
        self.ids[label] = routing.ids_TK
        return routing


@dataclass(slots=True)
class Replayed:
    """Results of one rank.

    `checked` counts choices of tokens that have a record, `flips` those that differ from it, for each kind of pass.
    """

    checked: dict[str, int]
    flips: dict[str, int]
    bytes_held: int
    bytes_needed: int
    reread: bool
    repeats: bool


def training_config(layout: Layout, folder: Path) -> TrainConfig:
    config = config_of(layout, folder)
    batch = replace(config.batch, sequence_length_tokens=LENGTH, global_sequences=NUM_SEQUENCES, document_mask=True)
    return replace(config, model=MANY_EXPERTS, batch=batch)


def pack(rollouts: Sequence[Sample]) -> tuple[list[Batch], list[AnswerPlace]]:
    """Packs all answers, the last ones first, so that they leave the ranks that sampled them."""
    answers = [(PROMPTS[each.prompt], each) for each in reversed(rollouts) if each.tokens]
    shape = BatchShape(num_sequences=NUM_SEQUENCES, length=LENGTH, pad_id=0)
    places = place_answers(answers, shape)
    return fill(answers, places, shape, {}), places


def places_of(replica: Replica, answers: Sequence[AnswerPlace], batch: int) -> list[tuple[Label, AnswerPlace]]:
    """Returns this rank's layers and answers of a batch, found from the first sequence of each micro-batch."""
    schedule, found = replica.schedule, []
    for direction in range(schedule.num_directions):
        for micro_batch in schedule.micro_batches_of(direction):
            row = replica.first_sequence(direction, micro_batch)
            for stage, rank in enumerate(schedule.placement[direction]):
                if rank == replica.world.pipeline_index:
                    layers = [layer for layer in replica.cut[stage] if layer >= MODEL.num_dense_layers]
                    found += [
                        (Label(layer, direction, micro_batch), answer)
                        for layer in layers
                        for answer in answers
                        if (answer.batch, answer.row) == (batch, row)
                    ]
    return found


def count_flips(ids: Mapping[Label, Tensor], known: Known, places: Sequence[tuple[Label, AnswerPlace]]) -> list[int]:
    """Returns how many choices of tokens were compared with the sampler's, and how many differ."""
    checked = flips = 0
    for label, answer in places:
        used_TK = ids[label].sort(-1).values.tolist()
        for sample, first, count in answer.records():
            expected = known[RouteKey(answer.prompt, sample, label.layer)]
            pairs = zip(used_TK[first : first + count], expected, strict=True)
            flips += sum(used != chosen for used, chosen in pairs)
            checked += count
    return [checked, flips]


def run(rank: int, world_size: int, folder: Path, layouts: Sequence[Layout], known: Known) -> list[Replayed]:
    """Samples, exchanges and replays under each layout. The last one reads what the first one wrote."""
    return [
        replay(training_config(layout, folder), folder, known, number, number == len(layouts) - 1)
        for number, layout in enumerate(layouts)
    ]


def replay(config: TrainConfig, folder: Path, known: Known, number: int, reads: bool) -> Replayed:
    with opened(config) as (replica, pipeline):
        made = PipelinedEngine(pipeline, speculative=True).generate(PROMPTS, REQUEST)
        sampled, reread = made.routes, not reads
        assert sampled is not None
        if number == 0:
            write_routes(folder, STEP, replica.world.files, sampled, "here")
        if reads:
            read = read_routes(folder, STEP, replica.world.files, held_keys(replica, made.rollouts), "here")
            reread, sampled = sorted_ids(read) == sorted_ids(sampled), read
        batches, answers = pack(made.rollouts)
        assert len(batches) > 1
        homes = assign_homes(replica, [[prompt.number for prompt in PROMPTS]])
        trained = exchange_routes(replica, sampled, homes, answers)
        found = Replayed({}, {}, trained.num_bytes, needed_bytes(replica, answers, len(batches)), reread, True)
        passes(replica, config, batches, answers, trained, known, found, ("free", "replayed"))
        generator = torch.Generator().manual_seed(5)
        for _, gate in sorted(routers(replica.model).items()):
            gate.weight.data *= 1 + 1e-2 * torch.randn(gate.weight.shape, generator=generator, dtype=gate.weight.dtype)
        passes(replica, config, batches, answers, trained, known, found, ("perturbed", "replayed and perturbed"))
    return found


def needed_bytes(replica: Replica, answers: Sequence[AnswerPlace], num_batches: int) -> int:
    """Returns the bytes of the records of this rank's training, in which a prompt is once for each direction."""
    needed = {
        (label.layer, label.direction, answer.prompt, sample): count
        for batch in range(num_batches)
        for label, answer in places_of(replica, answers, batch)
        for sample, _, count in answer.records()
    }
    # Two directions that share a layer on one rank need a prompt once.
    unique = {(layer, prompt, sample): count for (layer, _, prompt, sample), count in needed.items()}
    return MANY_EXPERTS.num_experts_per_token * sum(unique.values())


def passes(
    replica: Replica,
    config: TrainConfig,
    batches: list[Batch],
    answers: Sequence[AnswerPlace],
    trained: TrainedRoutes,
    known: Known,
    found: Replayed,
    names: tuple[str, str],
) -> None:
    """Runs forward passes of all batches without and with replay, and compares choices and losses."""
    task, sizes = task_of(config), config.batch_sizes
    for name, is_replayed in zip(names, (False, True), strict=True):
        found.checked[name] = found.flips[name] = 0
        for batch, content in enumerate(batches):
            sums, spy = LossSums(task.names), Spy(trained.of_batch(batch) if is_replayed else None)
            reader = BatchReader(replica, task, content.sequences)
            objective = task.objective(reader.count(), rates_of(config.task, config.optim, sizes, 0))
            replica.forward(reader, objective, sums, spy)
            checked, flips = count_flips(spy.ids, known, places_of(replica, answers, batch))
            found.checked[name] += checked
            found.flips[name] += flips
            if is_replayed:
                continue
            again = LossSums(task.names)
            replica.forward(reader, objective, again, ReplayedRoutes(spy.ids))
            found.repeats &= torch.equal(sums.settle(), again.settle())


@pytest.mark.slow
def test_training_uses_the_experts_of_the_sampler(tmp_path: Path) -> None:
    known = sorted_ids(local(REQUEST, speculative=True, config=MANY_EXPERTS).routes)
    seen = run_ranks(4, run, tmp_path, LAYOUTS, known)
    for number, layout in enumerate(LAYOUTS):
        ranks = [found[number] for found in seen]
        for rank, found in enumerate(ranks):
            place = (rank, layout)
            assert found.flips["replayed"] == found.flips["replayed and perturbed"] == 0, place
            assert found.flips["free"] == 0, place  # float64: both choose the same
            assert found.bytes_held == found.bytes_needed, place
            assert found.reread, place
            assert found.repeats, place
        assert sum(found.checked["free"] for found in ranks) > 0, layout
        flipped = sum(found.flips["perturbed"] for found in ranks) / sum(found.checked["perturbed"] for found in ranks)
        assert flipped > 0.01, (layout, flipped)


def answer_at(start: int) -> AnswerPlace:
    return AnswerPlace(prompt=4, sample=1, prompt_tokens=2, answer_tokens=3, batch=0, row=0, start=start)


def some_ids(num_tokens: int, experts: Sequence[int] = (3, 1, 0, 7)) -> NDArray[np.generic]:
    return np.tile(np.array(experts, dtype=np.uint8), (num_tokens, 1))


RECORDS = {RouteKey(4, PROMPT_SAMPLE, 1): some_ids(2), RouteKey(4, 1, 1): some_ids(2, (5, 2, 6, 4))}


def route(ids: Mapping[RouteKey, NDArray[np.generic]], start: int = 3, layer: int = 1) -> Routing:
    """Routes a micro-batch of one sequence of 9 tokens."""
    gate = Router(MODEL, torch.float64)
    logits_BTE = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    routes = BatchRoutes(ids, {(0, 0): [(0, answer_at(start))]}, MODEL)
    return routes.route(Label(layer, 0, 0), gate, logits_BTE)


def test_tokens_without_record_and_mtp_modules_are_free() -> None:
    free = route({}, layer=MODEL.num_layers).ids_TK
    ids_TK = route(RECORDS).ids_TK
    assert ids_TK[3:7].tolist() == [[3, 1, 0, 7], [3, 1, 0, 7], [5, 2, 6, 4], [5, 2, 6, 4]]
    # The last token of the answer, which the sampler did not read, is token 7.
    assert torch.equal(ids_TK[[0, 1, 2, 7, 8]], free[[0, 1, 2, 7, 8]])


@pytest.mark.parametrize(
    ("changed", "start", "layer", "said"),
    [
        ({}, 3, 2, "prompt 4, sample -1, layer 2: no experts are recorded"),
        ({RouteKey(4, 1, 1): some_ids(3)}, 3, 1, "layer 1: must have the experts of 2 tokens, has those of 3"),
        ({RouteKey(4, 1, 1): some_ids(1)}, 3, 1, "layer 1: must have the experts of 2 tokens, has those of 1"),
        ({}, 6, 1, "does not fit"),
        ({RouteKey(4, 1, 1): some_ids(2, (1, 2, 3))}, 3, 1, "does not fit"),
        (
            {RouteKey(4, 1, 1): some_ids(2, (1, 2, 3, 8))},
            3,
            1,
            "layer 1, direction 0, micro-batch 0: forced ids must be",
        ),
        ({RouteKey(4, 1, 1): some_ids(2, (1, 2, 3, 1))}, 3, 1, "different experts in 0 to 7, token 5 has"),
    ],
)
def test_wrong_records_are_refused(
    changed: Mapping[RouteKey, NDArray[np.generic]], start: int, layer: int, said: str
) -> None:
    with pytest.raises(RouteError, match=said):
        route({**RECORDS, **changed}, start, layer)


def test_missing_torn_and_changed_files_are_refused(tmp_path: Path) -> None:
    held = {key: len(ids_TK) for key, ids_TK in RECORDS.items()}
    first, second = ({key: RECORDS[key]} for key in RECORDS)
    with pytest.raises(RouteError, match="prompt 4, sample -1, layer 1: no experts are recorded"):
        read_routes(tmp_path, STEP, RankFiles(0, 3, 3), held, "here")
    write_routes(tmp_path, STEP, RankFiles(0, 3, 3), SampledRoutes(ids=first), "here")
    path = write_routes(tmp_path, STEP, RankFiles(1, 3, 3), SampledRoutes(ids=second), "here")
    for rank in (0, 1, 2):
        read = read_routes(tmp_path, STEP, RankFiles(rank, 3, 3), held, "here")
        assert all(np.array_equal(ids_TK, RECORDS[key]) for key, ids_TK in read.ids.items())
    with pytest.raises(RouteError, match="must have the experts of 9 tokens, has those of 2"):
        read_routes(tmp_path, STEP, RankFiles(0, 3, 3), dict.fromkeys(held, 9), "here")
    with pytest.raises(RouteError, match="prompt 4, sample -1, layer 1: no experts are recorded"):
        read_routes(tmp_path, STEP, RankFiles(0, 3, 3), held, "elsewhere")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\1")
    with pytest.raises(RouteError, match=r"routes-1.safetensors: 4.1.1 was changed after it was written"):
        read_routes(tmp_path, STEP, RankFiles(0, 3, 3), held, "here")
    path.write_bytes(content[:-1])
    with pytest.raises(RouteError, match=r"routes-1.safetensors: cannot be read"):
        read_routes(tmp_path, STEP, RankFiles(0, 3, 3), held, "here")
