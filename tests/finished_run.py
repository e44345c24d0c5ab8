"""A short run for tests that compare several ways of starting ranks."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from launch.config.folder import read_folder
from tests import ROOT
from tests.commands import run_command
from train.checkpoint.load import load_whole
from train.core.world import weight_dtype


def choices(folder: Path, name: str, num_steps: int, parallelism: str = "four_ranks") -> list[str]:
    """Returns the overrides of a float64 run, by default with four ranks, two per node, on the text in `folder`."""
    return [
        *(f"name={name}", f"out_dir={folder / name}", "cluster=laptop", "model=tiny"),
        *(f"parallelism={parallelism}", "data=files", f"data.paths=[{folder / 'text'}]"),
        *(
            f"data.cache_dir={folder / 'cache'}",
            "data.tokenizer_vocab_size=320",
            "data.validation_fraction=0.2",
            "validation.sequences=0",
        ),
        *("batch.sequence_length_tokens=32", "batch.global_sequences=8", "batch.micro_sequences=1"),
        *("precision=float64", "optim.sharding=replicated", "samples.prompt=", f"task.steps={num_steps}"),
    ]


def run_bare(folder: Path, name: str, num_steps: int, parallelism: str = "four_ranks") -> None:
    """Runs training with the built-in launcher."""
    done = run_command(["-m", "launch.train", *choices(folder, name, num_steps, parallelism)], timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def waiting_plugin(folder: Path) -> str:
    """Copies `waiting_plugin.py` into a new folder, and returns the override that loads it."""
    folder.mkdir()
    return f"plugins=[{shutil.copy(ROOT / 'tests' / 'waiting_plugin.py', folder)}]"


def num_steps_recorded(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def losses(run: Path) -> dict[int, float]:
    """Returns the metrics by step; for a repeated step, the last ones."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def assert_same_end(run: Path, other: Path) -> None:
    """Checks that two runs have the same loss in every step and bitwise equal weights in the last checkpoint."""
    assert losses(run) == losses(other)
    ours, theirs = _weights(run), _weights(other)
    assert ours.keys() == theirs.keys()
    assert ours
    different = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
    assert not different


def logs(folder: Path, patterns: Sequence[str] = ("slurm-*.log", "rank_*.error.log")) -> str:
    """Returns the end of a run's logs, for the message of a failed test."""
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in paths)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    config = read_folder(run)
    folder = run / "checkpoints" / f"step-{config.task.steps:08}"
    return load_whole(config.model, folder, weight_dtype(config.precision)).state_dict()
