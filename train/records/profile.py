"""Profiles chosen steps on chosen ranks: a Chrome trace, and a snapshot of the device's memory."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from train.config import ProfileConfig, TrainConfig

FOLDER_NAME = "profile"
LOGGER = logging.getLogger("train")


class StepProfiler:
    """The profiler of one rank. Steps that are not chosen cost nothing."""

    def __init__(self, config: ProfileConfig, out_dir: Path, rank: int, device: torch.device) -> None:
        self._config = config
        self._folder = out_dir / FOLDER_NAME
        self._device = device
        self._rank = rank
        self._is_chosen = rank in config.ranks

    @contextmanager
    def step(self, done: int) -> Iterator[None]:
        """Profiles step number `done`, from 1, if it is chosen; a step that fails writes no files."""
        if not self._is_chosen or done not in self._config.steps:
            yield
            return
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:  # the run's folder was deleted, which must not end the run here
            LOGGER.warning("%s: step %d is not profiled: %s", self._folder, done, error)
            yield
            return
        with ExitStack() as stack:
            if self._config.memory_snapshot and self._device.type == "cuda":
                stack.enter_context(self._memory(done))
            if self._config.trace:
                stack.enter_context(self._trace(done))
            yield

    def path(self, done: int, ending: str) -> Path:
        """Returns the path of a step's file of this rank: `profile/step-00000005_rank-00000.trace.json.gz`."""
        return self._folder / f"step-{done:08d}_rank-{self._rank:05d}.{ending}"

    @contextmanager
    def _trace(self, done: int) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            yield
        profiler.export_chrome_trace(str(self.path(done, "trace.json.gz")))

    @contextmanager
    def _memory(self, done: int) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        try:
            yield
            torch.cuda.memory._dump_snapshot(str(self.path(done, "memory.pickle")))
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)


def profile_notice(config: TrainConfig) -> str:
    """Returns a line about what is profiled and what cannot be; empty if nothing is."""
    chosen = config.profile
    kinds = ["traces"] * chosen.trace
    missing = ""
    if chosen.memory_snapshot and config.cluster.device == "cuda":
        kinds.append("memory snapshots")
    elif chosen.memory_snapshot:
        missing = "; memory snapshots need cluster.device=cuda, and are not written on the CPU"
    if not chosen.steps or not (kinds or missing):
        return ""
    steps, ranks = (", ".join(map(str, numbers)) for numbers in (chosen.steps, chosen.ranks))
    return f"profile: {' and '.join(kinds) or 'nothing'} of steps {steps} on ranks {ranks} in {FOLDER_NAME}/{missing}"
