"""Steps that learn from sampled answers: many ranks equal one, and passes over packed answers are exact."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox
from torch import distributed as dist

from data.loader import Batch, Loader
from data.pack import WEIGHTS
from data.tokenizer import Tokenizer
from infer.config import Sampling, Statistics
from infer.engines.pipelined import PipelinedEngine
from infer.protocol import Group, NumberedPrompt, Request, Rollouts, Sample, SampledRoutes
from model.transformer import routers
from tests.answers import VARIANTS as REPLAYED_VARIANTS
from tests.answers import VARIANTS as VARIANTS_OF_LOSS
from tests.covering import exhaustive
from tests.marked_samples import sft_config
from tests.ranks import run_ranks
from tests.rollouts import GRPO, LOSS, REWARD, ROLLOUT, EvenConfig, answer_of, group_of, header_of, rollout_config
from tests.train.job import Job, run_jobs, task_of
from tests.train.tasks.test_distillation import TASK
from tests.train.tasks.test_policy_gradient import run_config
from tests.train.test_decoding import PROMPTS, opened, sorted_ids
from tests.train.test_equality import assert_equal
from train.config import TrainConfig
from train.post.journal import read_journal, write_journal
from train.post.pack import BatchShape, PackedStep, answer_log_probs, find_prompts, pack_step
from train.post.routes import load_rollout_routes, save_rollout_routes
from train.post.sample import RolloutRoutes, ScoredRollout, has_equal_rewards
from train.post.sampler import StudentSampler
from train.start.corpus import prepare_corpus
from verify.steps import StepValues

STEPS = 3

VARIANTS = {
    "two_updates": {"rollout": replace(ROLLOUT, updates=2), "task": replace(GRPO, reference_every_steps=2)},
    "one_ahead": {
        "rollout": replace(ROLLOUT, steps_ahead=1),
        "task": replace(GRPO, loss=replace(LOSS, ratio="sequence_mean", normalizer="answers", off_policy_limit=0.1)),
    },
}

LAYOUTS = [(2, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.long), *exhaustive(((1, 2, 1),))]


def tokens_of(groups: tuple[Group, ...]) -> list[object]:
    """Returns what must not depend on a layout."""
    return [
        (group.number, group.key, group.tokens, group.dropped, answer.tokens, answer.reward, answer.version)
        for group in groups
        for answer in group.answers
    ]


def journals(config: TrainConfig) -> list[list[object]]:
    """Returns the rollouts of a run, in order."""
    paths = sorted((Path(config.out_dir) / "rollouts").glob("*.jsonl"))
    assert paths
    return [tokens_of(read_journal(Path(config.out_dir), int(path.name[5:13])).groups) for path in paths]


def jobs(folder: Path, layout: tuple[int, int, int]) -> list[Job]:
    """Returns the run of each variant with a layout."""
    made = []
    for name, changes in VARIANTS.items():
        config = rollout_config(folder, *layout, **changes)  # type: ignore[arg-type]
        out_dir = folder / f"{name}-{'x'.join(map(str, layout))}"
        made.append(Job(config=replace(config, out_dir=str(out_dir))))
    return made


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Job], list[list[StepValues]]]:
    """One rank's results of each variant."""
    folder = tmp_path_factory.mktemp("policy")
    made = jobs(folder, (1, 1, 1))
    (seen,) = run_ranks(1, run_jobs, made, STEPS)
    return folder, made, seen


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_policy_of_many_ranks_is_that_of_one(
    layout: tuple[int, int, int], one_rank: tuple[Path, list[Job], list[list[StepValues]]]
) -> None:
    folder, alone, expected = one_rank
    made = jobs(folder, layout)
    results = run_ranks(layout[0] * layout[1], run_jobs, made, STEPS)
    for number, (job, before) in enumerate(zip(made, alone, strict=True)):
        assert journals(job.config) == journals(before.config), job.config.out_dir
        for step in range(STEPS):
            assert_equal([rank[number][step] for rank in results], expected[number][step], 1e-9)
        assert job.config.rollout is not None
        if job.config.rollout.steps_ahead:
            continue  # its ratios compare with the sampler, which rounds otherwise
        names = task_of(job.config).names
        for rank in results:
            reported = dict(zip(names, rank[number][0].losses, strict=False))
            ratios = (reported["ratio_deviation"], reported["clip_fraction"])
            assert ratios == (0.0, 0.0), f"{job.config.out_dir}: ratios must be exactly 1"


