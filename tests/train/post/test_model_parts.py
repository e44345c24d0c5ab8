"""Rewards of a rollout on several ranks: rules on rank 0, a judge and a reward model on all."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import distributed as dist

from data.arithmetic import arithmetic_tokenizer
from data.chat.templates import CHAT_TEMPLATES
from infer.config import Statistics
from infer.protocol import Group, NumberedPrompt, Request, Rollouts, Sample
from infer.reward import score_answers
from infer.scoring.judge import JUDGE_SEED, JudgeConfig
from infer.scoring.reward import RewardConfig
from infer.scoring.score import Problem, ScoringError
from tests.ranks import run_ranks
from tests.rollouts import answer_of, group_of
from tests.train.job import configured_schedule, make_world
from tests.train.post.test_reward_model import REWARD_MODEL, run_config, write_model
from train.checkpoint.load import load_whole
from train.checkpoint.locate import locate
from train.config import TrainConfig
from train.config.decode import decode
from train.network import ReplicaConfig, weight_dtype
from train.post.sample import PromptForm
from train.post.score import RolloutRewards, open_model_parts, with_constitutions
from train.replica import open_replica
from train.schedule.cut import run_cut

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
            tokens = (*TOKENIZER.encode(says), TOKENIZER.end_of_sentence_id)
            made += [
                Sample(prompt=prompt.number, sample=sample, tokens=tokens, log_probs=(0.0, 0.0), finish="stop")
                for sample in range(request.samples)
            ]
        return Rollouts(rollouts=tuple(made), statistics=Statistics())


def sampled_groups() -> list[Group]:
    """Answers to three problems; one answer is longer than the reward model reads."""
    end = TOKENIZER.end_of_sentence_id
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
    schedule, judge, found = configured_schedule(config), ScriptedJudge(), []
    world, cut = make_world(config, schedule), run_cut(config, schedule.placement)
    policy = open_replica(world, ReplicaConfig.of_run(config), schedule, cut)
    for each in rewards:
        reward = with_constitutions(each, world)
        parts = open_model_parts(replace(config, reward=reward), policy, None, judge, FORM)
        opened = RolloutRewards(reward, world, parts)
        first, second = opened.begin(sampled_groups(), 7), opened.begin(sampled_groups(), 8)
        found.append(first.wait())
        assert second.wait() == found[-1]
        dist.barrier()
        opened.close()
    policy.close()
    world.close()
    return found, judge.asked


@pytest.mark.slow
def test_all_ranks_have_the_scores_of_rules_judge_and_reward_model(tmp_path: Path) -> None:
    ckpt = write_model(tmp_path / "rm", REWARD_MODEL)
    scorer = {"kind": "reward_model", "weight": 0.5, "ckpt": ckpt, "place": "pipeline", "batch_size": 4}
    rewards = [reward_config(JUDGE, EXACT, PLURALITY), reward_config(scorer), reward_config(PLURALITY)]
    config = run_config(tmp_path, 2, 1, 1, "dualpipe_split")
    results = run_ranks(2, score_on_rank, config, rewards)
    assert results[0] == results[1]
    (judged, modelled, voted), asked = results[0]
    # Judge and plurality; exact has weight 0 but its outcome shows.
    totals = [[answer.sheet.total for answer in group.answers] for group in judged]
    assert totals == [[3.0, 3.0, 0.0], [1.0, 0.0, 1.0], [2.0, 3.0, 3.0]]
    assert [list(answer.sheet.parts) for answer in judged[0].answers] == [["judge", "exact", "plurality"]] * 3
    assert [group.dropped for group in judged] == ["", "no verdict: unknown", ""]
    assert [answer.sheet.outcome for answer in judged[0].answers] == ["wrong", "wrong", "correct"]
    assert {(each.step, each.sampling.seed - config.seed) for each in asked} == {(7, JUDGE_SEED), (8, JUDGE_SEED)}
    # The reward model reads token ids up to the end of each answer; one answer is too long for it.
    model = load_whole(REWARD_MODEL, locate(ckpt).folder, weight_dtype(config.precision))
    sequences = [[(*group.tokens, *each.tokens) for each in group.answers] for group in sampled_groups()]
    for group, given in zip(modelled[:2], sequences, strict=False):
        found = [answer.sheet.parts["reward_model"].value for answer in group.answers]
        assert found == pytest.approx(score_answers(model, given), abs=1e-12)
        assert [answer.sheet.total for answer in group.answers] == [value / 2 for value in found]
    assert [group.dropped for group in modelled] == ["", "", "no verdict: unknown"]
    assert [group.dropped for group in voted] == [""] * 3


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
