"""Tests the recipe of supervised fine-tuning as a command: its length, its answers, and where its weights may go."""

import json
from pathlib import Path

import pytest

from launch.config.run_config import check, compose_run
from tests.commands import run_command
from train.checkpoint.manifest import CheckpointError

SMALL = (
    *("experiment=arithmetic_sft", "parallelism=one_rank", "batch.global_sequences=4", "batch.micro_sequences=2"),
    *("data.num_samples=300", "data.validation_fraction=0.2", "validation.sequences=4", "model.hidden_size=32"),
)


def choices(folder: Path, *others: str) -> list[str]:
    return [*SMALL, f"data.cache_dir={folder / 'cache'}", *others]


@pytest.mark.slow
def test_run_of_epochs_answers_held_out_prompts_and_belongs_to_its_task(tmp_path: Path) -> None:
    run = tmp_path / "run"
    given = choices(tmp_path, "task.steps=null", "task.epochs=0.5", "samples.held_out=3", "samples.tokens=12")
    done = run_command(["-m", "launch.train", *given, f"out_dir={run}"])
    assert done.returncode == 0, done.stdout + done.stderr
    # About 240 samples, eight in a sequence: half an epoch is 15 sequences, so 4 steps of 4.
    config = compose_run(given)
    assert config.task.steps == 4
    assert "samples: " in done.stdout
    assert "4 steps are 0.5" in done.stdout
    answers = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert len(answers) == 3
    page = (run / "report.html").read_text(encoding="utf-8")
    for answer in answers:
        digits = answer["prompt"].partition("<｜User｜>")[2].partition("=")[0]
        assert len(digits) == 8, answer
        assert answer["reference"].endswith("<｜end▁of▁sentence｜>"), answer
        assert len(answer["reference"].partition("<")[0]) == 8, answer
        assert f"{digits}=" in page
        assert repr(answer["prompt"]) in done.stdout
    plain = [*choices(tmp_path, "task=pretrain", "task.steps=9"), f"resume={run}"]
    with pytest.raises(CheckpointError, match=r"task\.kind: must be sft, the task of .*, is pretrain; nearest valid"):
        check(compose_run(plain))
    check(compose_run([*plain[:-1], f"init_from={run}"]))
