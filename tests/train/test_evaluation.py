"""Evaluation on a pipeline, losses by position and by source: every layout gives those of one process."""

import json
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from data.loader import IGNORE, Loader
from data.mix.manifest import Manifest, MixSource
from data.mix.mixture import Mixture, hold_out
from data.pack import count_token_bytes
from data.shards.open import Prepared
from data.tokenizer import Tokenizer
from dualpipe.registry import ScheduleConfig
from infer.engines.local import LocalModel
from infer.protocol import TargetScores, TargetSequence
from model.config import ModelConfig
from model.objective import MicroBatch
from model.transformer import Transformer, initialize_weights, named_tensors
from tests.ranks import run_ranks
from tests.tiny import MODEL, tiny_config, write_text
from tests.train.job import close_job, configured_schedule, make_world, open_job, score_pass
from train.config import TrainConfig
from train.core.by_source import SourceMeans, ValidationBySource
from train.core.replica import open_replica
from train.core.step import Losses, accumulate, rates_of
from train.core.world import ReplicaConfig
from train.files.json_lines import JsonLines
from train.listeners.evaluation import PipelinedModel
from train.listeners.validation import LossByPosition, Measures, Validation, open_by_source, validate
from train.predict.cut import run_cut
from train.records.reporter import corpus_lines
from train.start.corpus import prepare_corpus


def sequences() -> list[TargetSequence]:
    """Returns sequences of many lengths, more than one pass holds."""
    chance = random.Random(7)
    found = []
    for _ in range(41):
        tokens = tuple(chance.randrange(MODEL.vocab_size) for _ in range(chance.randint(2, 40)))
        found.append(TargetSequence(tokens=tokens, num_targets=chance.randint(1, len(tokens) - 1)))
    return found


def fill(model: Transformer) -> None:
    """Sets weights that depend only on their names."""
    initialize_weights(model, 11)
    for name, tensor in named_tensors(model).items():
        if name.endswith("e_score_correction_bias"):
            tensor.copy_(torch.linspace(0, 0.2, tensor.numel()))


def score(rank: int, world_size: int, folder: Path, layouts: list[ParallelismConfig]) -> list[list[TargetScores]]:
    found = []
    for layout in layouts:
        base, kind = tiny_config(folder), "dualpipe" if layout.pipeline > 1 else "1f1b"
        config: TrainConfig = replace(
            base,
            parallelism=layout,
            schedule=ScheduleConfig(kind=kind, chunks=None, pairing="sequential"),
        )
        schedule = configured_schedule(config)
        world = make_world(config, schedule)
        replica = open_replica(world, ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement))
        fill(replica.network)
        for batch_size in (1, 3):
            model = PipelinedModel(replica, batch_size, lambda: pytest.fail("nothing is generated"))
            found.append(model.score(sequences()))
        replica.close()
        world.close()
    return found


def local_scores(model: ModelConfig) -> list[TargetScores]:
    whole = Transformer(replace(model, mtp_depth=0), LocalDispatcher(model.num_routed_experts), torch.float64)
    fill(whole)
    return LocalModel(whole, 5).score(sequences())


def layout(pipeline: int, data: int, expert: int, context: int = 1) -> ParallelismConfig:
    base = tiny_config(Path()).parallelism
    return replace(base, pipeline=pipeline, data=data, expert=expert, context=context)


@pytest.mark.parametrize(
    ("world_size", "layouts"),
    [
        pytest.param(4, [layout(2, 2, 2)], id="4", marks=pytest.mark.slow),
        pytest.param(4, [layout(2, 1, 1, 2), layout(1, 4, 2)], id="4 more", marks=pytest.mark.long),
    ],
)
def test_scores_are_those_of_one_process(world_size: int, layouts: list[ParallelismConfig], tmp_path: Path) -> None:
    expected = local_scores(tiny_config(tmp_path).model)
    for rank, results in enumerate(run_ranks(world_size, score, tmp_path, layouts)):
        for number, found in enumerate(results):
            for at, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert mine.log_probs == pytest.approx(theirs.log_probs, abs=1e-9), (rank, number, at)
                assert mine.are_greedy == theirs.are_greedy, (rank, number, at)


FIRST_RANGE, BASE = 4, 10

RANGES = ("0-3", "4-7", "8-15", "16-31")

