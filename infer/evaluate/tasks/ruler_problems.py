"""Draws problems about facts that are spread over a long prompt. Imports no torch.

Source: RULER (arXiv:2404.06654), section 3, in short forms that a base model can complete.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from data.tokenizer import Tokenizer
from infer.evaluate.tasks.haystack import Draws, Fact, Filler, HaystackPrompt, hide, num_begin

Subtask = Literal["multi_key", "multi_value", "multi_query", "variable_tracking", "common_words"]
SUBTASKS: tuple[Subtask, ...] = get_args(Subtask)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerSizes:
    """Sizes of problems.

    Attributes:
        num_facts: facts of multi_key, multi_value and multi_query, all of which but multi_key ask for.
        num_hops: variables after the first one in a chain of variable_tracking.
        num_common: most frequent words of common_words.
        num_digits: digits of each hidden number.
    """

    num_facts: int
    num_hops: int
    num_common: int
    num_digits: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerProblem:
    """A problem.

    Attributes:
        facts: what is hidden in filler text.
        question: text at the end.
        expected: what an answer must name, in any order.
        words: if not empty, the most frequent words of a list that replaces the filler.
    """

    facts: tuple[Fact, ...]
    question: str
    expected: tuple[str, ...]
    words: tuple[str, ...] = ()


def _multi_key(draws: Draws, sizes: RulerSizes) -> RulerProblem:
    names, values = draws.names(sizes.num_facts), _values(draws, sizes, sizes.num_facts)
    asked = draws.below(len(names))
    return RulerProblem(
        facts=tuple(_number(draws, name, value) for name, value in zip(names, values, strict=True)),
        question=f"\nThe secret number of the {names[asked]} is",
        expected=(values[asked],),
    )


def _multi_value(draws: Draws, sizes: RulerSizes) -> RulerProblem:
    (name,), values = draws.names(1), _values(draws, sizes, sizes.num_facts)
    return RulerProblem(
        facts=tuple(_number(draws, name, value) for value in values),
        question=f"\nAll secret numbers of the {name} are",
        expected=tuple(values),
    )


def _multi_query(draws: Draws, sizes: RulerSizes) -> RulerProblem:
    names, values = draws.names(sizes.num_facts), _values(draws, sizes, sizes.num_facts)
    return RulerProblem(
        facts=tuple(_number(draws, name, value) for name, value in zip(names, values, strict=True)),
        question=f"\nThe secret numbers of {', '.join(f'the {name}' for name in names)} are",
        expected=tuple(values),
    )


def _variable_tracking(draws: Draws, sizes: RulerSizes) -> RulerProblem:
    """Draws two chains of assignments, and asks for the variables of one."""
    count = sizes.num_hops + 1
    places = draws.different(26**5, 2 * count)
    names = ["".join(_LETTERS[place // 26**digit % 26] for digit in range(5)) for place in places]
    values = _values(draws, sizes, 2)
    facts = []
    for chain, value in enumerate(values):
        own = names[chain * count : (chain + 1) * count]
        depths = sorted(draws.below(1001) / 1000 for _ in own)
        for depth, name, source in zip(depths, own, [value, *(f"VAR {before}" for before in own)], strict=False):
            facts.append(Fact(depth=depth, parts=(f" VAR {name} =", f" {source}", ".")))
    question = f"\nAll variables with the value {values[0]} are"
    return RulerProblem(facts=tuple(facts), question=question, expected=tuple(names[:count]))


def _common_words(draws: Draws, sizes: RulerSizes) -> RulerProblem:
    common = tuple(draws.names(sizes.num_common))
    return RulerProblem(facts=(), question="\nThe most frequent names are", expected=common, words=common)


_DRAW: Mapping[Subtask, Callable[[Draws, RulerSizes], RulerProblem]] = {
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}


def draw_problem(subtask: Subtask, draws: Draws, sizes: RulerSizes) -> RulerProblem:
    """Returns a problem."""
    return _DRAW[subtask](draws, sizes)


def build_prompt(
    tokenizer: Tokenizer, filler: Filler, problem: RulerProblem, draws: Draws, size: int
) -> HaystackPrompt | None:
    """Returns a prompt of a problem, or None if it does not fit.

    With words, it may have a few tokens less than `size`, because the list has whole words.

    Args:
        draws: decides the filler's beginning, or the other words of the list and its order.
        size: number of tokens, with the begin of sentence.
    """
    if not problem.words:
        return hide(tokenizer, filler, problem.facts, problem.question, size, draws.below(2**32))
    asked = tokenizer.encode(problem.question)
    room = size - num_begin(tokenizer) - len(asked)
    names = [*problem.words, *(name for name in draws.names(400) if name not in problem.words)]
    encoded = tokenizer.encode_batch([f" {name}," for name in names])
    num_items = room // min(map(len, encoded))
    while (order := _word_list(len(problem.words), len(names), num_items)) is not None:
        if sum(len(encoded[at]) for at in order) <= room:
            ids = [token for at in draws.shuffled(order) for token in encoded[at]]
            return HaystackPrompt(ids=(*ids, *asked), depths=())
        num_items -= max(1, num_items // 100)
    return None


def _word_list(num_common: int, num_words: int, num_items: int) -> list[int] | None:
    """Returns a list of words by number, about half of which are the common ones.

    Each of these occurs at least twice as often as any other word.

    Args:
        num_common: number of the first words, which are common.
        num_items: length of the list, about.

    Returns:
        The numbers, in order, or None if the list is too short.
    """
    often = num_items // (2 * num_common)
    if often < 2:
        return None
    others = num_words - num_common
    rare = max(1, often // 10, -(-(num_items - often * num_common) // others))
    if 2 * rare > often:
        return None
    num_rare = (num_items - often * num_common) // rare
    return [
        *(at for at in range(num_common) for _ in range(often)),
        *(num_common + at for at in range(num_rare) for _ in range(rare)),
    ]


def _values(draws: Draws, sizes: RulerSizes, count: int) -> list[str]:
    least = 10 ** (sizes.num_digits - 1)
    return [str(least + value) for value in draws.different(9 * least, count)]


def _number(draws: Draws, name: str, value: str) -> Fact:
    return Fact(depth=draws.below(1001) / 1000, parts=(f" The secret number of the {name} is", f" {value}", "."))