SPARSE = replace(REWARD, parts=(EvenConfig(kind="sparse", weight=1.0),))

FEW_GROUPS = replace(ROLLOUT, prompts=8, samples=3, held_out=0)

EVERY_NORMALIZER = ("cispo", "dapo", "dr_grpo", "gspo", "v3")


def sparse_jobs(folder: Path, names: Sequence[str], *, drops: bool) -> list[Job]:
    """Returns a run of each published variant in which seven of eight groups have equal rewards."""
    made = []
    for name in names:
        rollout = replace(FEW_GROUPS, drop_equal_groups=drops, updates=2 if name == "gspo" else 1)
        changes = {"task": replace(GRPO, loss=VARIANTS_OF_LOSS[name]), "rollout": rollout, "reward": SPARSE}
        config = rollout_config(folder, **changes)  # type: ignore[arg-type]
        model = replace(config.model, mtp_depth=0)
        made.append(Job(config=replace(config, model=model, out_dir=str(folder / f"{name}-{drops}"))))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("names", [EVERY_NORMALIZER, *exhaustive([sorted({*VARIANTS_OF_LOSS} - {*EVERY_NORMALIZER})])])
def test_dropped_groups_of_equal_rewards_leave_the_gradient_as_it_is_except_with_dapo(
    tmp_path: Path, names: Sequence[str]
) -> None:
    whole, dropped = (sparse_jobs(tmp_path, names, drops=drops) for drops in (False, True))
    (seen,) = run_ranks(1, run_jobs, [*whole, *dropped], 1)
    for name, job, (before,), (after,) in zip(names, dropped, seen[: len(whole)], seen[len(whole) :], strict=True):
        groups = read_journal(Path(job.config.out_dir), 1).groups
        assert sum(map(has_equal_rewards, groups)) == 7, f"{name}: of 8 groups"
        assert before.norm > 0, name
        if name == "dapo":
            assert after.norm > 1.5 * before.norm
            continue
        # Reported means are those of the trained tokens.
        main_loss = [replace(each, losses=each.losses[:1]) for each in (after, before)]
        assert_equal([main_loss[0]], main_loss[1], 1e-12)


STUDENT = replace(TASK, answers="student", cross_entropy_weight=0.0, max_new_tokens=5)


def unstable_ids(tokenizer: Tokenizer, generator: Generator) -> tuple[int, ...]:
    """Returns ids that become other ids if their text is encoded again."""
    while True:
        ids = generator.integers(0, tokenizer.vocab_size, 5).tolist()
        if tokenizer.encode(tokenizer.decode(ids)) != ids:
            return tuple(ids)


