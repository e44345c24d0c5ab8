"""Draws prompts in an order that is a function of the seed alone. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.chat.encode import encode_prompt
from data.chat.templates import ChatTemplate
from data.loader import SampleOrder
from data.problems.records import ProblemRecord
from data.tokenizer import Tokenizer
from infer.engines.protocol import NumberedPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptForm:
    """How problems are rendered as prompts."""

    template: ChatTemplate
    tokenizer: Tokenizer
    thinking: bool

    def tokens(self, problem: ProblemRecord) -> tuple[int, ...]:
        """Returns the token ids of a problem, up to where the answer begins."""
        return tuple(encode_prompt(problem.messages, self.template, self.tokenizer, thinking=self.thinking))


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnPrompt:
    """A problem, and its prompt with the position in the order of the whole job as its number."""

    problem: ProblemRecord
    prompt: NumberedPrompt


class PromptOrder:
    """The order of prompts: a new permutation of all problems in each epoch."""

    def __init__(self, problems: Sequence[ProblemRecord], form: PromptForm, seed: int) -> None:
        """Stores the arguments.

        Args:
            problems: to draw from, at least one.
        """
        self._problems, self._form = problems, form
        self._order = SampleOrder(len(problems), seed)

    def take(self, first: int, count: int) -> list[DrawnPrompt]:
        """Returns the prompts at `count` positions from `first` on."""
        numbers = self._order.range(first, count).tolist()
        drawn = [self._problems[number] for number in numbers]
        return [
            DrawnPrompt(problem=each, prompt=NumberedPrompt(number=first + at, tokens=self._form.tokens(each)))
            for at, each in enumerate(drawn)
        ]
