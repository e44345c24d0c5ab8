"""Starts runs that learn from rewards, of which a rank is killed in a chosen phase of a step.

`python -m tests.train.post.killed_run FOLDER PHASE...` runs each phase in a folder of its name in FOLDER.
After the kill, all ranks restart from the newest checkpoint. The phase `none` kills nothing. A phase may follow a
variant of the run, as in `ahead-update`.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from launch.cli.entry import command
from launch.config.folder import check_folder, write_run_folder
from launch.config.run import check, compose_run
from launch.ranks.local import preload_modules, run_ranks, start_fork_server
from train.config import TrainConfig

KILLED_IN_STEP = 3
"""Index of the step in which a rank is killed; the newest checkpoint is that after 2 steps."""
NONE = "none"
PHASES = ("drawing", "sampling", "rewards", "journal", "reference", "training", "update", "checkpoint")
VARIANTS = {"ahead": ("rollout.steps_ahead=1",), "updates": ("rollout.updates=2",)}
CHOICES = (
    *(
        "experiment=arithmetic_grpo",
        "init_from=random",
        "name=killed",
        "resume=auto",
        "cluster.max_restarts=1",
        "schedule=1f1b",
    ),
    *("model.hidden_size=32", "model.num_layers=2", "data.num_digits=4", "data.num_samples=60", "task.steps=5"),
    *("data.validation_fraction=0.2", "task/loss=v3_2", "task.loss.kl_weight=0.01", "reward=python"),
    *("rollout.prompts=4", "rollout.samples=4", "rollout.max_new_tokens=5", "rollout.held_out=4"),
    *("rollout.held_out_samples=1", "batch.sequence_length_tokens=48", "batch.global_sequences=4"),
    *("validation.every_steps=2", "checkpointing.every_steps=2", "track.picture_every_steps=0"),
    *("cluster.timeout_seconds=60", "batch.micro_sequences=2"),
)
REWARD_SOURCE = """
def score(prompt, answer, expected):
    return sum(each in "02468" for each in answer) / 5
"""


def overrides(folder: Path, phase: str) -> list[str]:
    """Returns the overrides of a run, whose folder has the name of the phase."""
    variant, has_variant, _ = phase.partition("-")
    return [
        *CHOICES,
        *(VARIANTS[variant] if has_variant else ()),
        f"out_dir={folder / phase}",
        f"data.cache_dir={folder / 'cache'}",
        f"reward.parts=[{{kind: python, weight: 1, path: {folder / 'reward.py'}, function: score, seconds: 30, "
        f"num_workers: 1}}]",
    ]


def run_rank(config: TrainConfig) -> int:
    """Runs one rank, which kills itself in the phase that names its folder, once."""
    from train.run import main as run

    if os.environ["RANK"] == "0":
        _arm(Path(config.out_dir))
    return run(config)


def _arm(out_dir: Path) -> None:
    """Replaces the function of a phase by one that kills this process in the chosen step."""
    from model.stage import StageRun
    from score.reward import Reward
    from train.checkpoint import save
    from train.optim.staged import StagedAdamW
    from train.post import journal
    from train.post.comparison import Reference
    from train.post.pipeline import ReplicaPipeline
    from train.post.sample import PromptOrder
    from train.post.sampler import PolicySampler

    step, plain = [-1], PolicySampler.prepare

    def prepare(sampler: PolicySampler, loader: Any, number: int) -> Any:
        step[0] = number
        return plain(sampler, loader, number)

    PolicySampler.prepare = prepare  # type: ignore[assignment, method-assign]
    # A journal has two files. Between them, the first one is on the disk and the second is not.
    places: dict[str, tuple[Any, str, int]] = {
        "drawing": (PromptOrder, "take", 1),
        "sampling": (ReplicaPipeline, "run", 1),
        "rewards": (Reward, "score_groups", 1),
        "journal": (journal, "replace_file", 2),
        "reference": (Reference, "add", 1),
        "training": (StageRun, "backward", 3),
        "update": (StagedAdamW, "update", 1),
        "checkpoint": (save, "write_part", 1),
    }
    phase = out_dir.name.rpartition("-")[2]
    if phase in places:
        owner, name, count = places[phase]
        setattr(owner, name, _killing(getattr(owner, name), step, count, out_dir / "killed"))


def _killing(plain: Callable[..., Any], step: list[int], count: int, note: Path) -> Callable[..., Any]:
    calls = [0]

    def wrapped(*arguments: Any, **named: Any) -> Any:
        # A checkpoint is written while the next step runs.
        if step[0] >= KILLED_IN_STEP and not note.exists():
            calls[0] += 1
            if calls[0] == count:
                note.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return plain(*arguments, **named)

    return wrapped


@cache
def composed(folder: Path, variant: str) -> TrainConfig:
    """Returns the checked configuration of a variant, for a run that no phase kills."""
    config = compose_run(overrides(folder, f"{variant}{NONE}"))
    check(config)
    return config


def run_phase(folder: Path, phase: str) -> int:
    """Runs one command to its end, and returns its exit code."""
    # Ranks import this module by its full name, and here it runs as __main__.
    from tests.train.post import killed_run

    config = composed(folder, phase[: -len(phase.rpartition("-")[2])])
    config = replace(config, out_dir=str(folder / phase))
    check_folder(config)
    write_run_folder(config, datetime.now())
    return run_ranks(folder / phase, config.parallelism.world_size, killed_run.run_rank)


def main(arguments: Sequence[str]) -> int:
    """Runs the phases. Returns the first exit code that is not 0."""
    folder, *phases = arguments
    (Path(folder) / "reward.py").write_text(REWARD_SOURCE)
    config = composed(Path(folder), "")
    start_fork_server(config.cluster, preload_modules(config.cluster))
    codes = {phase: run_phase(Path(folder), phase) for phase in phases}
    print(codes)
    return next((code for code in codes.values() if code), 0)


if __name__ == "__main__":
    sys.exit(command("train", main))
