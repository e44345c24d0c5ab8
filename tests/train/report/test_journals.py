"""Tests which groups of a run the viewer reads: evenly chosen, whole, and none that is not as a run writes it."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from tests.train.report.journal_run import place_rollouts
from train.post.journal import journal_path, read_journal
from train.report.journals import choose_evenly, choose_groups


def test_choice_is_even_and_has_the_first_and_the_last() -> None:
    assert choose_evenly(3, 5) == [0, 1, 2]
    assert choose_evenly(9, 3) == [0, 4, 8]
    assert choose_evenly(7, 1) == [6]
    for count in range(1, 40):
        for most in range(2, 12):
            chosen = choose_evenly(count, most)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(count, most)
            assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_small_run_is_read_whole_with_its_log_probabilities(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 4))
    choice = choose_groups(tmp_path, 10**6)
    assert (choice.num_rollouts, choice.num_rollouts_of_run, choice.num_groups) == (3, 3, 6)
    assert [(group.step, group.values["group"]) for group in choice.groups] == [
        (s, g) for s in (1, 2, 3) for g in (0, 1)
    ]
    for group in choice.groups:
        written = read_journal(tmp_path, group.step).groups[group.values["group"]]
        assert group.log_probs == [list(answer.log_probs) for answer in written.answers]


def test_large_run_is_chosen_evenly(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 13), groups=4)
    choice = choose_groups(tmp_path, 10_000)
    steps = sorted({group.step for group in choice.groups})
    assert (steps[0], steps[-1]) == (1, 12)
    assert choice.num_rollouts == len(steps) < 12
    assert 8 <= len(choice.groups) < 48
    for group in choice.groups:
        written = read_journal(tmp_path, group.step).groups[group.values["group"]]
        assert group.log_probs == [list(answer.log_probs) for answer in written.answers]


def test_groups_within_a_large_rollout_are_chosen_evenly(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 2), groups=64)
    numbers = [group.values["group"] for group in choose_groups(tmp_path, 1).groups]
    assert numbers[0] == 0
    assert len(numbers) == 8
    assert all(6 <= later - earlier <= 10 for earlier, later in pairwise(numbers))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 10**5),
        lambda path: path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n" + b'{"group": [1]}\n[]\n\xff\n'),
        lambda path: path.write_text('{"format": 1, "step": 1e999, "rollout": -1, "counts": {"groups": "many"}}\n'),
        lambda path: path.write_text('{"format": 1, "step": 1, "rollout": 1, "counts": 3}\n'),
    ],
)
def test_journal_of_another_form_is_left_out(tmp_path: Path, spoil: object) -> None:
    place_rollouts(tmp_path, range(1, 3))
    spoil(journal_path(tmp_path, 1))  # type: ignore[operator]
    assert {group.step for group in choose_groups(tmp_path, 10**6).groups} == {2}


def test_torn_journal_shows_its_whole_lines(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 2))
    path = journal_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-400])
    assert [group.values["group"] for group in choose_groups(tmp_path, 10**6).groups] == [0]


def test_log_probabilities_of_other_answers_are_unknown(tmp_path: Path) -> None:
    place_rollouts(tmp_path, range(1, 2))
    place_rollouts(tmp_path / "other", range(1, 2), digits=5)
    source, target = (journal_path(folder, 1).with_suffix(".safetensors") for folder in (tmp_path / "other", tmp_path))
    for content in (source.read_bytes(), b"\xff" * 100, json.dumps({}).encode()):
        target.write_bytes(content)
        assert [group.log_probs for group in choose_groups(tmp_path, 10**6).groups] == [None, None]
    target.unlink()
    assert [group.log_probs for group in choose_groups(tmp_path, 10**6).groups] == [None, None]
