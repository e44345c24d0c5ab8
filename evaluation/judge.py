"""Asks a model for critiques of answers, and reads their verdicts.

A judge is any engine: in training, that of the policy, so that it judges itself. Source: arXiv:2412.19437,
section 5.4.2.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.templates import ChatTemplate
from data.corpus import fill_fields
from data.special_tokens import THINK
from data.tokenizer import Tokenizer
from infer.config import Finish, Sampling
from infer.protocol import NumberedPrompt, Request, Sample
from score.reward import AnswerGroup
from score.score import Score, ScoringError, failure, final_text
from score.scorers import JUDGE, JudgeConfig

JUDGE_SEED = 0x5851F42D4C957F2D
"""Added to the seed of a run for each part of a reward, so that answers and critiques of two judges are independent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgePrompt:
    """A prompt of the judge; its number decides the random numbers of the critiques.

    It judges `answer` of a group, compared with `other`, which is the same if there is none.
    """

    prompt: NumberedPrompt
    group: int
    answer: int
    other: int


@dataclass(frozen=True, slots=True)
class Judge:
    """Builds the prompts of a judge, of at most `max_tokens`, and reads its verdicts. It owns no model.

    `part` is the judge's position in the reward, which decides its random numbers.
    """

    config: JudgeConfig
    template: ChatTemplate
    tokenizer: Tokenizer
    constitution: str
    max_tokens: int
    part: int = 0

    def prompts(self, groups: Sequence[AnswerGroup], numbers: Sequence[int]) -> list[JudgePrompt]:
        """Returns the prompts of all groups, in order, given the numbers of the groups' prompts in the job.

        Answers without text after their thoughts have none. A prompt that is too long is not judged, which abstains.
        """
        prompts = []
        for index, (group, group_number) in enumerate(zip(groups, numbers, strict=True)):
            size = len(group.answers)
            finals = [final_text(answer.text).strip() for answer in group.answers]
            for first, second in self._pairs(finals):
                # One pass, because an answer may contain the names of fields.
                text = fill_fields(
                    self.config.question,
                    constitution=self.constitution,
                    prompt=group.problem.prompt,
                    expected=group.problem.answer or "",
                    answer=finals[first],
                    other=finals[second],
                )
                tokens = tuple(
                    encode_prompt([user(text)], self.template, self.tokenizer, thinking=self.config.thinking)
                )
                if len(tokens) <= self.max_tokens:
                    number = (group_number * size + first) * size + second
                    prompt = NumberedPrompt(number=number, tokens=tokens)
                    prompts.append(JudgePrompt(prompt=prompt, group=index, answer=first, other=second))
        return prompts

    def request(self, seed: int, step: int, stop: frozenset[int]) -> Request:
        """Returns how an engine continues the prompts."""
        sampling = Sampling(temperature=self.config.temperature, seed=(seed + JUDGE_SEED * (1 + self.part)) % 2**63)
        return Request(
            samples=self.config.samples,
            max_new_tokens=self.config.max_new_tokens,
            sampling=sampling,
            step=step,
            stop=stop,
        )

    def scores(
        self, groups: Sequence[AnswerGroup], prompts: Sequence[JudgePrompt], critiques: Sequence[Sample]
    ) -> list[list[Score]]:
        """Returns the scores of every group's answers, given the critiques prompt by prompt."""
        spoken = [self.tokenizer.decode(critique.tokens[:-1]) for critique in critiques]
        return self.count(
            groups,
            prompts,
            [self.vote(text, critique.finish) for text, critique in zip(spoken, critiques, strict=True)],
        )

    def count(
        self, groups: Sequence[AnswerGroup], prompts: Sequence[JudgePrompt], cast: Sequence[bool | None]
    ) -> list[list[Score]]:
        """Returns the scores of every group's answers, given the votes prompt by prompt."""
        votes: dict[tuple[int, int], list[bool | None]] = defaultdict(list)
        for number, vote in enumerate(cast):
            prompt = prompts[number // self.config.samples]
            votes[prompt.group, prompt.answer].append(vote)
            if prompt.other != prompt.answer:
                votes[prompt.group, prompt.other].append(None if vote is None else not vote)
        return [self._group_scores(index, group, votes) for index, group in enumerate(groups)]

    def _group_scores(
        self, index: int, group: AnswerGroup, votes: dict[tuple[int, int], list[bool | None]]
    ) -> list[Score]:
        finals = [final_text(answer.text).strip() for answer in group.answers]
        pairs = list(self._pairs(finals))
        scores = []
        for number, text in enumerate(finals):
            wanted = sum(number in pair for pair in pairs) * self.config.samples
            cast = votes[index, number]
            # Prompts that are too long were not judged.
            abstentions: list[bool | None] = [None] * (wanted - len(cast))
            scores.append(score_votes([*cast, *abstentions]) if text else failure("missing", "no text to judge"))
        return scores

    def _pairs(self, finals: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yields which answer of a group is judged against which, itself if it is judged alone."""
        judged = [number for number, text in enumerate(finals) if text]
        if self.config.form == "single":
            yield from ((number, number) for number in judged)
            return
        compared = zip(judged, [*judged[1:], *judged[:1]], strict=True) if len(judged) > 2 else [tuple(judged)]
        for pair in compared:
            if len(pair) == 2:
                yield from (pair, pair[::-1])

    def vote(self, text: str, finish: Finish) -> bool | None:
        """Returns the vote of a critique without its end token; None if it was cut or has no clear verdict."""
        if finish != "stop":
            return None
        return parse_verdict(THINK + text if self.config.thinking else text, self.config)


def check_critiques(config: JudgeConfig, most: int, template: ChatTemplate) -> None:
    """Rejects critiques that a judge of `most` positions, or its chat template, cannot write."""
    config.check_room(most, f"the judge's {most} positions")
    if config.thinking and template.thoughts is None:
        raise ScoringError.broken(JUDGE, "thinking must be false with a template without thoughts", "true", "false")


def parse_verdict(text: str, config: JudgeConfig) -> bool | None:
    """Returns whether a critique ends with a verdict for the answer; None if there is no clear verdict."""
    _, mark, after = final_text(text).rpartition(config.mark) if config.mark else ("", "mark", final_text(text))
    verdict_text = after.strip().strip("*.!\"' ").casefold()
    votes = {config.accept.strip().casefold(): True, config.reject.strip().casefold(): False}
    return votes.get(verdict_text) if mark else None


def score_votes(votes: Sequence[bool | None]) -> Score:
    """Returns the share of votes for an answer; unknown if fewer than half are valid. None abstains."""
    valid = [vote for vote in votes if vote is not None]
    if not valid or 2 * len(valid) < len(votes):
        return failure("unknown", f"{len(valid)} of {len(votes)} votes of the judge are valid, at least half must be")
    return Score(value=sum(valid) / len(valid), outcome="rated", detail=f"{sum(valid)} of {len(valid)} votes")
