"""Rewards of models on many ranks: scores of separate answers, and rules, a judge and a model together."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from numpy.random import Generator, Philox
from torch import distributed as dist

from base.decode import decode
from base.refusal import ConfigError
from comm.config import ParallelismConfig
from comm.dispatch.local import LocalDispatcher
from data.arithmetic import arithmetic_tokenizer
from data.chat.templates import CHAT_TEMPLATES
from dualpipe.registry import ScheduleConfig
from evaluation.judge import JUDGE_SEED
from infer.config import Sampling, Statistics
from infer.engines.local import LocalEngine
from infer.protocol import Group, NumberedPrompt, Request, Rollouts, Sample
from infer.reward import score_answers
from model.config import ModelConfig
from model.transformer import SCORE, Transformer, initialize_weights, named_tensors
from score.reward import RewardConfig, score_judged
from score.score import Problem, ScoringError
from score.scorers import JudgeConfig, RewardModelScorerConfig
from tests.covering import exhaustive
from tests.launch.checkpoints import write_checkpoint
from tests.ranks import run_ranks
from tests.rollouts import answer_of, group_of
from tests.tiny import MODEL, tiny_config
from tests.train.job import configured_schedule, make_world, opened_replica
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME, CheckpointError
from train.checkpoint.sources import check_model_parts, check_reward_model, scoring_runs
from train.config import TrainConfig
from train.core.world import weight_dtype
from train.post.sample import PromptForm
from train.post.score import (
    JudgePart,
    QuestionedModel,
    RewardModelPart,
    RolloutRewards,
    open_model_parts,
    open_reward_model,
    with_constitutions,
)

REWARD_MODEL = replace(MODEL, hidden_size=24, num_heads=3, mtp_depth=0, head="score", initializer_range=0.4)

LENGTH = 24

LAYOUTS_OF_TWO = [(2, 1, 1, "zb_v"), (1, 2, 2, "1f1b")]

LAYOUTS_OF_FOUR = [(2, 2, 2, "dualpipe")]

MORE_LAYOUTS_OF_FOUR = [(4, 1, 1, "dualpipe_split"), (2, 2, 1, "1f1b")]


def write_model(folder: Path, model: ModelConfig, *, tokenizer: bool = True) -> str:
    """Writes a model with random weights and the tokenizer of arithmetic problems."""
    made = Transformer(model, LocalDispatcher(model.num_routed_experts), torch.float64)
    initialize_weights(made, 11)
    named = named_tensors(made)
    if SCORE in named:
        named[SCORE].copy_(torch.linspace(-0.4, 0.4, model.hidden_size))
    written = write_checkpoint(folder, made, tokenizer=False)
    if tokenizer:
        arithmetic_tokenizer().save(written / TOKENIZER_NAME)
    return str(folder)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("reward_model"), REWARD_MODEL)


def part(ckpt: str, place: str = "pipeline") -> RewardModelScorerConfig:
    return RewardModelScorerConfig(kind="reward_model", weight=1.0, ckpt=ckpt, place=place, batch_size=7)  # type: ignore[arg-type]


def run_config(folder: Path, pipeline: int = 1, data: int = 1, expert: int = 1, kind: str = "1f1b") -> TrainConfig:
    config = tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=expert),
        schedule=ScheduleConfig(kind=kind, chunks=None, pairing="overlapped"),
    )
    return replace(
        config, batch=replace(config.batch, document_mask=True, global_sequences=8, sequence_length_tokens=LENGTH)
    )


def draw_answers(count: int) -> list[tuple[int, ...]]:
    """Returns prompts with answers of all lengths, of which some are equal, and some have an end token inside."""
    generator = Generator(Philox(4))
    made = [tuple(generator.integers(1, 300, 1 + number % LENGTH).tolist()) for number in range(count)]
    return [*made, made[5], made[30]]


def layout_scores(
    rank: int, world_size: int, jobs: list[tuple[TrainConfig, RewardModelScorerConfig]], answers: list[tuple[int, ...]]
) -> list[list[float]]:
    """Returns the scores of all jobs, and checks that an empty rollout has none."""
    found = []
    for config, scorer in jobs:
        with opened_replica(config) as policy:
            model = open_reward_model(config, scorer, policy, arithmetic_tokenizer())
            assert model.longest == {"pipeline": LENGTH, "first_rank": REWARD_MODEL.max_position_tokens}[scorer.place]
            found.append(model.rate(answers))
            assert model.rate([]) == []
            dist.barrier()
            model.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layouts", [LAYOUTS_OF_TWO, LAYOUTS_OF_FOUR, *exhaustive(MORE_LAYOUTS_OF_FOUR)])
def test_scores_in_a_pipeline_are_those_of_separate_answers(
    tmp_path: Path, ckpt: str, layouts: Sequence[tuple[int, int, int, str]]
) -> None:
    """70 answers of 1 to 24 tokens need several passes of 8 rows."""
    answers = draw_answers(70)
    model = load_whole(REWARD_MODEL, locate(ckpt).folder, torch.float64)
    expected = score_answers(model, answers, 1)
    assert max(expected) - min(expected) > 1
    jobs = [(run_config(tmp_path, *layout), part(ckpt)) for layout in layouts]
    jobs.append((run_config(tmp_path, *layouts[0]), part(ckpt, "first_rank")))
    for rank, scores in enumerate(run_ranks(layouts[0][0] * layouts[0][1], layout_scores, jobs, answers)):
        for (config, _), found in zip(jobs, scores, strict=True):
            assert found == pytest.approx(expected, abs=1e-12), f"rank {rank}, {config.schedule.kind}"


def test_weights_that_cannot_score_are_refused_before_the_run(tmp_path: Path, ckpt: str) -> None:
    config = run_config(tmp_path)
    check_reward_model(config, part(ckpt))
    policy, narrow = write_model(tmp_path / "policy", MODEL), replace(REWARD_MODEL, vocab_size=30)
    other = write_model(tmp_path / "narrow", narrow)
    rule = "reward.parts, kind reward_model: ckpt: must be a reward model, which has a head for scores, .* tokens"
    with pytest.raises(ConfigError, match=rule):
        check_reward_model(config, part(policy))
    for place in ("pipeline", "first_rank"):
        with pytest.raises(ConfigError, match=r"must have the vocabulary of the model, 320 tokens, .* has 30"):
            check_reward_model(config, part(other, place))
    with pytest.raises(CheckpointError, match=r"reward\.parts, kind reward_model: ckpt"):
        check_reward_model(config, part(str(tmp_path / "none")))
    deep = run_config(tmp_path, 8)
    with pytest.raises(ConfigError, match="must have at least 8 layers"):
        check_reward_model(deep, part(ckpt))
    check_reward_model(deep, part(ckpt, "first_rank"))


def open_with_other_tokenizer(rank: int, world_size: int, config: TrainConfig, ckpt: str) -> str:
    with opened_replica(config) as policy, pytest.raises(CheckpointError) as refused:
        open_reward_model(config, part(ckpt), policy, arithmetic_tokenizer())
    return str(refused.value)


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "other"
    made = Transformer(REWARD_MODEL, LocalDispatcher(8), torch.float64)
    initialize_weights(made, 1)
    write_checkpoint(folder, made)
    (said,) = run_ranks(1, open_with_other_tokenizer, run_config(tmp_path), str(folder))
    assert said.startswith("reward.parts, kind reward_model: ckpt: must have the tokenizer of this run's data")


JUDGE = {
    "kind": "judge",
    "weight": 2.0,
    "weights": "policy",
    "form": "single",
    "samples": 2,
    "constitution": "0",
    "constitution_path": None,
    "question": "{constitution}={prompt}={answer}=",
    "mark": "",
    "accept": "1",
    "reject": "2",
    "thinking": False,
    "max_new_tokens": 4,
    "temperature": 1.0,
}

EXACT = {"kind": "exact", "weight": 0, "boxed": False, "ignore_case": False}

PLURALITY = {"kind": "plurality", "weight": 1, "boxed": False, "ignore_case": False, "quorum": 0.5, "ties": "drop"}

TOKENIZER = arithmetic_tokenizer()

FORM = PromptForm(template=CHAT_TEMPLATES.get("v3"), tokenizer=TOKENIZER, thinking=False)

ANSWERS = (("12", "12", "21"), ("9", "8", "9"), ("1" * 24, "3", "3"))


class ScriptedJudge:
    """An engine that approves answers that begin with 1 or 3, and gives no verdict on 8."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        self.asked.append(request)
        made = []
        for prompt in prompts:
            answer = TOKENIZER.decode(prompt.tokens).split("=")[2]
            says = "?" if answer.startswith("8") else "1" if answer[0] in "13" else "2"
            tokens = (*TOKENIZER.encode(says), TOKENIZER.special.eos)
            made += [
                Sample(prompt=prompt.number, sample=sample, tokens=tokens, log_probs=(0.0, 0.0), finish="stop")
                for sample in range(request.samples)
            ]
        return Rollouts(rollouts=tuple(made), statistics=Statistics())


