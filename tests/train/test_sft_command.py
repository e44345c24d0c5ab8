"""Tests the recipe of supervised fine-tuning as a command: its length, its answers, and where its weights may go."""

import json
from pathlib import Path

import numpy as np
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
    given = [*given, "samples.prompt=def"]
    done = run_command(["-m", "launch.train", *given, f"out_dir={run}"])
    assert done.returncode == 0, done.stdout + done.stderr
    # About 240 samples, eight in a sequence: half an epoch is 15 sequences, so 4 steps of 4.
    config = compose_run(given)
    assert config.task.steps == 4
    assert "samples: " in done.stdout
    assert "4 steps are 0.5" in " ".join(done.stdout.split()), "long lines are folded"
    assert "continuation of" not in done.stdout, "a model of chats continues no plain text"
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


@pytest.mark.slow
def test_scores_of_a_teacher_are_written_whole_and_train_a_student(tmp_path: Path) -> None:
    run, scores = tmp_path / "run", tmp_path / "scores"
    done = run_command(["-m", "launch.train", *choices(tmp_path, "task.steps=1", f"out_dir={run}", "samples.tokens=0")])
    assert done.returncode == 0, done.stdout + done.stderr
    given = choices(tmp_path, f"teacher={run}", f"scores={scores}", "kept=8", "temperature=2")
    done = run_command(["-m", "launch.score_teacher", *given])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "targets scored in" in done.stdout
    ids = np.load(scores / "train_teacher_ids_NLK.npy")
    log_probs = np.load(scores / "train_teacher_log_probs_NLK.npy")
    meta = json.loads((scores / "scores.json").read_text(encoding="utf-8"))
    assert (meta["kept"], meta["temperature"], meta["vocab_size"]) == (8, 2.0, 32)
    # Nine targets of each of about 240 samples, whose probabilities sum to at most 1 and decrease.
    is_target = log_probs.any(-1)
    assert 9 * 200 < is_target.sum() < 9 * 280
    assert (np.diff(log_probs[is_target]) <= 0).all()
    assert (np.exp(log_probs[is_target]).sum(-1) <= 1 + 1e-5).all()
    assert all(len(set(row)) == 8 for row in ids[is_target].tolist())
    refused = run_command(["-m", "launch.score_teacher", *given])
    assert refused.returncode == 2
    assert "scores: must be a folder that does not exist" in refused.stderr
    student = [
        "task=distill",
        "init_from=random",
        f"task.teacher={scores}",
        "task.temperature=2",
        "task.steps=2",
        "samples.tokens=0",
    ]
    done = run_command(["-m", "launch.train", *choices(tmp_path, *student, f"out_dir={tmp_path / 'student'}")])
    assert done.returncode == 0, done.stdout + done.stderr
    records = (tmp_path / "student" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(records[-1])["divergence"] > 0
