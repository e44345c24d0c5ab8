"""Whole runs of the command, as a user starts them: real ranks, real files, the documented exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.ports import reserved_port
from tests.tiny import write_text
from tests.train.wandb_file import flat, read_history

ROOT = Path(__file__).parents[2]


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    write_text(folder)
    return folder


# Spans in steps: in shares of the run they would follow each run's own length.
SPANS = ("optim.schedule.warmup=1 steps", "optim.schedule.decay_end=4 steps")
FLOAT64 = ("precision=float64", "optim.sharding=replicated", "samples.prompt=", "validation.every_steps=2", *SPANS)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, float]]:
    """Returns the metrics of four steps in float64."""
    done = run_train(folder, "whole", "task.steps=4", *FLOAT64)
    assert done.returncode == 0, done.stderr
    return read_metrics(folder, "whole")


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted_bitwise(folder: Path, whole: list[dict[str, float]]) -> None:
    for name, more in (("half", ("task.steps=2",)), ("again", ("task.steps=4", f"resume={folder / 'half'}"))):
        done = run_train(folder, name, *more, *FLOAT64)
        assert done.returncode == 0, done.stderr
    assert "learning rate: 2.325e-03 in step 3" in done.stdout.partition("resumed after step 2")[2]
    first, second = (read_metrics(folder, name) for name in ("half", "again"))
    assert_resumed(first + second, second, whole)


@pytest.mark.slow
def test_run_resumed_from_its_own_checkpoint_in_bf16_equals_uninterrupted_bitwise(folder: Path) -> None:
    """First and last stage are on different ranks, so each has a shard of the embedding."""
    choices = ("precision=bf16", "schedule=1f1b", "samples.prompt=", "task.steps=4", *SPANS)
    checkpoint = folder / "uninterrupted" / "checkpoints" / "step-00000002"
    for name, more in (("uninterrupted", "checkpointing.every_steps=2"), ("resumed", f"resume={checkpoint}")):
        done = run_train(folder, name, more, *choices)
        assert done.returncode == 0, done.stderr
    uninterrupted, second = (read_metrics(folder, name) for name in ("uninterrupted", "resumed"))
    assert_resumed(uninterrupted[:2] + second, second, uninterrupted)


def assert_resumed(
    lines: list[dict[str, float]], second: list[dict[str, float]], uninterrupted: list[dict[str, float]]
) -> None:
    """Compares all lines of a run in two parts, of which `second` is the later one, with an uninterrupted run."""
    assert [line["step"] for line in second] == list(range(3, 5))
    for line, expected in zip(lines, uninterrupted, strict=True):
        for key in ("step", "loss", "main_loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation", "lr"):
            assert line[key] == expected[key], (key, line["step"])
    assert second[-1]["validation_loss"] == uninterrupted[-1]["validation_loss"]


@pytest.mark.slow
def test_run_writes_the_documented_files(folder: Path) -> None:
    done = run_train(
        folder,
        "files",
        "task.steps=3",
        "checkpointing.every_steps=2",
        "samples.prompt=a1 b2",
        "track=wandb_offline",
        "profile.steps=[2]",
        "profile.ranks=[0,3]",
    )
    assert done.returncode == 0, done.stderr
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
        assert line["step_time"].keys() == parts
        # Saving happens between the steps.
        assert sum(line["step_time"].values()) - line["step_time"]["saving_seconds"] == pytest.approx(
            line["step_seconds"], rel=0.02
        )
        assert set(documented.split()) <= set(line)
        assert line["inter_node_bytes"] > 0
    tracked = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(tracked) == 1
    recorded = [flat(dict(line)) for line in read_metrics(folder, "files")]
    assert read_history(tracked[0]) == recorded
    assert {"router.layer_1.bias_std", "exchange.layer_1.bytes_within_nodes"} <= set(recorded[0])
    assert len((run / "loads.jsonl").read_text().splitlines()) == 3
    page = (run / "report.html").read_text()
    assert all(f"<h2>{part}</h2>" in page for part in ("Learning", "Pipeline", "Experts", "Checkpoints and events"))
    # The page has the style of pictures.
    assert re.sub(r"(?s)<style>.*?</style>", "", (run / "schedule.svg").read_text()).strip() in page
    assert "validation loss" in done.stdout
    assert "unigram entropy" in done.stdout
    assert "continuation of 'a1 b2'" in done.stdout
    assert re.search(r"drafts accepted \d+ % \(\d+ of \d+\), \d+ passes instead of \d+", done.stdout)


@pytest.mark.slow
def test_sample_of_no_tokens_is_not_generated(folder: Path) -> None:
    alone = ("parallelism=one_rank", "schedule=1f1b", "cluster.ranks_per_node=1")
    done = run_train(folder, "unsampled", *alone, "task.steps=1", "samples.prompt=a1", "samples.tokens=0")
    assert done.returncode == 0, done.stderr
    assert "checkpoint" in done.stdout
    assert "continuation" not in done.stdout


@pytest.mark.slow
def test_same_seed_gives_the_same_first_loss_under_every_layout(folder: Path, whole: list[dict[str, float]]) -> None:
    layout = ("parallelism=one_rank", "schedule=1f1b", "cluster.ranks_per_node=1")
    done = run_train(folder, "layout", "task.steps=1", *FLOAT64, *layout)
    assert done.returncode == 0, done.stderr
    assert whole[0]["loss"] == pytest.approx(read_metrics(folder, "layout")[0]["loss"], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("choices", [(), ("precision=bf16",)])
def test_non_finite_step_ends_every_rank_with_its_exit_code(folder: Path, choices: tuple[str, ...]) -> None:
    done = run_train(
        folder,
        f"wild_{len(choices)}",
        *choices,
        "task.steps=40",
        "optim.learning_rate=1e30",
        "optim/schedule=constant",
        "optim.schedule.warmup=0",
        "samples.prompt=",
    )
    assert done.returncode == 77, done.stdout + done.stderr
    assert re.search("error: (loss|gradient norm) is (inf|nan)", done.stdout + done.stderr)
    assert "<h2>Learning</h2>" in (folder / f"wild_{len(choices)}" / "report.html").read_text()


@pytest.mark.slow
def test_torchrun_over_two_nodes_equals_the_built_in_launcher(folder: Path, whole: list[dict[str, float]]) -> None:
    job = choices_of(folder, "torchrun", "task.steps=2", *FLOAT64)
    with reserved_port() as port:
        rendezvous = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous]
        nodes = [
            subprocess.Popen(
                [*command, f"--node-rank={node}", *job], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for node in range(2)
        ]
        try:
            outputs = [node.communicate(timeout=200)[0].decode() for node in nodes]
        finally:
            for node in nodes:
                node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    ours, theirs = read_metrics(folder, "torchrun"), whole[:2]
    assert [line["loss"] for line in ours] == [line["loss"] for line in theirs]
    assert ours[-1]["validation_loss"] == theirs[-1]["validation_loss"]
