"""Generated problems, and problems as data: answers, held-out parts and prompts."""

import dataclasses
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.arithmetic import ArithmeticSource, arithmetic_tokenizer, is_held_out, problems, wrong_answer
from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.sources import ChatLines
from data.chat.templates import CHAT_TEMPLATES
from data.config import DataConfig
from data.corpus import DataError
from data.pack import WEIGHTS
from data.prepare import check_config, prepare
from data.problems import ProblemMix, WeightedProblems, order_problems, split_problems, take_turns
from data.registry import DATA_SOURCES
from data.shards.open import Prepared
from data.tokenizer import Tokenizer
from launch.cli.sample_lines import sample_lines
from tests.data.chat.conversations import chat_tokenizer
from tests.data.chat.test_sources import config_of as source_config
from tests.data.chat.test_sources import write_lines
from tests.tiny import data_config
from train.terminal import ProgressLines

SAMPLES = 2000


def config_of(folder: Path, **changes: Any) -> DataConfig:
    """Returns the configuration of generated problems."""
    source = ArithmeticSource(
        kind="arithmetic",
        form="demonstrations",
        template="v3",
        domains=("sort",),
        num_digits=8,
        num_samples=SAMPLES,
        wrong_share=0.5,
        generator_seed=0,
    )
    source = dataclasses.replace(source, **changes)
    return data_config(folder, source=source, tokenizer_vocab_size=4096, validation_fraction=0.1)