class ScriptedEngine:
    """An engine that answers with unstable ids, and keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.asked: list[tuple[Sequence[NumberedPrompt], Request]] = []
        self.made: dict[int, tuple[int, ...]] = {}
        self._tokenizer, self._generator = tokenizer, Generator(Philox(8))

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        self.asked.append((prompts, request))
        self.made = {each.number: unstable_ids(self._tokenizer, self._generator) for each in prompts}
        rollouts = [
            Sample(prompt=number, sample=0, tokens=ids, log_probs=(0.0,) * 5, finish="length")
            for number, ids in self.made.items()
        ]
        return Rollouts(rollouts=tuple(rollouts), statistics=Statistics())

    def close(self) -> None:
        pass


def pieces(batch: Batch) -> list[tuple[int, ...]]:
    """Returns the token ids of every piece of a batch, sorted."""
    found = []
    for tokens, positions in zip(batch.tokens_BT.tolist(), batch.positions_BT.tolist(), strict=True):
        starts = [at for at, position in enumerate(positions) if position == 0]
        used = sum(position >= 0 for position in positions)
        found += [tuple(tokens[start:end]) for start, end in pairwise([*starts, used])]
    return sorted(found)


def test_sampled_ids_are_trained_as_they_are(tmp_path: Path) -> None:
    """Answers whose text would be encoded otherwise reach the batch unchanged."""
    config = sft_config(tmp_path, num_samples=400)
    prepared = prepare_corpus(config)
    loader = Loader(prepared, sizes=replace(config, batch=replace(config.batch, global_sequences=24)).batch_sizes)
    engine = ScriptedEngine(prepared.tokenizer)
    sampler, num_ids = StudentSampler(engine, STUDENT, 9), 0
    for step in range(8):
        given = find_prompts(loader.batch(step, 0, 24))
        batch, metrics = sampler.sample(loader, step)
        prompts, request = engine.asked[-1]
        assert [each.number for each in prompts] == list(range(len(given)))
        assert (request.step, request.sampling.seed, request.max_new_tokens) == (step, 9, 5)
        assert request.stop == {prepared.tokenizer.special.eos}
        whole = [(prompt.tokens + engine.made[prompt.number])[:24] for prompt in prompts]
        kept = len(given) - int(metrics["left_out"])
        assert pieces(batch) == sorted(whole[:kept])
        assert (metrics["answers"], metrics["cut_share"], metrics["mean_tokens"]) == (len(given), 1.0, 5.0)
        num_ids += kept
    assert num_ids >= 200


def test_share_of_the_student_depends_on_seed_step_and_prompt_alone(tmp_path: Path) -> None:
    config = sft_config(tmp_path, num_samples=400)
    prepared = prepare_corpus(config)
    loader = Loader(prepared, sizes=replace(config, batch=replace(config.batch, global_sequences=24)).batch_sizes)

    def chosen(seed: int, step: int, share: float) -> set[int]:
        engine = ScriptedEngine(prepared.tokenizer)
        StudentSampler(engine, replace(STUDENT, student_share=share), seed).sample(loader, step)
        return {each.number for each in engine.asked[-1][0]} if engine.asked else set()

    total = sum(len(find_prompts(loader.batch(step, 0, 24))) for step in range(8))
    few, most = ([chosen(9, step, share) for step in range(8)] for share in (0.3, 0.8))
    assert few == [chosen(9, step, 0.3) for step in range(8)]
    assert all(some <= more for some, more in zip(few, most, strict=True))
    # Within four standard deviations of the binomial distribution.
    for share, sets in ((0.3, few), (0.8, most)):
        assert abs(sum(map(len, sets)) / total - share) < 4 * np.sqrt(share * (1 - share) / total)
    assert chosen(10, 0, 0.3) != few[0] != few[1]
    assert chosen(9, 0, 1e-9) == set()


def test_prompt_ends_before_the_last_run_of_targets() -> None:
    tokens = torch.arange(10, 26).view(1, 16)
    positions = torch.tensor([[*range(8), *range(4), *range(2), -1, -1]])
    # Piece 1 has two answers, piece 2 a weight at a token that predicts nothing, piece 3 a single target.
    weights = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0.5, 0, 0, 0]])
    batch = Batch(tokens_BT=tokens, positions_BT=positions, pad_id=0, extras={WEIGHTS: weights})
    found = [(prompt.number, prompt.tokens, answer.tokens) for prompt, answer in find_prompts(batch)]
    assert found == [(0, (10, 11, 12, 13, 14, 15), (16, 17)), (1, (22,), (23,))]


SHAPE = BatchShape(num_sequences=8, length=18, pad_id=0)

TEMPERATURE = 0.8

REQUEST = Request(
    samples=3,
    max_new_tokens=7,
    stop=frozenset(range(0, 320, 8)),
    sampling=Sampling(temperature=TEMPERATURE, top_k=40, top_p=0.9, seed=4),
    record_routes=True,
    record_kept=True,
)


def to_rollout(rollouts: Sequence[Sample], routes: SampledRoutes) -> ScoredRollout:
    """Returns rollouts as the rollout of a step, without rewards."""
    groups = [
        group_of(
            *(replace(each, sheet=answer_of().sheet) for each in rollouts if each.prompt == prompt.number),
            number=prompt.number,
            tokens=prompt.tokens,
        )
        for prompt in PROMPTS
    ]
    requests = (tuple(prompt.number for prompt in PROMPTS),)
    routes_of_all = RolloutRoutes(sampled=routes, requests=requests)
    return ScoredRollout(header=header_of(next_prompt=6), groups=tuple(groups), routes=routes_of_all)


def run(rank: int, world_size: int, config: TrainConfig, folder: Path) -> dict[str, float]:
    """Returns the largest difference of log-probabilities from the sampler's, by kind of pass."""
    with opened(config) as (replica, pipeline):
        made = PipelinedEngine(pipeline, speculative=True).generate(PROMPTS, REQUEST)
        assert made.routes is not None
        rollout = to_rollout(made.rollouts, made.routes)
        save_rollout_routes(replica, folder, rollout)
        if rank == 0:
            write_journal(folder, rollout, np.float64)
        dist.barrier()
        read = read_journal(folder, 1)
        assert read == rollout
        routes = load_rollout_routes(replica, folder, read)
        assert routes is not None
        assert sorted_ids(routes.sampled) == sorted_ids(made.routes)
        other = replace(read, header=replace(read.header, weights="others"))
        assert load_rollout_routes(replica, folder, other) is None
        answers = [(group, answer) for group in reversed(read.groups) for answer in group.answers]
        bare = [(group, replace(answer, kept=())) for group, answer in answers]
        with_routes = pack_step(replica, answers, 0, None, routes)
        assert len(with_routes.batch.reads) == len(with_routes.batch.routes) > 1

        def difference(packed: PackedStep, temperature: float) -> float:
            found = answer_log_probs(replica, task_of(config), packed, temperature)
            pairs = zip(found, answers, strict=True)
            return max(float(np.abs(np.subtract(ours, answer.log_probs)).max(initial=0)) for ours, (_, answer) in pairs)

        differences = {
            "replayed": difference(with_routes, TEMPERATURE),
            "free": difference(pack_step(replica, answers, 0, None, None), TEMPERATURE),
            "other temperature": difference(with_routes, 1.0),
            "all tokens": difference(pack_step(replica, bare, 0, None, routes), TEMPERATURE),
        }
        # Other biases change the choice of experts, and nothing else.
        for gate in routers(replica.model).values():
            gate.e_score_correction_bias.copy_(gate.e_score_correction_bias.flip(0) + 0.1 * gate.weight[:, 0])
        differences["replayed under other biases"] = difference(with_routes, TEMPERATURE)
        differences["free under other biases"] = difference(pack_step(replica, answers, 0, None, None), TEMPERATURE)
    return differences


@pytest.mark.slow
def test_replayed_passes_have_the_log_probs_of_the_sampler(tmp_path: Path) -> None:
    config = run_config(tmp_path, REPLAYED_VARIANTS["grpo"], (2, 1, 1, "dualpipe"))
    sizes = replace(config.batch, global_sequences=SHAPE.num_sequences, sequence_length_tokens=SHAPE.length)
    for rank, found in enumerate(run_ranks(2, run, replace(config, batch=sizes), tmp_path)):
        for name in ("replayed", "free", "replayed under other biases"):
            assert found[name] < 1e-12, (rank, name, found)
        for name in ("other temperature", "all tokens", "free under other biases"):
            assert found[name] > 1e-3, (rank, name, found)