def sampled_groups() -> list[Group]:
    """Answers to three problems; one answer is longer than the reward model reads."""
    end = TOKENIZER.special.eos
    return [
        group_of(
            *(
                answer_of(sample, (*TOKENIZER.encode(text), end), prompt=40 + number, text=text)
                for sample, text in enumerate(texts)
            ),
            number=40 + number,
            tokens=(0, 5, 6 + number),
            problem=Problem(prompt="21", answer=texts[-1]),
        )
        for number, texts in enumerate(ANSWERS)
    ]


def reward_config(*parts: dict[str, object]) -> RewardConfig:
    return decode(RewardConfig, {"parts": list(parts), "num_threads": 2})


def score_on_rank(
    rank: int, world_size: int, config: TrainConfig, rewards: list[RewardConfig]
) -> tuple[list[list[Group]], list[Request]]:
    """Scores the groups with each reward. Returns the sheets, and what the judge was asked."""
    judge, groups = ScriptedJudge(), []
    with opened_replica(config) as policy:
        for each in rewards:
            reward = with_constitutions(each, policy.world)
            parts = open_model_parts(replace(config, reward=reward), policy, None, judge, FORM)
            opened = RolloutRewards(reward, policy.world, parts)
            first, second = opened.begin(sampled_groups(), 7), opened.begin(sampled_groups(), 8)
            groups.append(first.wait())
            assert second.wait() == groups[-1]
            dist.barrier()
            opened.close()
    return groups, judge.asked