def read_answers(prepared: Prepared) -> list[tuple[str, str]]:
    """Returns prompt and answer of every training piece."""
    found = []
    for tokens, positions in zip(prepared.train.tokens_NL.tolist(), prepared.train.positions_NL.tolist(), strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start in starts:
            piece = prepared.tokenizer.decode(tokens[start : start + 21])
            begin, _, rest = piece.partition("<｜User｜>")
            prompt, _, answer = rest.partition("<｜Assistant｜>")
            assert begin == "<｜begin▁of▁sentence｜>"
            assert answer.endswith("<｜end▁of▁sentence｜>")
            found.append((prompt, answer.removesuffix("<｜end▁of▁sentence｜>")))
    return found


def num_wrong_digits(prompt: str, answer: str) -> int:
    return sum(a != b for a, b in zip(sorted(prompt.removesuffix("=")), answer, strict=True))


def test_demonstrations_have_one_wrong_digit_in_a_share_and_no_held_out_problem(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert check_config(config) == 32
    prepared = prepare(config, 63)
    answers = read_answers(prepared)
    assert len(answers) == prepared.counts["train"].kept
    assert prepared.counts["train"].kept + prepared.counts["validation"].kept == SAMPLES
    wrong = [num_wrong_digits(*each) for each in answers]
    assert set(wrong) == {0, 1}
    assert 0.45 < sum(wrong) / len(wrong) < 0.55
    assert not any(is_held_out(prompt) for prompt, _ in answers)
    # Eight digits and the end of each answer are predicted.
    assert prepared.train.values[WEIGHTS].sum() == 9 * len(answers)
    rows = {tuple(row) for row in prepared.train.tokens_NL.tolist()}
    assert not rows & {tuple(row) for row in prepared.validation.tokens_NL.tolist()}


def test_preferences_pair_the_right_answer_with_one_that_has_a_wrong_digit(tmp_path: Path) -> None:
    prepared = prepare(config_of(tmp_path, form="preferences", wrong_share=1.0, num_samples=300), 42)
    answers = read_answers(prepared)
    for (prompt, right), (same, wrong) in zip(answers[::2], answers[1::2], strict=True):
        assert prompt == same
        assert (num_wrong_digits(prompt, right), num_wrong_digits(prompt, wrong)) == (0, 1)


def test_a_validation_set_of_all_samples_is_lowered_with_a_line(tmp_path: Path) -> None:
    lines: list[str] = []
    config = dataclasses.replace(config_of(tmp_path, num_samples=20), validation_fraction=1.0 - 1e-9)
    prepared = prepare(config, 63, ProgressLines(lines.append))
    assert (prepared.counts["train"].kept, prepared.counts["validation"].kept) == (1, 19)
    assert any("would hold out all 20 samples" in line and "lowered to 19" in line for line in lines)


def test_the_seed_decides_the_samples_and_the_cache_knows_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, num_samples=100)
    first = prepare(config, 63)
    assert prepare(config, 63).fingerprint == first.fingerprint
    with monkeypatch.context() as other_order:
        other_order.setattr("data.shards.samples.ORDER_VERSION", 0)
        assert prepare(config, 63).fingerprint != first.fingerprint
    for changes in (
        {"generator_seed": 1},
        {"wrong_share": 0.4},
        {"num_digits": 7},
        {"num_samples": 101},
        {"domains": ("sort", "reverse")},
    ):
        assert prepare(config_of(tmp_path, **{"num_samples": 100, **changes}), 63).fingerprint != first.fingerprint


@pytest.mark.parametrize("part", ["held_out", "train"])
def test_problems_are_different_right_and_on_one_side(part: Any) -> None:
    found = problems(seed=3, count=400, part=part)
    assert found == problems(seed=3, count=400, part=part)
    assert len({problem.prompt for problem in found}) == 400
    assert found != problems(seed=4, count=400, part=part)
    for problem in found:
        assert problem.answer == "".join(sorted(problem.prompt.removesuffix("=")))
        assert is_held_out(problem.prompt) == (part == "held_out")
    with pytest.raises(DataError, match="problems: must be from 0 to 500 with 4 digits, is 501; nearest: 500"):
        problems(seed=3, count=501, num_digits=4)


def test_problems_of_several_domains_take_turns_and_show_their_domain(tmp_path: Path) -> None:
    found = problems(seed=3, count=100, domains=("reverse", "sort"))
    for number, problem in enumerate(found):
        digits = problem.prompt.strip("=")
        expected = (f"={digits}", digits[::-1]) if number % 2 == 0 else (f"{digits}=", "".join(sorted(digits)))
        assert (problem.prompt, problem.answer) == expected
        assert is_held_out(problem.prompt)
    for wrong in ((), ("sort", "sort")):
        with pytest.raises(DataError, match=r"^data.domains: must have at least one domain, each once"):
            check_config(config_of(tmp_path, domains=wrong))


def test_wrong_answers_differ_in_one_digit_for_every_draw() -> None:
    wrong = [wrong_answer("01234567", draw) for draw in range(8 * 9)]
    assert len(set(wrong)) == 72
    assert {num_wrong_digits("01234567=", answer) for answer in wrong} == {1}


def test_tokenizer_has_32_tokens_one_for_each_character_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = arithmetic_tokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    for each in (tokenizer, loaded):
        assert each.vocab_size == 32
        ids = encode_prompt([user("31415926=")], CHAT_TEMPLATES.get("r1"), each)
        assert len(ids) == 1 + 1 + 9 + 1 + 2
        assert each.decode(each.encode("0123456789=\n")) == "0123456789=\n"
        assert each.decode(each.encode("1 a<think>é")) == "1" + "?" * 10
    assert loaded.fingerprint == tokenizer.fingerprint


L = 40


def source_of(path: Path) -> ChatLines:
    return ChatLines(kind="problems", paths=(str(path),), template="v3")


def read_prompts(prepared: Prepared) -> list[list[int]]:
    found: list[Any] = []
    for tokens, positions in zip(prepared.train.tokens_NL, prepared.train.positions_NL, strict=True):
        used = int((positions >= 0).sum())
        pieces = np.split(tokens[:used], np.flatnonzero(positions[:used] == 0)[1:])
        found.extend(piece.tolist() for piece in pieces)
    return found


def test_problems_become_prompts_without_targets_and_split_as_their_samples(tmp_path: Path) -> None:
    lines = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(60)]
    lines += [{"prompt": "long " * 40, "answer": "dropped"}]
    config = source_config(source_of(write_lines(tmp_path / "p.jsonl", lines)), tmp_path, chat_tokenizer())
    check_config(config)
    prepared = prepare(config, L)
    train, held_out = split_problems(config)
    records = {record.answer: record for record in (*train, *held_out)}
    assert list(records) != [line["answer"] for line in lines]
    assert [each.place for each in train] == sorted((each.place for each in train), key=lambda p: int(p.split(":")[-1]))
    assert prepared.counts["train"].dropped + prepared.counts["validation"].dropped == 1
    # The samples of the training part are exactly the prompts of its problems.
    encoded = [encode_prompt(each.messages, CHAT_TEMPLATES.get("v3"), prepared.tokenizer) for each in train]
    assert sorted(read_prompts(prepared)) == sorted(ids for ids in encoded if len(ids) <= L)
    assert 0 < len(held_out) < len(train)
    assert not prepared.train.values[WEIGHTS].any()
    assert prepared.counts["train"].targets == 0
    assert prepared.bytes_per_token > 0
    shown = list(sample_lines(prepared, 0, reads_weights=True))
    assert any(line.startswith("prompt: ") and line.endswith(", 0 targets") for line in shown)
    assert shown[-1].endswith("<｜Assistant｜>")
    assert prepare(config, L).fingerprint == prepared.fingerprint