NUM_SEQUENCES = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("by_position")
    write_text(folder)
    config = tiny_config(folder)
    data = replace(config.data, validation_fraction=0.5)
    return replace(config, data=data)


def mixed(config: TrainConfig) -> Prepared:
    """Returns the corpus as one of two sources, of which the first is the smaller one."""
    prepared = prepare_corpus(config)
    train, held_out = (
        (len(tokens) // 3, len(tokens) - len(tokens) // 3)
        for tokens in (prepared.train.tokens_NL, prepared.validation.tokens_NL)
    )
    sources = (MixSource(name="few", paths=(), weight=0.4), MixSource(name="many", paths=(), weight=0.6))
    order = Mixture(
        Manifest(sources=sources),
        dict(zip(("few", "many"), train, strict=True)),
        config.batch.sequence_length_tokens,
        3,
    )
    return replace(prepared, order=order, held_out=hold_out(held_out, 3), is_mixture=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """A validation, the losses of a step, and the log-probabilities of its main targets, BT."""

    validation: Validation
    step: Losses
    log_probs_BT: torch.Tensor


def measure(rank: int, world_size: int, config: TrainConfig) -> Measured:
    """Validates the initial weights on one rank of a job, and runs the passes of a step."""
    learner, prepared = open_job(config), mixed(config)
    loader = Loader(prepared, sizes=config.batch_sizes)
    by_position = LossByPosition(config.batch.sequence_length_tokens, BASE, prepared.tokenizer, FIRST_RANGE)
    sums = open_by_source(config, prepared, learner.world.device)
    assert sums is not None
    measures = Measures(by_position, ValidationBySource(config, sums))
    validation = validate(learner.replica, config.task, loader, NUM_SEQUENCES, measures=measures)
    _, log_probs_BT = score_pass(learner, config, loader)
    rates = rates_of(config.task, config.optim, loader.sizes, 0)
    step = accumulate(learner, config.task, learner.hook.prepare(loader, 0), rates, by_source=sums).losses
    close_job(learner)
    return Measured(validation, step, log_probs_BT)


@pytest.mark.slow
def test_every_layout_has_the_same_means_and_they_are_those_of_the_tokens(config: TrainConfig) -> None:
    """The mean of all ranges is the validation loss."""
    only = run_ranks(1, measure, config)[0]
    alone = only.validation
    schedules = [
        ScheduleConfig(kind=kind, chunks=None, pairing="overlapped", slices=slices, slice_by="length")
        for kind, slices in (("dualpipe", 1), ("dualpipe_split", 2))
    ]
    meshes = ({"pipeline": 2, "data": 2, "expert": 2}, {"pipeline": 2, "context": 2, "expert": 2})
    wide = [
        replace(config, parallelism=replace(config.parallelism, **mesh), schedule=schedule)  # type: ignore[arg-type]
        for mesh, schedule in zip(meshes, schedules, strict=True)
    ]
    assert alone.by_position is not None
    assert list(alone.by_position.losses) == list(RANGES)
    for other in (other for each in wide for other in run_ranks(4, measure, each)):
        found = other.validation
        assert found.by_position is not None
        assert found.by_position.losses == pytest.approx(alone.by_position.losses, rel=1e-10)
        assert found.by_position.bits_per_byte == pytest.approx(alone.by_position.bits_per_byte, rel=1e-10)
        assert_same_by_source(found.by_source, alone.by_source)
        assert_same_by_source(other.step.by_source, only.step.by_source)
    counts = count_targets(config)
    total = sum(alone.by_position.losses[name] * count for name, count in counts.items())
    assert total / sum(counts.values()) == pytest.approx(alone.loss, rel=1e-10)
    check_by_source(config, only)


def assert_same_by_source(found: SourceMeans | None, expected: SourceMeans | None) -> None:
    assert found is not None
    assert expected is not None
    assert found.losses == pytest.approx(expected.losses, rel=1e-10)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-10)
    assert found.loads == expected.loads


def check_by_source(config: TrainConfig, measured: Measured) -> None:
    """Compares a step's means by source with its tokens, one after the other, and their sum with its loss."""
    prepared = mixed(config)
    loader = Loader(prepared, sizes=config.batch_sizes)
    batch = loader.batch(0, 0, config.batch.global_sequences)
    token_bytes = count_token_bytes(prepared.tokenizer)
    sums = {name: [0.0, 0, 0] for name in prepared.order.names}
    rows = zip(loader.sample_ids(0), batch.targets(1).tolist(), measured.log_probs_BT.tolist(), strict=True)
    for sample, targets, log_probs in rows:
        of_source = sums["few" if sample < prepared.order.sequences[0] else "many"]
        for target, log_prob in zip(targets, log_probs, strict=True):
            if target != IGNORE:
                of_source[0] -= log_prob
                of_source[1] += 1
                of_source[2] += int(token_bytes[target])
    found = measured.step.by_source
    assert found is not None
    assert found.losses == pytest.approx({name: nats / tokens for name, (nats, tokens, _) in sums.items()}, rel=1e-10)
    bits = {name: nats / math.log(2) / num_bytes for name, (nats, _, num_bytes) in sums.items()}
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-10)
    total = sum(found.losses[name] * tokens for name, (_, tokens, _) in sums.items())
    assert total / sum(tokens for _, tokens, _ in sums.values()) == pytest.approx(measured.step.main, rel=1e-10)
    assert found.record() == {"loss_by_source": found.losses, "bits_per_byte_by_source": found.bits_per_byte}
    validated = measured.validation.by_source
    assert validated is not None
    assert list(validated.record()) == ["loss_by_source", "bits_per_byte_by_source", "largest_load_by_source"]