@pytest.mark.slow
def test_all_ranks_have_the_scores_of_rules_judge_and_reward_model(tmp_path: Path) -> None:
    ckpt = write_model(tmp_path / "rm", REWARD_MODEL)
    scorer = {"kind": "reward_model", "weight": 0.5, "ckpt": ckpt, "place": "pipeline", "batch_size": 4}
    rewards = [
        reward_config(JUDGE, EXACT, PLURALITY),
        reward_config(scorer),
        reward_config(PLURALITY),
        reward_config(EXACT, JUDGE, JUDGE),
    ]
    config = run_config(tmp_path, 2, 1, 1, "dualpipe_split")
    results = run_ranks(2, score_on_rank, config, rewards)
    assert results[0] == results[1]
    (judged, modelled, voted, _), asked = results[0]
    # Judge and plurality; exact has weight 0 but its outcome shows.
    totals = [[answer.sheet.total for answer in group.answers] for group in judged]
    assert totals == [[3.0, 3.0, 0.0], [1.0, 0.0, 1.0], [2.0, 3.0, 3.0]]
    assert [list(answer.sheet.parts) for answer in judged[0].answers] == [["judge", "exact", "plurality"]] * 3
    assert [group.dropped for group in judged] == ["", "no verdict: unknown", ""]
    assert [answer.sheet.outcome for answer in judged[0].answers] == ["wrong", "wrong", "correct"]
    # Each judge of a reward has its own random numbers.
    seeds = [(each.step, each.sampling.seed - config.seed) for each in asked]
    assert seeds[:2] == [(7, JUDGE_SEED), (8, JUDGE_SEED)]
    assert len(set(seeds[2:])) == 4
    assert {7, 8} == {step for step, _ in seeds[2:]}
    # The reward model reads token ids up to the end of each answer; one answer is too long for it.
    model = load_whole(REWARD_MODEL, locate(ckpt).folder, weight_dtype(config.precision))
    sequences = [[(*group.tokens, *each.tokens) for each in group.answers] for group in sampled_groups()]
    for group, given in zip(modelled[:2], sequences, strict=False):
        found = [answer.sheet.parts["reward_model"].value for answer in group.answers]
        assert found == pytest.approx(score_answers(model, given), abs=1e-12)
        assert [answer.sheet.total for answer in group.answers] == [value / 2 for value in found]
    assert [group.dropped for group in modelled] == ["", "", "no verdict: unknown"]
    assert [group.dropped for group in voted] == [""] * 3


class CountingModel(RewardModelPart):
    """A reward model that scores a sequence by its tokens, as text."""

    def rate(self, sequences: Sequence[tuple[int, ...]]) -> list[float]:
        return [float(TOKENIZER.decode(tokens, skip_special_tokens=True).replace("=", "")) for tokens in sequences]