def mix_of(folder: Path, **weights: float) -> ProblemMix:
    """Returns a mixture of files with 40 problems each, of which the first has a domain."""
    for name in weights:
        lines = [{"prompt": f"{name} {n}", "answer": "a", "domain": None if n else "own"} for n in range(40)]
        write_lines(folder / f"{name}.jsonl", lines)
    sources = [
        WeightedProblems(name=name, paths=(f"{folder}/{name}.jsonl",), weight=weight, domain=f"of {name}")
        for name, weight in weights.items()
    ]
    return ProblemMix(kind="problem_mix", sources=tuple(sources), template="v3")


def test_problems_of_a_mixture_are_drawn_by_weights_and_repeat(tmp_path: Path) -> None:
    config = source_config(mix_of(tmp_path, maths=3, code=1, rest=0), tmp_path, chat_tokenizer())
    check_config(config)
    train, held_out = split_problems(config)
    assert {each.domain for each in train if each.source == "maths"} - {"own"} == {"of maths"}
    order = order_problems(config.source, train, seed=5)
    drawn = [train[row] for row in order.range(0, 200).tolist()]
    counts = Counter(each.source for each in drawn)
    assert counts == {"maths": 150, "code": 50}
    # Each pass over a source has each of its problems once; a later start has the same order.
    maths = [each.key for each in drawn if each.source == "maths"]
    size = sum(each.source == "maths" for each in train)
    assert len(set(maths[:size])) == size < len(maths)
    assert maths[:size] != maths[size : 2 * size]
    assert [train[row] for row in order.range(150, 50).tolist()] == drawn[150:]
    turns = [each.source for each in take_turns(held_out, seed=5)]
    assert Counter(turns) == Counter(each.source for each in held_out)
    assert set(turns[:3]) == set(turns)
    assert prepare(config, L).counts["train"].kept == len(train)


def test_mixture_of_problems_that_is_not_valid_is_refused(tmp_path: Path) -> None:
    first, other = mix_of(tmp_path, maths=3, code=1).sources
    for sources, rule in (
        ((first, replace(other, name="maths")), r"data: sources\[1\].name: must differ from other names"),
        ((replace(first, weight=0.0),), "data: sources: at least one weight must be above 0"),
        ((first, replace(other, paths=first.paths)), r"must name each file once, name .*maths.jsonl in maths and code"),
        ((first, replace(other, paths=("none.jsonl",))), r"data\.sources\.code\.paths: "),
    ):
        with pytest.raises(DataError, match=rule):
            check_config(source_config(ProblemMix(kind="problem_mix", sources=sources, template="v3"), tmp_path))


def test_arithmetic_problems_split_as_its_samples(tmp_path: Path) -> None:
    config = config_of(tmp_path, num_samples=300, num_digits=4)
    entry = DATA_SOURCES.get("arithmetic")
    train, held_out = split_problems(config)
    keys = {record.key for record in (*train, *held_out)}
    assert len(keys) == len(train) + len(held_out)  # four digits repeat among 300
    counts = prepare(config, 64).counts
    assert entry.samples is not None
    assert entry.tokenizer is not None
    samples = [sample.key for sample in entry.samples(config.source, entry.tokenizer(config.source))]
    assert keys == set(samples)
    assert sum(key in {record.key for record in held_out} for key in samples) == counts["validation"].kept
    assert all("".join(sorted(record.prompt[:-1])) == record.answer for record in train)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "p.jsonl:1: answer or tests: must be given"),
        ({"prompt": "a", "anwser": "b"}, "nearest valid: answer instead of anwser"),
        ({"answer": "b"}, "p.jsonl:1: prompt: must be given"),
    ],
)
def test_problem_that_is_not_valid_is_refused_by_line(tmp_path: Path, line: dict, message: str) -> None:
    config = source_config(source_of(write_lines(tmp_path / "p.jsonl", [line])), tmp_path, chat_tokenizer())
    with pytest.raises(DataError, match=message):
        check_config(config)


def test_problem_without_an_answer_says_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": None}])
    [record] = split_problems(source_config(source_of(path), tmp_path, chat_tokenizer(), validation_fraction=0.0001))[0]
    assert (record.answer, record.tests, record.key) == (None, None, "p.jsonl:1")


def test_split_refuses_sources_without_problems_and_an_empty_training_part(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"validation_fraction: 0\.9999 of 1 problems"):
        split_problems(source_config(source_of(path), tmp_path, validation_fraction=0.9999))
    (tmp_path / "notes.txt").write_text(json.dumps("text"))
    files = DATA_SOURCES.get("files").config(kind="files", paths=(str(tmp_path),), text_field="text")  # type: ignore[call-arg]
    with pytest.raises(DataError, match="a source with problems, is files; nearest valid: problems, problem_mix, "):
        split_problems(source_config(files, tmp_path))
