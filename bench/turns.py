"""Measures CPU seconds of steps of two trainers, each in a separate process with one thread, whose steps alternate.

TRL is an optional extra: `pip install -e .[bench]`.
"""

import importlib.metadata
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer
    from train.config import TrainConfig

NUM_WARM_STEPS = 3
_Name = TypeVar("_Name")


@dataclass(frozen=True, slots=True)
class StepSample:
    """CPU seconds of a contender's steps: median and minimum, and the last loss."""

    median: float
    shortest: float
    loss: float


class Steps:
    """Serves one pipe: measures CPU seconds from one report to the next, while the other contender waits."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began = 0.0

    def start(self) -> None:
        self._pipe.recv()
        self._began = time.process_time()

    def end(self, loss: float) -> None:
        self._pipe.send((time.process_time() - self._began, loss))


def missing_trl() -> str | None:
    """Returns why TRL cannot be measured, or None."""
    return None if find_spec("trl") else "trl is not installed; pip install -e .[bench]"


def measure_in_turns(
    num_rounds: int, contenders: Mapping[str, Callable[[int, Connection], None]]
) -> dict[str, StepSample]:
    """Runs steps of all contenders in turn, after unmeasured ones.

    Args:
        contenders: functions that run a number of steps, each between a `Steps.start` and a `Steps.end`.
    """
    found = {}
    for name, steps in steps_in_turns(NUM_WARM_STEPS, num_rounds, contenders).items():
        seconds = [taken for taken, _ in steps]
        found[name] = StepSample(statistics.median(seconds), min(seconds), steps[-1][1])
    return found


def steps_in_turns(
    num_warm: int, num_rounds: int, contenders: Mapping[_Name, Callable[[int, Connection], None]]
) -> dict[_Name, list[Any]]:
    """Runs each contender in a process, and returns what it reports of each step after `num_warm`, in turns."""
    context = multiprocessing.get_context("spawn")
    started = []
    for name, serve in contenders.items():
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(num_warm + num_rounds, there), daemon=True)
        process.start()
        there.close()
        started.append((name, process, here))
    reports: dict[_Name, list[Any]] = {name: [] for name in contenders}
    for turn in range(num_warm + num_rounds):
        for name, _, pipe in started:
            pipe.send(True)
            report = pipe.recv()
            if turn >= num_warm:
                reports[name].append(report)
    for _, process, _ in started:
        process.join()
    return reports


def serve_here(config: "TrainConfig", pipe: Connection) -> None:
    """Trains with the project's own step on one rank, in the environment that the launcher sets for it."""
    from torch import distributed as dist

    from launch.ranks.machine import apply_rank_environment
    from tests.train.job import close_job, open_job, open_loader
    from train.core.step import train_step

    apply_rank_environment(config.cluster)
    steps = Steps(pipe)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    learner, loader = open_job(config), open_loader(config)
    for step in range(config.task.steps):
        steps.start()
        steps.end(train_step(learner, config.task, loader, step).losses.main)
    close_job(learner)
    dist.destroy_process_group()


def trl_tokenizer(tokenizer: "Tokenizer", folder: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer.save(Path(folder) / "tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=f"{folder}/tokenizer.json",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
    )


def trl_settings(folder: str, num_steps: int) -> dict[str, Any]:
    """Returns the arguments that all of TRL's trainers get."""
    return {
        "output_dir": folder,
        "max_steps": num_steps,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def serve_trl(trainer_class: Callable[..., Any], num_steps: int, pipe: Connection, **parts: Any) -> None:
    """Trains with a trainer of TRL that is made of these parts."""
    from transformers import TrainerCallback

    steps = Steps(pipe)

    class Serve(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *rest: Any, **values: Any) -> None:
            steps.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **values: Any) -> None:
            steps.end(float("nan"))
            if state.global_step < num_steps:
                steps.start()

    trainer_class(callbacks=[Serve()], **parts).train()


def trl_text(subject: str, samples: Mapping[str, StepSample], most: float) -> str:
    """Formats a table of this project and TRL."""
    ours, trl = samples["here"], samples["TRL"]
    lines = [
        f"A step of {subject}, one thread, interleaved; TRL {importlib.metadata.version('trl')}, target <= {most} of "
        f"its CPU seconds",
        f"{'':8}{'CPU s':>8}{'least':>8}{'loss':>8}",
        *(f"{name:8}{each.median:8.3f}{each.shortest:8.3f}{each.loss:8.3f}" for name, each in samples.items()),
        f"{'ratio':8}{ours.median / trl.median:8.2f}{ours.shortest / trl.shortest:8.2f}",
    ]
    return "\n".join(lines)


def step_rows(samples: Mapping[str, StepSample]) -> list[dict[str, Any]]:
    """Returns the same as plain data."""
    return [
        {"contender": name, "cpu_seconds": each.median, "least_cpu_seconds": each.shortest}
        for name, each in samples.items()
    ]
