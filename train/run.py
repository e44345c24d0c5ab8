"""Runs one rank of a training run, from an empty process to an exit code or a crash report."""

import faulthandler
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import distributed as dist

from comm.agreement import exchange_reports
from comm.exits import EXIT_CONFIGURATION, EXIT_NON_FINITE, EXIT_OTHER, EXIT_PREEMPTED, Preemption
from comm.groups import start, stop
from comm.layout import Layout
from comm.watchdog.collective_log import CollectiveLog, cuda_mark
from comm.watchdog.job_start import AbsentError
from comm.watchdog.membership import JobKeyError, Membership
from comm.watchdog.ranks import RankSet
from comm.watchdog.rendezvous import Job, join
from comm.watchdog.verdict import Verdict
from data.shards.open import Prepared
from train.callbacks import Callbacks
from train.checkpoint.load import resolve_resume
from train.config import TrainConfig
from train.core.learner import Learner, LearnersByBatchSize, open_learner
from train.core.replica import open_replica
from train.core.world import ReplicaConfig, World, open_world
from train.errors import CallbackError, PreemptedError, RescuedError, StoppedError, UnscoredError
from train.files.json_lines import try_append_event
from train.files.run_end import is_last_attempt, report_end
from train.files.run_files import LOG_FOLDER, ExitReason, RankFiles, State, StatusFile, write_end, write_error
from train.loop import TrainingLoop
from train.optim.adamw import load_cpu_adam
from train.optim.learning_rate import OptimConfig
from train.post.comparison import open_comparison
from train.post.sampler import open_hook
from train.predict.measured import MeasuredRun, MeasuredTimes, StepTimes, TimesScope, layer_parameters, try_to_write
from train.records.display import PhaseLines, report_breaks
from train.records.reporter import open_reporter, print_run_summary
from train.report.page import Report
from train.start.plan import Plan, plan, tune_kernels
from train.start.startup import (
    broadcast_config,
    compare_ranks,
    load_initial_weights,
    load_resumed,
    prepare_corpus_together,
    raise_if_preempted,
)
from train.terminal import printable_on

LOGGER = logging.getLogger("train")
_MAX_LISTED = 64


def main(config: TrainConfig, *, reports_on_stderr: bool = False, callbacks: Callbacks | None = None) -> int:
    """Joins the job, trains and leaves the job. Every rank calls it with the same configuration.

    Rank 0's `out_dir` is the folder of the run. The configurations of other ranks may leave it empty. If a rank is lost
    or does not respond in time, this function ends the process with exit code 78 or 76 and a crash report in the log.
    SIGTERM, SIGUSR1 and SIGHUP preempt the run from here on: all ranks leave at the same point with exit code 75.

    Returns:
        The exit code: 0 if the run is done, 1 if its folder took no checkpoint or its answers cannot be scored, 2 if
        ranks have different configurations, 75 if it was preempted and saved, 77 if the guard stopped it.
    """

    def train(joined: JoinedRank) -> int:
        return _TrainingRank(joined, callbacks).run(config)

    return run_in_job(config, train, reports_on_stderr=reports_on_stderr)


@dataclass(frozen=True, kw_only=True, slots=True)
class JoinedRank:
    """What a rank has from joining its job on, before it communicates."""

    job: Job
    log: CollectiveLog
    crash_reporter: "CrashReporter"
    preemption: Preemption
    lines: PhaseLines


def run_in_job(config: TrainConfig, run: Callable[[JoinedRank], int], *, reports_on_stderr: bool = False) -> int:
    """Joins the job, runs a function on this rank, leaves the job, and returns the function's exit code."""
    preemption = Preemption.of_process()
    member = Membership.from_environment()
    log = CollectiveLog()
    crash_reporter = CrashReporter(
        RankFiles(member.rank, config.parallelism.world_size, config.cluster.ranks_per_node),
        log,
        reports_on_stderr=reports_on_stderr,
        on_end=config.track.on_end,
    )
    crash_reporter.out_dir = Path(config.out_dir) if config.out_dir else None
    lines = PhaseLines(partial(print, flush=True) if member.rank == 0 else None)
    with lines.timed("start of the ranks"):
        job = _join(config, member, log, crash_reporter, reports_on_stderr=reports_on_stderr)
    try:
        code = run(JoinedRank(job=job, log=log, crash_reporter=crash_reporter, preemption=preemption, lines=lines))
    except BaseException as error:
        if isinstance(error, CallbackError) or member.world_size == 1:  # no other rank waits for this one
            job.close()
            stop()
        elif isinstance(error, Exception):
            job.watchdog.report_error(error)
        raise
    job.close()
    stop()
    return code


