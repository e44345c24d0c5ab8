"""Whole runs of the command, as a user starts them, also in FP8 and for fine-tuning."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from base.refusal import ConfigError
from launch.config.folder import read_folder
from launch.config.run import check, compose_run
from tests.commands import run_command
from tests.covering import exhaustive
from train.checkpoint.manifest import CheckpointError
from train.config import Fp8PrecisionConfig, TrainConfig
from train.files.run_files import read_status
from train.report.micro_batches import read_micro_batch_loads

SMALL = (
    *("experiment=arithmetic_sft", "parallelism=one_rank", "batch.global_sequences=4", "batch.micro_sequences=2"),
    *("data.num_samples=300", "data.validation_fraction=0.2", "validation.sequences=4", "model.hidden_size=32"),
)


HALF_EPOCH = ("task.steps=null", "task.epochs=0.5", "samples.held_out=3", "samples.tokens=12", "samples.prompt=def")


def choices(folder: Path, *others: str) -> list[str]:
    return [*SMALL, f"data.cache_dir={folder / 'cache'}", *others]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns the folder of a run of half an epoch, in which the cache of its corpus is too, and its output."""
    folder = tmp_path_factory.mktemp("tuned")
    done = run_command(["-m", "launch.train", *choices(folder, *HALF_EPOCH), f"out_dir={folder / 'run'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_run_of_epochs_answers_held_out_prompts_and_belongs_to_its_task(tuned: tuple[Path, str]) -> None:
    folder, printed = tuned
    run = folder / "run"
    # About 240 samples, eight in a sequence: half an epoch is 15 sequences, so 4 steps of 4.
    assert compose_run(choices(folder, *HALF_EPOCH)).task.steps == 4
    assert "samples: " in printed
    assert "4 steps are 0.5" in " ".join(printed.split()), "long lines are folded"
    assert "continuation of" not in printed, "a model of chats continues no plain text"
    answers = json.loads((run / "answers.json").read_text(encoding="utf-8"))
    assert len(answers) == 3
    page = (run / "report.html").read_text(encoding="utf-8")
    for answer in answers:
        digits = answer["prompt"].partition("<｜User｜>")[2].partition("=")[0]
        assert len(digits) == 8, answer
        assert answer["reference"].endswith("<｜end▁of▁sentence｜>"), answer
        assert len(answer["reference"].partition("<")[0]) == 8, answer
        assert f"{digits}=" in page
        assert repr(answer["prompt"]) in printed
    plain = [*choices(folder, "task=pretrain", "task.steps=9"), f"resume={run}"]
    with pytest.raises(CheckpointError, match=r"task\.kind: must be sft, the task of .*, is pretrain; nearest valid"):
        check(compose_run(plain))
    check(compose_run([*plain[:-1], f"init_from={run}"]))


@pytest.mark.slow
def test_scores_of_a_teacher_are_written_whole_and_train_a_student(tuned: tuple[Path, str], tmp_path: Path) -> None:
    folder, scores = tuned[0], tmp_path / "scores"
    given = choices(folder, f"teacher={folder / 'run'}", f"scores={scores}", "kept=8", "temperature=2")
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
    student = ("task=distill", "init_from=random", f"task.teacher={scores}", "task.temperature=2", "task.steps=1")
    out = ("samples.tokens=0", f"out_dir={tmp_path / 'student'}")
    done = run_command(["-m", "launch.train", *choices(folder, *student, *out)])
    assert done.returncode == 0, done.stdout + done.stderr
    records = (tmp_path / "student" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(records[-1])["divergence"] > 0


def choices_of(folder: Path, name: str, *overrides: str) -> list[str]:
    """A four-rank run of the tiny model on the text in `folder`."""
    return [
        *("-m", "launch.train", f"name={name}", f"out_dir={folder / name}", "model=tiny", "parallelism=four_ranks"),
        *("data=files", f"data.paths=[{folder / 'text'}]", f"data.cache_dir={folder / 'cache'}"),
        *("data.tokenizer_vocab_size=320", "data.validation_fraction=0.2", "validation.sequences=8"),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=1"),
        *overrides,
    ]


def run_train(folder: Path, name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run_command(choices_of(folder, name, *overrides))


def read_metrics(folder: Path, name: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


# Spans in steps: in shares of the run they would follow each run's own length.
SPANS = ("optim.schedule.warmup=1 steps", "optim.schedule.decay_end=4 steps")

FLOAT64 = ("precision=float64", "optim.sharding=replicated", "validation.every_steps=2", *SPANS)


@pytest.fixture(scope="module")
def four_ranks(folder: Path) -> str:
    """Returns the output of the run `files` of three steps in float64 on four ranks."""
    choices = ("task.steps=3", "checkpointing.every_steps=2", "samples.prompt=a1 b2", "track=wandb_offline")
    loads = "track.micro_batch_loads_every_steps=2"
    done = run_train(folder, "files", *choices, loads, "profile.steps=[2]", "profile.ranks=[0,3]", *FLOAT64)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_run_writes_the_documented_files(folder: Path, four_ranks: str) -> None:
    run = folder / "files"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*")}
    expected = {"config.yaml", "metrics.jsonl", "checkpoints/step-00000002", "checkpoints/step-00000003/manifest.json"}
    expected |= {"report.html", "loads.jsonl"}
    expected |= {f"profile/step-00000002_rank-0000{rank}.trace.json.gz" for rank in (0, 3)}
    expected |= {"checkpoints/step-00000003/tokenizer.json"}
    assert expected | {f"log/rank_{rank:05d}.log" for rank in range(4)} <= names
    assert not [name for name in names if name.endswith(".partial")]
    documented = "step tokens loss main_loss mtp_loss balance_loss grad_norm lr step_seconds tokens_per_second"
    documented += " max_violation nodes_per_token inter_node_bytes peak_memory_bytes"
    for line in read_metrics(folder, "files"):
        parts = {
            f"{name}_seconds" for name in ("compute", "exposed_exchange", "bubble", "optimizer", "other", "saving")
        }
        assert line["step_time"].keys() == parts  # type: ignore[attr-defined]
        # Saving happens between the steps.
        assert sum(line["step_time"].values()) - line["step_time"]["saving_seconds"] == pytest.approx(  # type: ignore[attr-defined, index]
            line["step_seconds"], rel=0.02
        )
        assert set(documented.split()) <= set(line)
        assert line["inter_node_bytes"] > 0
        assert "bias_std" in line["router"]["layer_1"]  # type: ignore[index]
        assert "bytes_within_nodes" in line["exchange"]["layer_1"]  # type: ignore[index]
    assert len(list((run / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    loads = [json.loads(line) for line in (run / "loads.jsonl").read_text().splitlines()]
    assert len(loads) == 3
    # All micro-batches of a step together are its loads.
    summed = dict.fromkeys(range(1, 5), np.zeros(8, np.int64))
    for layer, counts_RE in read_micro_batch_loads(run, read_folder(run)):
        assert counts_RE.shape == (2, 8)
        summed[layer] = summed[layer] + counts_RE.sum(0)
    assert {f"layer_{layer}": rows.tolist() for layer, rows in summed.items()}.items() <= loads[1].items()
    page = (run / "report.html").read_text()
    assert all(f"<h2>{part}</h2>" in page for part in ("Learning", "Pipeline", "Experts", "Checkpoints and events"))
    assert "Rows of each rank in a typical micro-batch" in page
    # The page has the style of pictures.
    assert re.sub(r"(?s)<style>.*?</style>", "", (run / "schedule.svg").read_text()).strip() in page
    assert "validation loss" in four_ranks
    assert "unigram entropy" in four_ranks
    assert "continuation of 'a1 b2'" in four_ranks
    assert re.search(r"drafts accepted \d+ % \(\d+ of \d+\), \d+ passes instead of \d+", four_ranks)


@pytest.mark.slow
def test_run_ends_at_its_target_with_a_checkpoint_and_says_if_it_misses_it(folder: Path) -> None:
    few = ("parallelism=one_rank", "parallelism.data=2", "schedule=1f1b", "samples.prompt=a1")
    choices = (*few, "task.steps=9", "validation.every_steps=1", "optim.schedule.warmup=1 steps")
    targets = (5.6, 1000)
    for target in targets:
        name = f"target_{target:g}"
        done = run_train(folder, name, *choices, f"validation.target_loss={target:g}")
        assert done.returncode == 0, done.stderr
        metrics = read_metrics(folder, name)
        reached = [line["validation_loss"] <= target for line in metrics]
        assert reached == [False] * (len(metrics) - 1) + [True], metrics
        assert len(metrics) < 9
        steps = [path.name for path in (folder / name / "checkpoints").iterdir()]
        assert steps == [f"step-{len(metrics):08d}"]
        assert "continuation of 'a1'" in done.stdout
        reason = f"validation.target_loss={target:g} is reached; the run ends"
        status = read_status(folder / name)
        assert status is not None
        assert (status.exit_code, status.reason) == (0, reason)
        assert reason in (folder / name / "report.html").read_text()
    again = run_train(folder, "target_1000", *choices, "validation.target_loss=1000", "resume=auto")
    assert again.returncode == 0, again.stderr
    assert len(read_metrics(folder, "target_1000")) == 1
    missed = run_train(folder, "target_missed", *choices, "task.steps=2", "validation.target_loss=0.1")
    assert missed.returncode == 0, missed.stderr
    assert missed.stdout.count("validation.target_loss=0.1 is not reached") == 1
    status = read_status(folder / "target_missed")
    assert status is not None
    assert (status.exit_code, status.reason) == (0, "validation.target_loss=0.1 is not reached")


@pytest.mark.slow
@pytest.mark.usefixtures("four_ranks")
def test_same_seed_gives_the_same_first_loss_on_one_rank_and_no_tokens_are_not_generated(folder: Path) -> None:
    layout = ("parallelism=one_rank", "schedule=1f1b", "cluster.ranks_per_node=1")
    done = run_train(folder, "layout", "task.steps=1", *FLOAT64, *layout, "samples.prompt=a1", "samples.tokens=0")
    assert done.returncode == 0, done.stderr
    assert read_metrics(folder, "files")[0]["loss"] == pytest.approx(
        read_metrics(folder, "layout")[0]["loss"], rel=1e-12
    )
    assert "checkpoint" in done.stdout
    assert "continuation" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", *exhaustive("float32")])
def test_non_finite_step_ends_every_rank_with_its_exit_code(folder: Path, precision: str) -> None:
    choices = ("parallelism=two_ranks", "task.steps=40", "optim.learning_rate=1e30", "optim/schedule=constant")
    more = ("optim.schedule.warmup=0", "samples.prompt=", f"precision={precision}")
    done = run_train(folder, f"wild_{precision}", *choices, *more)
    assert done.returncode == 77, done.stdout + done.stderr
    assert re.search("error: (loss|gradient norm) is (inf|nan)", done.stdout + done.stderr)
    assert "<h2>Learning</h2>" in (folder / f"wild_{precision}" / "report.html").read_text()


def composed(*overrides: str) -> TrainConfig:
    config = compose_run(["precision=fp8", *overrides])
    check(config)
    return config


def test_fp8_is_composed_with_scales_of_either_kind() -> None:
    assert composed().precision == Fp8PrecisionConfig(kind="fp8", scales="float32")
    assert composed().computing.products == "fp8"
    assert composed("precision.scales=power_of_two").computing.products == "fp8_power_of_two"
    assert compose_run(["precision=bf16"]).computing.products == "own"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("precision.scales=powers", ["precision.scales", "float32, power_of_two", "'powers'"]),
        ("precision.scale=float32", ["precision.scale", "precision.scales"]),
        ("optim.sharding=replicated", ["optim.sharding", "fp8", "zero1", "replicated"]),
        ("recompute=[norm]", ["recompute", "fp8", "[norm]", "[norm,mla_up,swiglu]"]),
        ("optim.moments=aut", ["optim.moments", "auto, float32, bf16", "'aut'", "did you mean auto?"]),
        ("optim.moments=null", ["optim.moments", "auto, float32, bf16", "None"]),
    ],
)
def test_configuration_that_fp8_does_not_support_is_refused(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        composed(override)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
