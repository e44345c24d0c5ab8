"""Tests of the lines that introduce a run."""

from dataclasses import replace
from pathlib import Path

from data.problems.source import split_problems
from tests.rollouts import GRPO, ROLLOUT, rollout_config
from train.corpus import prepare_corpus
from train.records.run_summary import corpus_lines


def test_epochs_of_a_run_that_answers_problems_count_its_prompts(tmp_path: Path) -> None:
    """Its batches are packed answers, whose number says nothing about problems."""
    config = rollout_config(tmp_path, task=replace(GRPO, steps=12), rollout=replace(ROLLOUT, prompts=8, updates=2))
    prepared, (problems, held_out) = prepare_corpus(config), split_problems(config.data)
    assert len(problems) + len(held_out) == 60
    line = next(each for each in corpus_lines(config, prepared) if "epochs" in each)
    size = len(problems)
    assert line == (
        f"problems: {size} for training; an epoch is {size / 4:.1f} steps, 12 steps are {12 * 4 / size:.2f} epochs"
    )