def _join(
    config: TrainConfig,
    member: Membership,
    log: CollectiveLog,
    crash_reporter: "CrashReporter",
    *,
    reports_on_stderr: bool,
) -> Job:
    """Joins the job, or ends the process if other ranks are absent."""
    try:
        seconds = config.cluster.timeout_seconds
        return join(member, log, seconds, crash_reporter.write, key_folder=crash_reporter.out_dir)
    except AbsentError as error:
        crash_reporter.write(error.verdict)
        os._exit(error.verdict.code)
    except JobKeyError as error:
        if reports_on_stderr and member.rank != 0:  # rank 0's error is printed by its caller
            os.write(sys.stderr.fileno(), printable_on(sys.stderr, f"error: {error}\n").encode())
        raise


def write_probe(config: TrainConfig, planned: Plan, device: torch.device) -> None:
    """Writes the times that the probe measured, if it ran, into the run's folder. Only rank 0 writes."""
    if planned.times is None or dist.get_rank() != 0:
        return
    scope = TimesScope(
        precision=config.precision.kind,
        layer_parameters=layer_parameters(config.model),
        expert=config.parallelism.expert,
        tokens=config.batch.micro_sequences * config.rank_sequence_tokens,
        context=config.parallelism.context,
        mtp_depth=config.model.mtp_depth,
        recomputed=config.computing.recomputed_names,
    )
    times = StepTimes(times=planned.times, alone=1.0)
    measured = MeasuredTimes(
        step=0,
        device="cuda" if device.type == "cuda" else "cpu",
        cut=tuple(map(len, planned.cut)),
        scope=scope,
        measured=times,
    )
    try_to_write(Path(config.out_dir), MeasuredRun(measured=measured, schedule=planned.schedule))


@dataclass(frozen=True, slots=True)
class _RunOutcome:
    """How a run ended; `error` is raised again once everything is closed."""

    state: State
    code: int
    reason: str = ""
    error: CallbackError | None = None

    @classmethod
    def of_error(cls, error: PreemptedError | StoppedError | RescuedError | CallbackError) -> "_RunOutcome":
        match error:
            case PreemptedError():
                return cls("preempted", EXIT_PREEMPTED, str(error))
            case UnscoredError():
                return cls("stopped", EXIT_OTHER, str(error))
            case StoppedError():
                return cls("stopped", EXIT_NON_FINITE, str(error))
            case RescuedError():
                return cls("stopped", EXIT_OTHER, str(error))
            case CallbackError():
                return cls("stopped", EXIT_OTHER, f"callback {error}", error)


