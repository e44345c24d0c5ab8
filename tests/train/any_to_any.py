"""Tests that every layout resumes from every other's checkpoint with the losses of the uninterrupted run.

`python -m tests.train.any_to_any [PART]` prints a table of all ordered pairs of 15 layouts, or of those whose names
hold PART, and ends with 1 if a pair fails. In float64, as a change of layout changes the order of sums.
"""

import hashlib
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import distributed as dist

from comm.config import AllToAllDispatchConfig, Cut, LocalDispatchConfig, ParallelismConfig
from data.loader import Batch, Loader
from data.prepare import prepare
from dualpipe.ir import Schedule
from dualpipe.registry import ScheduleConfig
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, TASK, tiny_config, write_text
from tests.train.job import close_job, open_job, save_checkpoint
from train.checkpoint import load as checkpoint
from train.config import TrainConfig
from train.core.step import train_step

STEPS_BEFORE = 2
STEPS_AFTER = 10
TOLERANCE = 1e-6
AUTO = Cut("auto")

Samples = dict[tuple[int, int], str]
"""By step and place in the global batch, a hash of the sequence that was read."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layout: pipeline, data and expert ranks, schedule, sequences in a micro-batch, cut, ranks of a sequence."""

    pipeline: int
    data: int
    expert: int
    kind: str
    micro: int = 1
    cut: Cut = AUTO
    context: int = 1

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.context

    def __str__(self) -> str:
        cut = self.cut.to_plain()
        mesh = f"{self.pipeline}x{self.data}" + (f"x{self.context}" if self.context > 1 else "")
        return f"{self.kind} {mesh} e{self.expert} m{self.micro} {cut}".replace(" auto", "")


PLACES = (
    Place(1, 1, 1, "1f1b", 2),
    Place(1, 2, 2, "1f1b"),
    Place(1, 4, 2, "1f1b"),
    Place(2, 1, 1, "1f1b"),
    Place(2, 2, 1, "v_half", 2),
    Place(2, 1, 1, "dualpipe"),
    Place(2, 2, 2, "dualpipe_split"),
    Place(2, 2, 2, "dualpipe_v", 2),
    Place(4, 1, 1, "dualpipe_v"),
    Place(4, 1, 1, "dualpipe_split", 2),
    Place(4, 2, 2, "dualpipe"),
    Place(2, 4, 4, "zb_v"),
    Place(1, 1, 1, "1f1b", 2, context=2),
    Place(2, 1, 4, "dualpipe", context=4),
    Place(2, 2, 2, "zb_v", context=2),
)


@dataclass(frozen=True, slots=True)
class Part:
    """The record of some steps on one rank: the losses of all, and the samples that it read itself."""

    losses: list[float]
    samples: Samples


def config_at(
    folder: Path,
    place: Place,
    steps_after: int = STEPS_AFTER,
    sequences: int = BATCH.global_sequences,
    num_layers: int = 8,
) -> TrainConfig:
    """The run in a layout; the architecture and the samples are the same in all of them."""
    local = LocalDispatchConfig(kind="local", payload="full")
    exchange = AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=4, node_cap="verify")
    return tiny_config(
        folder,
        out_dir=str(folder / "runs" / str(place).replace(" ", "_")),
        parallelism=ParallelismConfig(
            pipeline=place.pipeline, data=place.data, expert=place.expert, cut=place.cut, context=place.context
        ),
        schedule=ScheduleConfig(kind=place.kind, chunks=None, pairing="overlapped"),
        dispatch=local if place.expert == 1 else exchange,
        model=replace(MODEL, num_layers=num_layers),
        batch=replace(BATCH, global_sequences=sequences, micro_sequences=place.micro),
        task=replace(TASK, steps=STEPS_BEFORE + steps_after),
    )


class WatchedLoader(Loader):
    """Remembers what was read."""

    def watch(self) -> Samples:
        """Starts to record batches, and returns the record."""
        self.samples: Samples = {}
        return self.samples

    def batch(self, step: int, first: int, count: int) -> Batch:
        batch = super().batch(step, first, count)
        for index, tokens in enumerate(batch.tokens_BT):
            self.samples[step, first + index] = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return batch


def begin(
    rank: int, world_size: int, configs: Sequence[TrainConfig], schedule: Schedule | None = None
) -> list[tuple[Path, Part]]:
    """Runs each configuration, and returns its checkpoint and the steps after it without interruption.

    Without a schedule, each follows the configured one.
    """
    return [_begin(config, schedule) for config in configs]


