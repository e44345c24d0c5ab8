"""Generates arithmetic problems, held out by the hash of their text for any seed. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Annotated, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models

from base.ranges import AtLeast, NonNegativeInt, PositiveInt, Share
from data.chat.encode import ChatSample, encode_samples
from data.chat.messages import Conversation, assistant, user
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError, hash_unit
from data.pack import PAIR_VALUES, WEIGHTS
from data.problems import ProblemRecord
from data.registry import DATA_SOURCES, DataSource, DataSourceEntry
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import SPECIAL_TOKENS, Tokenizer

HELD_OUT_SHARE = 0.1
ProblemPart = Literal["train", "held_out"]
Domain = Literal["sort", "reverse", "parity"]  # what to do with the digits of a number
# How the user's text shows the digits, and the order of the answer's.
_DOMAINS: Mapping[Domain, tuple[str, Callable[[str], Iterable[str]]]] = {
    "sort": ("{}=", sorted),
    "reverse": ("={}", reversed),
    "parity": ("={}=", lambda digits: str(sum(map(int, digits)) % 2)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticProblem:
    """A problem: the user's text, the only right answer, and what to do with the digits.

    `steps` are the digits, each followed by the answer for the digits up to it.
    """

    prompt: str
    answer: str
    domain: Domain
    steps: str

    def record(self, place: str) -> ProblemRecord:
        """Returns the problem as one of a data set, with its place for errors."""
        messages = (user(self.prompt),)
        return ProblemRecord(
            key=self.prompt, messages=messages, answer=self.answer, tests=None, place=place, domain=self.domain
        )


def is_held_out(prompt: str) -> bool:
    """Returns whether a problem is held out from training."""
    return hash_unit("arithmetic", 0, prompt) < HELD_OUT_SHARE


def check_domains(domains: Sequence[Domain], key: str) -> None:
    """Rejects an empty list of domains, and one that repeats a domain, by DataError with the key."""
    if not domains or len(set(domains)) < len(domains):
        raise DataError(f"{key}: must have at least one domain, each once, is {list(domains)}; nearest valid: [sort]")


def problem_stream(
    seed: int, num_digits: int, part: ProblemPart = "train", domains: Sequence[Domain] = ("sort",)
) -> Iterator[ArithmeticProblem]:
    """Yields problems of one part without end; problems may repeat."""
    generator = _generator(seed, 0)
    for domain in cycle(domains):
        form, arrange = _DOMAINS[domain]
        prompt = ""
        while not prompt or is_held_out(prompt) != (part == "held_out"):
            digits = "".join(map(str, (generator.random_raw(num_digits) % 10).tolist()))
            prompt = form.format(digits)
        steps = "".join(digits[at] + "".join(arrange(digits[: at + 1])) for at in range(num_digits))
        yield ArithmeticProblem(prompt=prompt, answer="".join(arrange(digits)), domain=domain, steps=steps)


def problems(
    seed: int,
    count: int,
    num_digits: int = 8,
    part: ProblemPart = "held_out",
    domains: Sequence[Domain] = ("sort",),
) -> tuple[ArithmeticProblem, ...]:
    """Returns different problems, for evaluation and rewards; raises DataError if there are too few."""
    share = HELD_OUT_SHARE if part == "held_out" else 1 - HELD_OUT_SHARE
    # Fewer than half of all, so that drawing different ones takes little time.
    limit = int(10**num_digits * share / 2)
    if not 0 <= count <= limit:
        raise DataError(f"problems: must be from 0 to {limit} with {num_digits} digits, is {count}; nearest: {limit}")
    return tuple(islice(_distinct(problem_stream(seed, num_digits, part, domains)), count))


def _distinct(problems: Iterable[ArithmeticProblem]) -> Iterator[ArithmeticProblem]:
    prompts = set[str]()
    for problem in problems:
        if problem.prompt not in prompts:
            prompts.add(problem.prompt)
            yield problem


def wrong_answer(answer: str, draw: int) -> str:
    """Returns an answer with one wrong digit; the random number `draw` chooses the place and the digit."""
    position = draw % len(answer)
    digit = draw // len(answer) % 9
    wrong = digit + (digit >= int(answer[position]))
    return f"{answer[:position]}{wrong}{answer[position + 1 :]}"


def draws(seed: int) -> Iterator[int]:
    """Yields random 64-bit numbers that are equal on every machine and with every numpy version."""
    generator = _generator(seed, 1)
    while True:
        yield int(generator.random_raw())


def _generator(seed: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64))


CHARACTERS = "0123456789=\n?"
UNKNOWN = "?"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticSource(DataSource):
    """Problems of sorting or reversing digits or of the parity of their sum, generated from a seed."""

    # demonstrations: one answer each; preferences: the right answer and one with a wrong digit.
    form: Literal["demonstrations", "preferences"]
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template
    domains: tuple[Domain, ...]  # kinds of problems, in turn
    num_digits: Annotated[int, AtLeast(4)]  # digits of a problem
    num_samples: PositiveInt  # number of problems, held-out validation included
    wrong_share: Share  # share of demonstrations with one wrong digit
    thoughts: bool = False  # whether answers think first, step by step
    generator_seed: NonNegativeInt  # seed of the problems and the wrong digits


def arithmetic_tokenizer() -> Tokenizer:
    """Returns a tokenizer of 32 tokens: characters, of which `?` is any other one, and all special tokens."""
    vocab = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *CHAT_TOKENS, *CHARACTERS))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([*SPECIAL_TOKENS, *CHAT_TOKENS])
    return Tokenizer(backend)


def _all_problems(source: ArithmeticSource) -> Iterator[ArithmeticProblem]:
    """Yields the problems of the source, some of them more than once."""
    return islice(problem_stream(source.generator_seed, source.num_digits, domains=source.domains), source.num_samples)


def _chat_samples(source: ArithmeticSource) -> Iterator[ChatSample]:
    """Yields problems with the right answer, with a wrong one, or with both as a pair."""
    numbers = draws(source.generator_seed)
    for problem in _all_problems(source):
        is_wrong = next(numbers) / 2**64 < source.wrong_share
        wrong = wrong_answer(problem.answer, next(numbers))
        is_pair = source.form == "preferences"
        answers = (problem.answer, wrong) if is_pair else (wrong if is_wrong else problem.answer,)
        thoughts = problem.steps if source.thoughts else None
        views = tuple(Conversation(messages=(user(problem.prompt), assistant(answer, thoughts))) for answer in answers)
        yield ChatSample(key=problem.prompt, views=views, margin=0.0 if is_pair else None)


def _problems(source: ArithmeticSource) -> Iterator[ProblemRecord]:
    for number, problem in enumerate(_distinct(_all_problems(source))):
        yield problem.record(f"data.kind=arithmetic, problem {number}")


DATA_SOURCES.register(
    "arithmetic",
    DataSourceEntry(
        summary="generated problems: sort or reverse the digits of a number",
        config=ArithmeticSource,
        place=lambda source: "data.kind: 'arithmetic'",
        samples=lambda source, tokenizer: encode_samples(
            _chat_samples(source), CHAT_TEMPLATES.get(source.template), tokenizer
        ),
        tokenizer=lambda source: arithmetic_tokenizer(),
        check=lambda source, tokenizer: check_domains(source.domains, "data.domains"),
        values=lambda source: PAIR_VALUES if source.form == "preferences" else (WEIGHTS,),
        problems=_problems,
    ),
)