def count_targets(config: TrainConfig) -> Counter[str]:
    """Counts the targets of each range, token by token."""
    loader = Loader(mixed(config), sizes=config.batch_sizes)
    batch = loader.validation_batch(0, NUM_SEQUENCES)
    counts = Counter[str]()
    for row, targets in zip(batch.positions_BT.tolist(), batch.targets(1).tolist(), strict=True):
        for position, target in zip(row, targets, strict=True):
            if target != IGNORE:
                counts[next(name for name in RANGES if position + 1 <= int(name.split("-")[1]))] += 1
    return counts


def test_default_ranges_begin_at_128_and_double() -> None:
    tokenizer = Tokenizer.train(["some text"], 320)
    measured = LossByPosition(1025, 128, tokenizer)
    tokens = torch.zeros(1, 1025, dtype=torch.int64)
    batch = MicroBatch(inputs_BT=(tokens,), targets_BT=(tokens,), extras={"positions": torch.arange(1025)[None] - 1})
    measured.add(batch, torch.full((1, 1025), -1.0))
    found = measured.means(OneRank())  # type: ignore[arg-type]
    assert found.losses == dict.fromkeys(["0-127", "128-255", "256-511", "512-1023", "1024-2047"], 1.0)
    assert found.record() == {"loss_by_position": found.losses}


class OneRank:
    """A world in which sums are complete."""

    def reduce(self, values: torch.Tensor, what: str) -> torch.Tensor:
        return values


def test_bytes_of_tokens_add_up_to_those_of_the_text() -> None:
    """Also for characters of several bytes, which byte-level tokens split."""
    tokenizer = Tokenizer.train(["naïve café, 中文"] * 3, 300)
    counts = count_token_bytes(tokenizer)
    for text in ("naïve café", "中文字符", "plain text\n  with spaces", "\u00a0x"):
        assert counts[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))
    assert counts[[tokenizer.special.eos, tokenizer.special.pad]].sum() == 0


def test_validation_part_below_a_batch_is_read_whole_and_said(tmp_path: Path) -> None:
    write_text(tmp_path, 20)
    config = tiny_config(tmp_path)
    batch, validation = replace(config.batch, global_sequences=512), replace(config.validation, sequences=512)
    prepared = prepare_corpus(replace(config, batch=batch, validation=validation))
    found = len(prepared.validation.tokens_NL)
    assert 0 < found < 512
    lines = list(corpus_lines(replace(config, batch=batch, validation=validation), prepared))
    assert f"validation: reads {found} of validation.sequences=512, because the held-out part has only {found}" in lines
    whole = replace(config.validation, sequences=found)
    assert not any("validation: " in line for line in corpus_lines(replace(config, validation=whole), prepared))


def test_resumed_run_removes_later_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first_step, steps in ((0, range(1, 7)), (4, range(5, 9))):
        lines = JsonLines(path, first_step)
        for step in steps:
            lines.record({"step": step, "after": first_step})
        lines.close()
        if first_step == 0:
            with path.open("a") as file:
                file.write('{"step": 7, "cut of')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    assert [record["after"] for record in records] == [0] * 4 + [4] * 4