class _TrainingRank:
    """One rank of a training run that has joined its job."""

    def __init__(self, joined: JoinedRank, callbacks: Callbacks | None) -> None:
        self._job = joined.job
        self._log = joined.log
        self._crash_reporter = joined.crash_reporter
        self._preemption = joined.preemption
        self._lines = joined.lines
        self._callbacks = callbacks
        self._learner: Learner | None = None
        self._rejected_checkpoints: tuple[str, ...] = ()
        self._ranks = range(0)

    def run(self, config: TrainConfig) -> int:
        """Runs everything between joining and leaving the job, and returns the exit code."""
        self._ranks = range(config.parallelism.world_size)
        layout = Layout(config.parallelism, config.cluster.ranks_per_node)
        with self._lines.timed("start of communication"), self._phase("start of communication"):
            device = start(config.cluster, self._job.store)
            refusal = compare_ranks(config) or self._missing_optimizer(config.optim)
            if refusal:
                return self._refuse(config, refusal)
            config, ended = broadcast_config(config)
        if ended is not None:
            return ended
        status = self._open_status(config)
        with self._phase("choice of the checkpoint"):
            config, self._rejected_checkpoints = resolve_resume(config)
        if device.type == "cuda":
            self._log.follow_streams(cuda_mark(device))
        with self._phase("choice of the schedule"):
            planned = plan(config, layout, device)
        write_probe(config, planned, device)
        with self._phase("tuning of kernels"):
            tune_kernels(config, layout, device, has_probed=planned.times is not None)
        with self._phase("creation of process groups"):
            depth = config.model.mtp_depth
            world = open_world(layout, planned.schedule, depth, config.cluster, device, self._log, self._preemption)
        try:
            raise_if_preempted(world)
            with self._lines.timed("preparation of the data"):
                prepared = prepare_corpus_together(config, world)
            raise_if_preempted(world)
            with self._lines.timed("construction of the model"), self._phase("construction of the model"):
                replica = open_replica(
                    world, ReplicaConfig.of_run(config), planned.schedule, planned.cut, is_proven=True
                )
                comparison = open_comparison(config, replica)
                hook = open_hook(config, replica, prepared, comparison, self._lines.say)
                self._learner = open_learner(replica, config.optim, config.ema, comparison, hook)
            end = _RunOutcome("done", 0, self._train(config, self._learner, prepared, planned, status))
        except (PreemptedError, StoppedError, RescuedError, CallbackError) as error:
            end = _RunOutcome.of_error(error)
        self._close(world)
        status.ended(end.state, end.code, end.reason)
        if end.code and world.rank == 0:
            Report(config).try_to_write()  # it says at its top that the run has failed
        if end.state == "preempted" and world.rank == 0:
            try_append_event(Path(config.out_dir), "preempted", status.step, end.reason)
        if end.error is not None:
            raise end.error
        return end.code

    def _refuse(self, config: TrainConfig, reason: str) -> int:
        """Ends a run that all ranks refuse; one rank of each node prints why. Returns the exit code."""
        if config.out_dir and dist.get_rank() == 0:
            self._open_status(config).ended("stopped", EXIT_CONFIGURATION, reason)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"error: {reason}\n".encode())
        return EXIT_CONFIGURATION

    def _missing_optimizer(self, optim: OptimConfig) -> str:
        """Loads DeepSpeed's CPU Adam if the run uses it. Returns why some rank cannot, equal on all ranks."""
        if optim.offload is not True or optim.moments == "bf16":
            return ""
        with self._lines.timed("DeepSpeed's CPU Adam, which each machine compiles once"):
            report = exchange_reports(load_cpu_adam() or None)
        if not report.first:
            return ""
        first = report.first[0]
        return (
            f"optim.offload: true needs DeepSpeed's CPU Adam, which rank {first.rank} cannot build, for lack of a C++ "
            f"compiler, ninja or the toolkit of CUDA: {first.text}; nearest valid: optim.offload=torch"
        )

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self._log.phase("world", self._ranks, name)

    def _open_status(self, config: TrainConfig) -> StatusFile:
        """Opens `status.json`. From here on, the run's folder also receives crash reports and output errors."""
        out_dir = Path(config.out_dir)
        is_first = dist.get_rank() == 0
        self._crash_reporter.out_dir = out_dir
        ranks = config.parallelism.world_size
        status = StatusFile(out_dir, is_writer=is_first, num_steps=config.task.steps, num_ranks=ranks)
        status.starting()
        if is_first:
            report_breaks(lambda text: try_append_event(out_dir, "output_broken", status.step, text))
        return status

    def _close(self, world: World) -> None:
        """Closes what the rank opened, after all ranks have arrived here."""
        with self._log.collective("world", world.groups.world, "end of training"):
            dist.barrier(group=world.groups.world)
        if self._learner is not None:
            self._learner.close()
        world.close()

    def _train(
        self, config: TrainConfig, learner: Learner, prepared: Prepared, planned: Plan, status: StatusFile
    ) -> str:
        with self._lines.timed("loading of the weights"):
            first_step = load_resumed(config, learner, prepared.fingerprint)
            started_from = load_initial_weights(config, learner, prepared)
        reporter = open_reporter(config, first_step)
        try:
            for line in self._rejected_checkpoints:
                reporter.say(f"resume: rejected {line}")
                if learner.world.rank == 0:
                    try_append_event(Path(config.out_dir), "checkpoint_rejected", first_step, line)
            print_run_summary(config, learner.replica, planned, prepared, reporter, first_step)
            if started_from:
                reporter.say(started_from)
            learners = LearnersByBatchSize(learner, config.batch_sizes, planned.ramp, is_proven=True)
            return TrainingLoop(config, learners, prepared, reporter, status, first_step, self._callbacks).run()
        except PreemptedError as error:
            reporter.say(f"preempted: {error}; exit code {EXIT_PREEMPTED}")
            raise
        except (StoppedError, RescuedError) as error:
            reporter.say(f"error: {error}")
            raise
        finally:
            reporter.close()


