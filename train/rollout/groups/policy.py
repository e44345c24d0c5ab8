"""Samples and scores the answers that a policy learns from, step by step.

A rollout is whole in the journal before the first update that learns from it. So a resumed run samples and scores
nothing twice.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import distributed as dist

from data.loader import Loader
from model.objective import MAIN
from model.objectives.policy_loss import PolicyLossConfig
from train.errors import UnsavedError
from train.network import weight_dtype
from train.replica import Replica
from train.rollout.config import RolloutConfig
from train.rollout.groups.advantages import EQUAL
from train.rollout.groups.fingerprint import fingerprint
from train.rollout.groups.held_out import HeldOutProblems
from train.rollout.groups.journal import (
    JournalError,
    journal_path,
    read_header,
    read_journal,
    remove_after,
    write_journal,
)
from train.rollout.groups.log_probs import answer_log_probs
from train.rollout.groups.make import PendingRollout, RolloutMaker, RolloutOrigin
from train.rollout.groups.packed_step import GroupAnswer, pack_step
from train.rollout.groups.records import RolledAnswer, RolledGroup, ScoredRollout
from train.rollout.groups.statistics import rollout_metrics
from train.rollout.pack import BatchShape
from train.rollout.routes.replay import load_rollout_routes, save_rollout_routes
from train.rollout.step_batch import StepBatch
from train.tasks.registry import Task

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalPlace:
    """Folders of the journals of a run, and the settings that they must have.

    Attributes:
        out_dir: folder of the run, which rank 0 writes.
        resumed: folder of the run that this one continues, if it is another; its journals are only read.
        settings: digest of the settings that decide answers and rewards.
    """

    out_dir: Path
    resumed: Path | None
    settings: str


class PolicySampler:
    """The sampler of a run that learns from rewards. All ranks have one and call it at the same points."""

    def __init__(
        self,
        replica: Replica,
        task: Task,
        maker: RolloutMaker,
        held_out: HeldOutProblems | None,
        place: JournalPlace,
        *,
        config: RolloutConfig,
        loss: PolicyLossConfig,
    ) -> None:
        """Stores the arguments.

        Args:
            held_out: problems of a validation; None: there is none.
            loss: decides which answers its denominator counts.
        """
        self._replica, self._task, self._maker, self._held_out, self._place = replica, task, maker, held_out, place
        self._config, self._loss = config, loss
        self._updates, self._steps_ahead, self._drops_cut = (
            config.updates,
            config.steps_ahead,
            config.cut_answers == "drop",
        )
        self._num_prompts = config.prompts
        self._current: ScoredRollout | None = None
        self._next: ScoredRollout | PendingRollout | None = None

    def open_step(self, loader: Loader, step: int) -> StepBatch:
        """Implements `StepSampler.open_step`.

        Raises:
            GenerateError, ScoringError, StoppedError: on every rank, if answers cannot be sampled or scored.
        """
        began = time.perf_counter()
        self._maker.take_seconds()  # of a step that was not finished
        number, part = divmod(step, self._updates)
        rollout = self._rollout(number, step, loader)
        if self._steps_ahead and part == 0:
            self._next = self._begin_next(rollout, step)
        groups = [rollout.groups[number] for number in self._numbers(rollout, part)]
        answers = [(group, answer) for group in groups if not group.dropped for answer in self._kept(group)]
        left_out = [answer for group in groups if group.dropped for answer in self._kept(group)]
        packed = pack_step(self._replica, answers, self._shape(loader), self._old(answers), rollout.routes)
        metrics = rollout_metrics(rollout, step) | {"seconds": time.perf_counter() - began}
        num_tokens = sum(len(answer.tokens) for answer in left_out)
        count = num_tokens if self._loss.normalizer == "tokens" else len(left_out)
        return replace(packed.step, metrics=metrics, more_counts={MAIN: count})

    def finish_step(self, step: int) -> Mapping[str, float]:
        """Implements `StepSampler.finish_step`. Completes the next rollout, if it was begun before the passes."""
        if isinstance(self._next, PendingRollout):
            self._next = self._write(self._maker.finish(self._next))
        return self._maker.take_seconds()

    def validate(self) -> Mapping[str, float] | None:
        """Implements `StepSampler.validate`."""
        return None if self._held_out is None else self._held_out.measure(self._maker)

    def roll_back(self, num_done: int) -> None:
        """Removes journals of rollouts whose first training step is after `num_done`."""
        self._current = self._next = None
        if self._replica.world.rank == 0:
            remove_after(self._place.out_dir, num_done)

    def close(self) -> None:
        """Ends the scorers and closes the engine. All ranks call it at the same point."""
        self._maker.close()

    def _rollout(self, number: int, step: int, loader: Loader) -> ScoredRollout:
        """Returns the rollout of a step: the present one, the one that was begun before, or a new one."""
        for known in (self._current, self._next):
            if isinstance(known, ScoredRollout) and known.header.rollout == number:
                self._current, self._next = known, None
                return known
        # A run that starts or resumes here: its weights are those of the rollout only if this is its first update.
        is_first, origin = step % self._updates == 0, self._origin(number, step)
        is_fresh = is_first and not (self._steps_ahead and number)
        found = self._read(number, origin, weights=origin.weights if is_fresh else None)
        if found is None:
            found = self._maker.finish(self._maker.begin(origin))
            if self._updates > 1 and not self._steps_ahead:
                found = self._with_old(found, loader)
            self._write(found)
        self._current = found
        return found

    def _numbers(self, rollout: ScoredRollout, part: int) -> list[int]:
        """Returns the groups of an update that count in the denominator of its loss, by number.

        Groups of equal rewards that are left out of the passes count, unless other groups replace them.
        """
        groups = rollout.groups
        found = [number for number, group in enumerate(groups) if not group.dropped]
        if self._loss.equal_groups == "count":
            equal = [number for number, group in enumerate(groups) if group.dropped == EQUAL]
            found = sorted([*found, *equal[: max(self._num_prompts - len(found), 0)]])
        return found[part :: self._updates]

    def _begin_next(self, rollout: ScoredRollout, step: int) -> ScoredRollout | PendingRollout:
        """Returns the next rollout from the journal, or starts to sample it with the present weights."""
        origin = self._origin(rollout.header.rollout + 1, step, rollout.header.next_prompt)
        return self._read(origin.rollout, origin, weights=origin.weights) or self._maker.begin(origin)

    def _origin(self, number: int, step: int, first_prompt: int | None = None) -> RolloutOrigin:
        """Returns where a rollout comes from. `step` is the one that samples it."""
        return RolloutOrigin(
            rollout=number,
            step=number * self._updates,
            version=step,
            weights=fingerprint(self._replica),
            settings=self._place.settings,
            first_prompt=self._first_prompt(number) if first_prompt is None else first_prompt,
        )

    def _first_prompt(self, number: int) -> int:
        """Returns the position of the first prompt of a rollout, after those of the rollout before it."""
        found = [number * self._num_prompts]
        if number and self._replica.world.rank == 0:
            paths = [journal_path(folder, (number - 1) * self._updates + 1) for folder in self._folders]
            headers = [header for header in map(read_header, paths) if header is not None]
            found = [int(header["next_prompt"]) for header in headers[:1]] or found
        return self._broadcast(found)

    def _read(self, number: int, origin: RolloutOrigin, weights: str | None) -> ScoredRollout | None:
        """Returns a rollout from the journal, or None if it is not whole or was made otherwise."""
        found: list[tuple[Path, ScoredRollout] | None] = [None]
        if self._replica.world.rank == 0:
            found = [self._find(number, origin, weights)]
        if (known := self._broadcast(found)) is None:
            return None
        folder, rollout = known
        if not self._config.keep_routing:
            return rollout
        routes = load_rollout_routes(self._replica, folder, rollout)
        return None if routes is None else replace(rollout, routes=routes)

    def _find(self, number: int, origin: RolloutOrigin, weights: str | None) -> tuple[Path, ScoredRollout] | None:
        for folder in self._folders:
            try:
                rollout = read_journal(folder, origin.step + 1)
            except JournalError:
                continue
            header = rollout.header
            is_same = header.rollout == number and header.settings == origin.settings
            if is_same and weights in (None, header.weights):
                return folder, rollout
        return None

    @property
    def _folders(self) -> list[Path]:
        return [self._place.out_dir, *([] if self._place.resumed is None else [self._place.resumed])]

    def _write(self, rollout: ScoredRollout) -> ScoredRollout:
        """Writes a rollout's journal on rank 0. All ranks call it.

        Raises:
            UnsavedError: on every rank, if the folder does not take it.
        """
        if rollout.routes is not None:
            save_rollout_routes(self._replica, self._place.out_dir, rollout)
        problem = [""]
        if self._replica.world.rank == 0:
            dtype = np.float64 if weight_dtype(self._replica.config.precision) is torch.float64 else np.float32
            try:
                write_journal(self._place.out_dir, rollout, dtype)
            except OSError as error:
                problem = [f"{self._place.out_dir}: takes no journal of rollouts: {error}"]
        if text := self._broadcast(problem):
            raise UnsavedError(text)
        return rollout

    def _broadcast(self, found: list[ValueT]) -> ValueT:
        """Returns on all ranks what rank 0 found."""
        world = self._replica.world
        with world.phase("journal of the rollout"):
            dist.broadcast_object_list(found, src=0, group=world.groups.world)
        return found[0]

    def _with_old(self, rollout: ScoredRollout, loader: Loader) -> ScoredRollout:
        """Returns a rollout with log-probabilities before the first update, packed as each update does."""
        shape, groups = self._shape(loader), list(rollout.groups)
        for part in range(self._updates):
            numbers = [number for number in self._numbers(rollout, part) if not groups[number].dropped]
            parts = [(number, answer) for number in numbers for answer in self._kept(groups[number])]
            answers = [(groups[number], answer) for number, answer in parts]
            packed = pack_step(self._replica, answers, shape, None, rollout.routes)
            old = answer_log_probs(self._replica, self._task, packed, self._config.temperature)
            found = {
                (number, answer.sample): replace(answer, old_log_probs=values)
                for (number, answer), values in zip(parts, old, strict=True)
            }
            for number in numbers:
                with_old = tuple(found.get((number, each.sample), each) for each in groups[number].answers)
                groups[number] = replace(groups[number], answers=with_old)
        return replace(rollout, groups=tuple(groups))

    def _kept(self, group: RolledGroup) -> Sequence[RolledAnswer]:
        """Returns the answers of a group that are trained."""
        return [
            answer for answer in group.answers if answer.tokens and not (self._drops_cut and answer.finish == "length")
        ]

    def _old(self, answers: Sequence[GroupAnswer]) -> Mapping[int, Sequence[float]] | None:
        """Returns the log-probabilities before an update by the number of the answer.

        One step ahead they are the sampler's, and with several updates those before the first one. None if the update
        uses its own.
        """
        if self._steps_ahead:
            return {at: answer.log_probs for at, (_, answer) in enumerate(answers)}
        if self._updates == 1:
            return None
        return {at: answer.old_log_probs or () for at, (_, answer) in enumerate(answers)}

    def _shape(self, loader: Loader) -> BatchShape:
        batch = self._replica.config.batch
        return BatchShape(
            num_sequences=self._replica.global_sequences,
            length=batch.sequence_length_tokens,
            pad_id=loader.pad_id,
        )
