"""Tests of the language of sources, configuration and documentation: plain words, complete first lines.

The rules follow the project's style: one term for one thing, and no word that a reader of PyTorch, Megatron-LM or
torchtitan would have to guess. `docs/glossary.md` has the terms.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PACKAGES = (
    "base",
    "comm",
    "data",
    "dualpipe",
    "evaluation",
    "infer",
    "kernels",
    "launch",
    "model",
    "planner",
    "score",
    "train",
    "verify",
)
FIRST_LINE_CHARACTERS = 100

# Each private word, as a regular expression, and what to write instead.
WORDS = {
    r"anew": "again",
    r"told": "given, or received",
    r"tells?(?!\()": "says, returns or sends",
    r"whatever": "any, or regardless of",
    r"nobody|anybody": "no process, or no user",
    r"of (?:its|their) own": "own, or separate",
    r"is of use": "is useful",
    r"beside": "next to, with, or in addition to",
    r"as (?:it|they) stands?": "verbatim",
    r"makes? room": "is preempted",
    r"heed(?:s|ed|ing)?": "handle",
    r"(?:does|do|did) not come(?! from)": "does not respond, or does not arrive",
    r"ways? back": "rollback",
    r"put off|puts off": "deferred",
    r"bare command": "the built-in launcher",
    r"life|lives": "attempt",
    r"calm": "uninterrupted",
    r"texts": "documents, or strings",
    r"but for": "except",
    r"the latter|the former": "the noun itself",
    r"stands? in": "is in",
    r"go(?:es)? on": "continue",
    r"at last": "finally",
    r"for (?:its|their) part": "nothing",
    r"no more than": "at most",
    r"strangers?": "attacker, or untrusted",
    r"ow(?:e|es|ed|ing)": "must send",
    r"mailbox(?:es)?": "socket",
    r"last words": "crash report",
    r"doorbells?": "probe",
    r"ledgers?": "record",
    r"farewells?": "departure",
    r"struck": "failed",
    r"optimis(?:e|es|ed|er|ers|ing|ation)": "the American spelling, with z",
    r"(?:re)?normalis(?:e|es|ed|ing|ation)": "the American spelling, with z",
    r"initialis(?:e|es|ed|ing|ation)": "the American spelling, with z",
    r"synchronis(?:e|es|ed|ing|ation|ations)": "the American spelling, with z",
    r"quantis(?:e|es|ed|ing|ation)": "the American spelling, with z",
    r"neighbours?|neighbouring|colours?|coloured|behaviour": "the American spelling, with or",
}

# Uses that are not the private word, by word: the context is removed before the search.
CONTEXTS: dict[str, tuple[str, ...]] = {
    # The name of a workflow (conf/workflow/life.yaml).
    "life": (r"(?:make |workflow=|name: |outputs/|\.PHONY: train post )life\b", r"\nlife: \.venv")
}

PREPOSITIONS = re.compile(
    "about|above|after|against|among|as|at|before|below|between|beyond|but|by|during|for|from|if|in|into|like|of|off|on|"
    "over|per|since|through|to|under|unless|until|up|upon|where|with|within|without"
)


def prose_files() -> list[Path]:
    """Returns every source, YAML, batch script and page whose words are checked."""
    sources = [
        path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".sbatch")
    ]
    values = [path for folder in ("conf", "launch") for path in (ROOT / folder).rglob("*.yaml")]
    return sorted([*sources, *values, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"])


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def private_words(text: str) -> list[str]:
    """Returns a line for each private word in a text: line number, word, and what to write instead."""
    for context in (context for contexts in CONTEXTS.values() for context in contexts):
        text = re.sub(context, lambda match: " " * len(match[0]), text)
    line = re.sub(r"[\n#]", " ", text)
    if not pattern_of("|".join(WORDS)).search(line):
        return []
    return [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; write {plain}"
        for words, plain in WORDS.items()
        for match in pattern_of(words).finditer(line)
    ]


@cache
def pattern_of(words: str) -> re.Pattern[str]:
    # A hyphen joins words of another meaning, and an underscore parts of a name.
    return re.compile(rf"(?<![\w-])(?:{words})(?![\w-])".replace(" ", r"\s+"), re.IGNORECASE)


def first_line_problem(text: str) -> str | None:
    """Returns what is wrong with the first line of a docstring, or None."""
    line = text.splitlines()[0]
    word = re.match(r"[\w'-]*", line)
    first = word[0] if word else ""
    if PREPOSITIONS.fullmatch(first.lower()):
        return f"starts with the preposition {first!r}"
    if first[:1].islower():
        return f"starts with a lower-case letter: {line[:60]!r}"
    if len(line) > FIRST_LINE_CHARACTERS:
        return f"has {len(line)} characters in its first line, at most {FIRST_LINE_CHARACTERS} are allowed"
    return None


@pytest.mark.slow
def test_language_is_plain_and_first_lines_of_docstrings_are_complete() -> None:
    """Lists all places that break a rule."""
    files = prose_files()
    problems = [
        f"{path.relative_to(ROOT)}: {problem}" for path in files for problem in private_words(path.read_text("utf-8"))
    ]
    problems += [
        f"{path.relative_to(ROOT)}: line {line}: {problem}"
        for path in files
        if path.suffix == ".py"
        for line, text in docstrings(path)
        if (problem := first_line_problem(text)) is not None
    ]
    assert len(files) > 100
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("drawn anew", 1), ("renewed, anewly", 0), ("does not\n# come", 1), ("a life-time", 0), ("Optimiser", 1)],
)
def test_language_private_words_are_found_as_whole_words(text: str, expected: int) -> None:
    assert len(private_words(text)) == expected


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [
        ("Of a step; the middle where there is one only.", True),
        ("returns a step.", True),
        ("Returns " + "a" * 93, True),
        ("Returns the x pixel of a step.", False),
        ("`launch.train` and more.", False),
    ],
)
def test_language_first_lines_that_are_wrong_are_found(text: str, is_wrong: bool) -> None:
    assert (first_line_problem(text) is not None) == is_wrong
