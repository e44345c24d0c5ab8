"""Scores answers with a reward model, or with the verdict of a model that judges them.

A score is read at a position, never at a token's value, so an end of sentence inside a prompt changes nothing. A model
that judges criticizes an answer, then says whether it approves: its score is the probability of the approving verdict.
Source: arXiv:2412.19437, section 5.2.1.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat.encode import encode_conversations
from data.chat.messages import ChatMessage, Conversation, user
from data.chat.templates import ChatTemplate
from data.tokenizer import Tokenizer
from infer.config import GenerateError, check_sequences
from infer.engines.local import LocalModel
from infer.protocol import TargetSequence
from model.config import ModelConfig
from model.transformer import Transformer


def score_answers(model: Transformer, sequences: Sequence[Sequence[int]], batch_size: int = 16) -> list[float]:
    """Returns the reward model's score of each answer.

    Raises:
        GenerateError: the model has no score head, a sequence is empty or too long, or holds no such token.
    """
    _check(model.config, "score", sequences)
    if batch_size < 1:
        raise GenerateError(f"batch_size: must be at least 1, is {batch_size}; nearest valid: 1")
    return LocalModel(model, batch_size).rate(sequences)


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """Probabilities that a judge's next words approve or reject the answer."""

    yes: float
    no: float

    @property
    def score(self) -> float:
        """The probability of yes, if the judge says either. 0.5 if it says neither."""
        return self.yes / (self.yes + self.no) if self.yes + self.no else 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class VerdictTokens:
    """Token ids of a judge's text, up to where its verdict begins, and of both verdicts."""

    prompt: tuple[int, ...]
    yes: tuple[int, ...]
    no: tuple[int, ...]


def judge_answers(model: Transformer, judged: Sequence[VerdictTokens], batch_size: int = 16) -> list[JudgeVerdict]:
    """Returns the verdicts of a generative reward model from its critiques (`infer.reward`).

    Raises:
        GenerateError: the model has no output head, a sequence is too long or holds no such token, or a prompt or a
            verdict is empty.
    """
    for number, answer in enumerate(judged, 1):
        for name, tokens in (("prompt", answer.prompt), ("yes", answer.yes), ("no", answer.no)):
            if not tokens:
                raise GenerateError(f"answer {number}: {name} must have at least one token, has none")
    sequences = [
        TargetSequence(tokens=(*answer.prompt, *verdict), num_targets=len(verdict))
        for answer in judged
        for verdict in (answer.yes, answer.no)
    ]
    _check(model.config, "tokens", [sequence.tokens for sequence in sequences])
    scores = LocalModel(model, batch_size).score(sequences)
    probabilities = [math.exp(math.fsum(score.log_probs)) for score in scores]
    return [JudgeVerdict(*both) for both in zip(probabilities[::2], probabilities[1::2], strict=True)]


def _check(config: ModelConfig, head: str, sequences: Sequence[Sequence[int]]) -> None:
    if config.head != head:
        nearest = "judge_answers" if head == "score" else "score_answers"
        raise GenerateError(f"model.head: must be {head}, is {config.head}; nearest valid: infer.reward.{nearest}")
    check_sequences(config, "sequence", sequences)


_QUESTION = (
    "Question:\n{prompt}\n\nAnswer:\n{answer}\n\nIs the answer right? Explain, and end with Verdict: yes or "
    "Verdict: no."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedAnswer:
    """An answer with a critique of it, and, for training, whether the critique approves."""

    prompt: str
    answer: str
    critique: str
    approves: bool = True

    def record(self) -> Mapping[str, Any]:
        """Returns the line of a `.jsonl` file that `data=chat` reads, to train a judge."""
        return {"prompt": self._question(), "answer": self._text(approves=self.approves)}

    def tokens(self, template: ChatTemplate, tokenizer: Tokenizer) -> VerdictTokens:
        """Returns the tokens that are the verdict by their probabilities.

        The verdicts begin where both answers first differ in tokens, as a token may hold text before the verdict, too.
        """
        conversations = [
            Conversation(
                messages=(user(self._question()), ChatMessage(role="assistant", content=self._text(approves=approves))),
                num_context=1,
            )
            for approves in (True, False)
        ]
        yes, no = (chat.ids[:-1] for chat in encode_conversations(conversations, template, tokenizer))
        shared = next(
            (position for position, both in enumerate(zip(yes, no, strict=False)) if both[0] != both[1]), None
        )
        shared = min(len(yes), len(no)) if shared is None else shared
        return VerdictTokens(prompt=tuple(yes[:shared]), yes=tuple(yes[shared:]), no=tuple(no[shared:]))

    def _question(self) -> str:
        # Not str.format, because an answer may contain braces.
        return _QUESTION.replace("{answer}", "\0").replace("{prompt}", self.prompt).replace("\0", self.answer)

    def _text(self, *, approves: bool) -> str:
        return f"{self.critique}\nVerdict: {'yes' if approves else 'no'}"