def _begin(config: TrainConfig, schedule: Schedule | None) -> tuple[Path, Part]:
    learner, prepared = open_job(config, schedule), prepare(config.data, config.batch.sequence_length_tokens)
    loader = WatchedLoader(prepared, sizes=config.batch_sizes)
    loader.watch()
    for step in range(STEPS_BEFORE):
        train_step(learner, config.task, loader, step)
    folder, samples = save_checkpoint(config, learner, STEPS_BEFORE, prepared), loader.watch()
    losses = [train_step(learner, config.task, loader, step).losses.total for step in _after(config)]
    dist.barrier()
    close_job(learner)
    return folder, Part(losses, samples)


def go_on(
    rank: int, world_size: int, jobs: Sequence[tuple[TrainConfig, Path]], schedule: Schedule | None = None
) -> list[Part]:
    """Resumes from each checkpoint under the given configuration, and returns the steps after it.

    Without a schedule, each follows the configured one.
    """
    return [_go_on(config, folder, schedule) for config, folder in jobs]


def _go_on(config: TrainConfig, folder: Path, schedule: Schedule | None) -> Part:
    learner, prepared = open_job(config, schedule), prepare(config.data, config.batch.sequence_length_tokens)
    loader = WatchedLoader(prepared, sizes=config.batch_sizes)
    samples = loader.watch()
    checkpoint.load(learner, folder)
    losses = [train_step(learner, config.task, loader, step).losses.total for step in _after(config)]
    dist.barrier()
    close_job(learner)
    return Part(losses, samples)


def merged(parts: Sequence[Part]) -> Part:
    """Merges the records of all ranks, which must agree on losses and on samples that two of them read."""
    samples: Samples = {}
    for part in parts:
        assert part.losses == parts[0].losses
        for key, seen in part.samples.items():
            assert samples.setdefault(key, seen) == seen
    return Part(parts[0].losses, samples)


def worst_difference(ours: Part, theirs: Part) -> float:
    """Returns the largest relative difference between the losses of two runs."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))


def _after(config: TrainConfig) -> range:
    return range(STEPS_BEFORE, config.task.steps)


def compare(
    folder: Path,
    pairs: Sequence[tuple[Place, Place]],
    steps_after: int = STEPS_AFTER,
    sequences: int = BATCH.global_sequences,
    num_layers: int = 8,
) -> Iterator[tuple[str, float]]:
    """Runs pairs of a writing and a reading layout; gives each pair's name and the worst relative difference of a loss.

    Infinite where other samples were read. One world is started for each layout that writes, one for each that reads.
    """
    written: dict[Place, tuple[Path, Part]] = {}
    for place in dict.fromkeys(writer for writer, _ in pairs):
        config = config_at(folder, place, steps_after, sequences, num_layers)
        seen = [part for (part,) in run_ranks(place.world_size, begin, [config], timeout_seconds=600)]
        written[place] = seen[0][0], merged([part for _, part in seen])
    for place in dict.fromkeys(reader for _, reader in pairs):
        writers = [writer for writer, reader in pairs if reader == place]
        config = config_at(folder, place, steps_after, sequences, num_layers)
        jobs = [(config, written[writer][0]) for writer in writers]
        seen_by_rank = run_ranks(place.world_size, go_on, jobs, timeout_seconds=1800)
        for index, writer in enumerate(writers):
            ours, theirs = merged([parts[index] for parts in seen_by_rank]), written[writer][1]
            is_same = ours.samples == theirs.samples
            yield f"{writer} -> {place}", worst_difference(ours, theirs) if is_same else float("inf")


def main(part: str = "") -> int:
    """Runs all ordered pairs whose names hold `part`; the exit code."""
    pairs = [(a, b) for a in PLACES for b in PLACES if a != b and part in f"{a} -> {b}"]
    started, failed, worst = time.monotonic(), 0, 0.0
    with tempfile.TemporaryDirectory(prefix="any-to-any-") as name:
        write_text(Path(name))
        for pair, difference in compare(Path(name), pairs):
            failed += not difference <= TOLERANCE
            worst = max(worst, difference)
            print(f"{pair:<60} {difference:.1e}{'' if difference <= TOLERANCE else '  FAILED'}", flush=True)
    print(
        f"{len(pairs)} pairs, the next {STEPS_AFTER} losses at most {worst:.1e} off, relative; {failed} failed; "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if failed or not pairs else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
