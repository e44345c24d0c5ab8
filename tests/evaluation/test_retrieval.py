"""Tests of `needle`: an oracle is always right, guessing is at chance, and prompts have their length."""

from pathlib import Path
from typing import Any

import pytest

from data.corpus import DataError
from data.tokenizer import Tokenizer
from evaluation.protocol import EvaluationError
from evaluation.retrieval import Draws, hide, read_filler
from evaluation.run import OpenTask
from tests.evaluation.stand_ins import CopyModel, RandomModel, evaluate, open_task

MOST = 1024
NEEDLE = {"depths": [0, 30, 100], "num_samples": 3, "num_digits": 4}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = " The secret number of the silver tower is 123. All variables with the value are VAR ABCDE = VAR FGHIJ. "
    return Tokenizer.train([text * 20, "The river carries small stones down to the lake. " * 20], 400)


def open_needle(tokenizer: Tokenizer, seed: int = 0, **keys: Any) -> OpenTask:
    return open_task("needle", tokenizer, MOST, seed, **{**NEEDLE, **keys})


def test_needle_an_oracle_finds_every_needle_and_guessing_none(tokenizer: Tokenizer) -> None:
    opened, model = open_needle(tokenizer), CopyModel(tokenizer)
    records, result = evaluate(opened, model, tokenizer, MOST)
    assert len(records) == 4 * 3 * 3
    assert result.estimates["accuracy"].value == 1.0
    assert result.estimates["accuracy"].standard_error == 0.0
    # Prompt and answer have exactly as many tokens as the length says.
    assert sorted(model.lengths) == sorted(record["length"] for record in records)
    (grid,) = result.details.grids
    assert (grid.x, grid.y) == (("128", "256", "512", "1024"), ("0", "30", "100"))
    assert grid.values == ((1.0,) * 4,) * 3
    cells = result.details.values["cells"]
    assert [(cell["samples"], cell["standard_error"]) for cell in cells] == [(3, 0.0)] * 12
    guessed = evaluate(opened, RandomModel(tokenizer.vocab_size), tokenizer, MOST)[1]
    assert guessed.estimates["accuracy"].value <= guessed.details.values["accuracy_of_guessing"] + 1 / 36
    assert guessed.estimates["loglikelihood"].value < -10  # type: ignore[operator]


def test_needle_is_where_it_should_be(tokenizer: Tokenizer) -> None:
    for sample in open_needle(tokenizer, lengths=[1024], num_samples=5).task.samples():
        needle = sample.source
        assert abs(100 * needle["actual_depth"] - needle["depth"]) < 4  # a sentence of 1024 tokens
        text = tokenizer.decode(sample.requests[0].context)  # type: ignore[arg-type, union-attr]
        assert text.count(f" The secret number of the {needle['name']} is {needle['value']}.") == 1
        assert text.endswith(f"\nThe secret number of the {needle['name']} is")
        assert len(needle["value"]) == 4


def test_prompts_depend_on_the_seed_alone(tokenizer: Tokenizer) -> None:
    first, again, other = (
        [sample.requests for sample in open_needle(tokenizer, seed=seed).task.samples()] for seed in (0, 0, 1)
    )
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    keys = [sample.key for sample in open_needle(tokenizer).task.samples()]
    assert len(set(keys)) == len(keys)


def test_filler_may_be_a_text_of_the_user(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "filler.txt"
    path.write_text("One sentence here. Another one there!\nA line\n\nThe end")
    filler = read_filler("needle.path", str(path), tokenizer, 0)
    assert tokenizer.decode(filler.ids) == path.read_text()
    assert len(filler.ends) == 4
    prompt = hide(tokenizer, filler, [" A fact"], " Why?", depth=0.5, size=300, start=2)
    assert prompt is not None
    assert len(prompt[0]) == 299  # one more is the begin of sentence
    text = tokenizer.decode(prompt[0])
    assert text.count(" A fact") == 1
    assert text.count("The end") > 1
    assert text.endswith(" Why?")
    for content, rule in ((b"", "must have text"), (b"\xff\xfe", "must be UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"needle\.path: .*{rule}"):
            read_filler("needle.path", str(path), tokenizer, 0)
    with pytest.raises(DataError, match=r"needle\.path: must be a file"):
        read_filler("needle.path", str(tmp_path / "none.txt"), tokenizer, 0)


def test_draws_are_different_and_repeatable() -> None:
    assert Draws(1, "a").shuffled(range(50)) == Draws(1, "a").shuffled(range(50)) != Draws(1, "b").shuffled(range(50))
    assert sorted(Draws(1, "b").shuffled(range(50))) == list(range(50))
    assert Draws(1, "a").name() != Draws(2, "a").name()
    assert {len(Draws(seed, "a").digits(3)) for seed in range(50)} == {3}


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"lengths": [2000]}, r"needle\.lengths: must be at most model\.max_position_tokens=1024, is 2000"),
        ({"lengths": [128, 128]}, r"needle\.lengths: must have at least one length, each once"),
        ({"lengths": [8]}, r"needle\.lengths: must have room for needle and question, is 8"),
        ({"depths": []}, r"needle\.depths: must have at least one depth"),
    ],
)
def test_needle_rejects_what_does_not_fit(tokenizer: Tokenizer, keys: dict, rule: str) -> None:
    with pytest.raises(EvaluationError, match=rule):
        open_needle(tokenizer, **keys)
