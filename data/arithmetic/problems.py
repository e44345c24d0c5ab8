"""Generates problems of arithmetic: sort or reverse the digits of a number. Imports no torch.

A problem is held out by the hash of its text. So held-out problems never occur in training, for any seed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal, assert_never

import numpy as np

from data.corpus import DataError, hash_unit

HELD_OUT_SHARE = 0.1
ProblemPart = Literal["train", "held_out"]
Domain = Literal["sort", "reverse"]
"""What to do with the digits of a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticProblem:
    """A problem: the user's text, and the only right answer."""

    prompt: str
    answer: str


def is_held_out(prompt: str) -> bool:
    """Returns whether a problem is held out from training."""
    return hash_unit("arithmetic", 0, prompt) < HELD_OUT_SHARE


def make_problem(digits: str, domain: Domain) -> ArithmeticProblem:
    """Returns the problem of a domain about digits. Its text shows the domain."""
    match domain:
        case "sort":
            return ArithmeticProblem(prompt=f"{digits}=", answer="".join(sorted(digits)))
        case "reverse":
            return ArithmeticProblem(prompt=f"={digits}", answer=digits[::-1])
        case _:
            assert_never(domain)


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
        while True:
            digits = "".join(map(str, (generator.random_raw(num_digits) % 10).tolist()))
            problem = make_problem(digits, domain)
            if is_held_out(problem.prompt) == (part == "held_out"):
                break
        yield problem


def problems(
    seed: int,
    count: int,
    num_digits: int = 8,
    part: ProblemPart = "held_out",
    domains: Sequence[Domain] = ("sort",),
) -> tuple[ArithmeticProblem, ...]:
    """Returns different problems, for evaluation, rejection sampling and reinforcement learning.

    Raises DataError if there are too few problems with so many digits.
    """
    share = HELD_OUT_SHARE if part == "held_out" else 1 - HELD_OUT_SHARE
    # Fewer than half of all, so that drawing different ones takes little time.
    limit = int(10**num_digits * share / 2)
    if not 0 <= count <= limit:
        raise DataError(f"problems: must be from 0 to {limit} with {num_digits} digits, is {count}; nearest: {limit}")
    found: dict[str, ArithmeticProblem] = {}
    stream = problem_stream(seed, num_digits, part, domains)
    while len(found) < count:
        problem = next(stream)
        found.setdefault(problem.prompt, problem)
    return tuple(found.values())


def wrong_answer(answer: str, draw: int) -> str:
    """Returns an answer with one wrong digit; the random number `draw` chooses the place and the digit."""
    place, digit = draw % len(answer), draw // len(answer) % 9
    wrong = digit + (digit >= int(answer[place]))
    return f"{answer[:place]}{wrong}{answer[place + 1 :]}"


def draws(seed: int) -> Iterator[int]:
    """Yields random 64-bit numbers that are equal on every machine and with every numpy version."""
    generator = _generator(seed, 1)
    while True:
        yield int(generator.random_raw())


def _generator(seed: int, stream: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed % 2**64, stream], dtype=np.uint64))