class CrashReporter:
    """The writer of a rank's crash report, which the watchdog calls once."""

    out_dir: Path | None

    def __init__(
        self, files: RankFiles, log: CollectiveLog, *, reports_on_stderr: bool, on_end: str | None = None
    ) -> None:
        """Writes nothing yet. Without `reports_on_stderr`, the launcher prints the report and calls `on_end`."""
        self._on_end = on_end if reports_on_stderr else None
        self.out_dir = None
        self._files = files
        self._log = log
        self._reports_on_stderr = reports_on_stderr

    def write(self, verdict: Verdict) -> None:
        """Writes `log/rank_*.error.log` and `.operations.jsonl`, unless another rank's own error is the cause."""
        if self._reports_on_stderr:
            # One write, because all ranks may print at the same time and the launcher gave them one stderr.
            with suppress(OSError):
                line = f"error: rank {self._files.rank} ends: {verdict.text}\n"
                os.write(sys.stderr.fileno(), printable_on(sys.stderr, line).encode())
        LOGGER.info("ends with exit code %d: %s", verdict.code, verdict.text)
        if self.out_dir is None or verdict.code == EXIT_OTHER:
            return
        if self._files.rank in (0, verdict.judge):
            # If rank 0 is lost, the rank that detected it writes the status.
            with suppress(OSError):
                missing = sorted(verdict.culprits)[:_MAX_LISTED]
                write_end(self.out_dir, "lost", verdict.code, verdict.text, missing)
        # A deleted folder is not created again, and an error here must not keep the watchdog from ending the process.
        with suppress(OSError):
            self._write_files(self.out_dir, verdict)
        if self._files.rank in (0, verdict.judge) and is_last_attempt(os.environ):
            report_end(self._on_end, self.out_dir)

    def _write_files(self, out_dir: Path, verdict: Verdict) -> None:
        waits = [f"awaited for {seconds:.1f} s: {operation}\n" for operation, seconds in self._log.awaited()]
        reason = ExitReason(verdict.text, verdict.code)
        details = f"{''.join(waits)}\n{_stacks()}"
        write_error(out_dir, self._files, reason, details)
        path = self._files.folder(out_dir / LOG_FOLDER) / f"{self._files.stem}.operations.jsonl"
        path.write_text(self._operations(), encoding="utf-8")

    def _operations(self) -> str:
        """Returns the last collectives and transfers, one JSON object per line, the oldest first."""
        awaited = {operation for operation, _ in self._log.awaited()}
        progress = self._log.progress()
        lines = []
        for started, operation in self._log.recent():
            is_over = operation not in awaited and operation.number <= progress[operation.group].finished
            state = "awaited" if operation in awaited else "finished" if is_over else "started"
            line = {"time": started, "group": operation.group, "number": operation.number, "operation": operation.name}
            label = None if operation.label is None else str(operation.label)
            lines.append(json.dumps({**line, "of": label, "state": state, "ranks": _ranks(operation.ranks)}))
        return "".join(f"{line}\n" for line in lines)


def _ranks(ranks: RankSet) -> list[int] | str:
    """Returns the ranks of a group: as a list, or as progressions in one text if there are many."""
    return sorted(ranks) if len(ranks) <= _MAX_LISTED else str(ranks)


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