def test_a_reward_model_compares_with_the_expected_answer_where_there_is_one() -> None:
    part = QuestionedModel(CountingModel(longest=60), "{prompt}={expected}=", FORM)
    groups = [replace(group, answers=group.answers[:1]) for group in sampled_groups()]
    groups[1] = replace(groups[1], problem=Problem(prompt="7"))
    config = RewardModelScorerConfig(
        kind="reward_model", weight=1, ckpt="", place="first_rank", batch_size=1, question=part.question
    )
    scored = score_judged(config, groups, partial(part.score, step=1))
    expected = [float(f"21{group.problem.answer}{group.answers[0].text}") for group in groups[::2]]
    assert [scores[0].value for scores in scored[::2]] == expected
    assert scored[1][0].outcome == "skipped"
    with pytest.raises(ScoringError, match=r"kind reward_model: question must contain \{prompt\}, is"):
        replace(config, question="{expected}")


def continue_as_judge(
    rank: int, world_size: int, config: TrainConfig, reward: RewardConfig, prompts: list[NumberedPrompt]
) -> list[tuple[int, ...]]:
    """Returns what the engine of a judge with separate weights writes, and closes it."""
    with opened_replica(config) as policy:
        parts = open_model_parts(replace(config, reward=reward), policy, None, ScriptedJudge(), FORM)
        judge = parts["judge"]
        assert isinstance(judge, JudgePart)
        made = judge.engine.generate(prompts, Request(samples=1, max_new_tokens=4, sampling=Sampling()))
        dist.barrier()
        judge.close()
    return [sample.tokens for sample in made.rollouts]


def test_a_judge_may_be_another_model(tmp_path: Path) -> None:
    """Two ranks hold the judge under the policy's schedule; it continues prompts as the whole model does."""
    ckpt = write_model(tmp_path / "judge", MODEL)
    reward = reward_config({**JUDGE, "weights": ckpt})
    config = replace(run_config(tmp_path, 2, 1, 1, "dualpipe_split"), reward=reward)
    check_model_parts(config)
    assert len(scoring_runs(config)) == 1
    prompts = [NumberedPrompt(number=number, tokens=(0, 5, 6 + number)) for number in range(3)]
    model = load_whole(replace(MODEL, mtp_depth=0), locate(ckpt).folder, weight_dtype(config.precision))
    made = LocalEngine(model).generate(prompts, Request(samples=1, max_new_tokens=4, sampling=Sampling()))
    expected = [sample.tokens for sample in made.rollouts]
    assert run_ranks(2, continue_as_judge, config, reward, prompts) == [expected] * 2


def test_weights_that_cannot_judge_are_refused_before_the_run(tmp_path: Path, ckpt: str) -> None:
    config = run_config(tmp_path)
    own = write_model(tmp_path / "judge", MODEL)
    for changes, rule in (
        ({"weights": ckpt}, "must be policy, reference, or weights with a head for tokens, .* is a reward model"),
        ({"weights": str(tmp_path / "none")}, "^reward.parts, kind judge: weights: .*none"),
        ({"weights": own, "max_new_tokens": 4096}, "max_new_tokens must be below the .* positions of"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=rule):
            check_model_parts(replace(config, reward=reward_config({**JUDGE, **changes})))


def read_constitution_on_rank(rank: int, world_size: int, folder: Path, config: TrainConfig) -> tuple[str, str]:
    """Returns the text of a constitution that only rank 0 can read, and the error of a missing one."""
    world = make_world(config, configured_schedule(config))
    path = folder / ("principles.txt" if rank == 0 else "none.txt")
    reward = with_constitutions(reward_config({**JUDGE, "constitution_path": str(path)}), world)
    (judge,) = reward.parts
    assert isinstance(judge, JudgeConfig)
    said = ""
    try:
        with_constitutions(reward_config({**JUDGE, "constitution_path": str(folder / "none.txt")}), world)
    except ScoringError as error:
        said = str(error)
    world.close()
    return judge.constitution, said


def test_rank_0_reads_the_constitution_for_all(tmp_path: Path) -> None:
    (tmp_path / "principles.txt").write_text("Be fair.\n", "utf-8")
    for text, said in run_ranks(2, read_constitution_on_rank, tmp_path, run_config(tmp_path, 2)):
        assert text == "Be fair."
        assert "constitution_path must be a text file" in said
