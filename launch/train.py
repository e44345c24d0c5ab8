"""Trains a model with the built-in launcher or as a rank of torchrun: `python -m launch.train`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import FrameType

from base.files import replace_text
from base.refusal import ConfigError, broken
from comm.exits import EXIT_MEMORY, EXIT_PREEMPTED, Preemption, handled_signals
from launch.cli.entry import command, experiment_text
from launch.config.compose import system_errors
from launch.config.folder import check_folder, locked_run_folder
from launch.config.memory import is_out_of_memory, out_of_memory_line
from launch.config.rules import check_rules
from launch.config.run import check, compose_run, write_config
from launch.ranks.local import preload_modules, run_ranks, start_fork_server, stop_fork_server
from launch.ranks.machine import (
    apply_rank_environment,
    check_device_memory,
    check_driver,
    check_environment,
    check_gpus,
    check_packages,
    check_scorers,
    check_world_size,
    environment_lines,
    is_other_rank,
    is_torchrun,
)
from train.checkpoint.locate import AUTO, has_rescue, locate, rescue_folder, verify
from train.checkpoint.manifest import MANIFEST_NAME
from train.config import TrainConfig
from train.config.tasks import TASKS
from train.files.json_lines import try_append_event
from train.files.run_end import is_last_attempt, report_end
from train.files.run_files import read_status
from train.optim.learning_rate import schedule_warnings
from train.predict.cut import ramp_notices
from train.predict.fit import memory_lines
from train.records.display import guard_terminal, report_breaks
from train.terminal import progress_on


def main(overrides: Sequence[str]) -> int:
    """Trains a model. All user errors are reported before a process starts or a file is written.

    Returns the exit code: 0 done, 75 preempted after saving, 76 a rank did not reach a collective within the timeout,
    77 stopped by the guard, 78 a rank was lost, 79 a device had too little memory, 128 + n ended by signal n.
    """
    with system_errors():
        config = compose_run(overrides)
        check(config)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_environment(config, os.environ)
        check_driver(config.cluster.device, "cluster.device")
        check_packages(config)
        check_scorers(config)
    if is_torchrun(os.environ):
        return _run_as_rank(config)
    check_folder(config)
    # A checkpoint that `resume` names is verified here; the ranks search those of a run together.
    if config.resume is not None and (Path(config.resume).expanduser() / MANIFEST_NAME).is_file():
        with system_errors():
            locate(config.resume, check=partial(verify, progress=progress_on()))
    return _run_local(config)


def preview(overrides: Sequence[str]) -> str:
    """Returns the configuration that `main` would train with, as YAML for `conf/experiment/`."""
    with system_errors():
        config = compose_run(overrides)
        check(config)
        check_folder(config)
        check_scorers(config)
    warnings = schedule_warnings(config.optim, config.batch_sizes, config.task.steps)
    comments = [*(f"warning: {line}" for line in warnings), *ramp_notices(config), *memory_lines(config)]
    return experiment_text("train", overrides, write_config(config), comments)


def dry_run(overrides: Sequence[str]) -> str:
    """Returns the first training sample of `main`, with its targets marked. Prepares the data's cache."""
    with system_errors():
        # A sample shows data alone.
        config = compose_run(overrides, checks_weights=False)
        check(config, checks_weights=False)
        from launch.cli.sample_lines import sample_lines
        from train.start.corpus import prepare_corpus

        prepared = prepare_corpus(config, progress_on())
        first = int(prepared.order.range(0, 1)[0])
        task = TASKS.get(config.task.kind)
        # A task that samples answers trains nothing of the prompts.
        reads_weights = bool(task.values) or task.has_rollouts
        lines = sample_lines(prepared, first, reads_weights=reads_weights)
        return "\n".join(lines)


def train_rank(config: TrainConfig, *, reports_on_stderr: bool = False) -> int:
    """Runs training on one rank from start to end."""
    from train.run import main as run

    return run(config, reports_on_stderr=reports_on_stderr)


def handle_signals() -> None:
    """Installs handlers for preemption signals.

    A torchrun rank ends together with the other ranks. The built-in launcher exits at once, because there is nothing to
    save yet; `run_ranks` later forwards requests to the ranks.
    """
    if is_torchrun(os.environ):
        Preemption.of_process()
        return

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(EXIT_PREEMPTED)

    for number in handled_signals():
        signal.signal(number, leave)


def export_exit_code(code: int, environment: Mapping[str, str]) -> int:
    """Returns the exit code of a torchrun rank after all ranks have agreed on the run's end.

    torchrun exits with 1 if any rank fails, and restarts the ranks while restarts remain. If LAUNCH_EXIT_FILE names a
    file, as in a Slurm job, rank 0 writes the run's code to that file, and every rank returns 0 to torchrun.
    """
    path = environment.get("LAUNCH_EXIT_FILE")
    if not path:
        return code
    if not is_other_rank(environment):
        replace_text(Path(path), f"{code}\n")
    return 0


def _run_local(config: TrainConfig) -> int:
    guard_terminal()
    try:
        start_fork_server(config.cluster, preload_modules(config.cluster))
        check_gpus(config, config.parallelism.world_size)
        check_device_memory(config, config.parallelism.world_size)
        # This process fills the cache while the fork server imports modules. The ranks then only open the cache.
        from train.start.corpus import prepare_corpus

        print(f"{config.name}: starting {config.parallelism.world_size} ranks", flush=True)
        _print_environment(config)
        prepare_corpus(config, progress_on())
        with locked_run_folder(config, datetime.now()) as (config, _):
            report_breaks(partial(_log_broken_output, Path(config.out_dir)))
            code = run_ranks(Path(config.out_dir), config.parallelism.world_size, train_rank)
            # From the command line, not from the folder's file, because that could name another command.
            report_end(config.track.on_end, Path(config.out_dir))
            return code
    finally:
        stop_fork_server()


def _print_environment(config: TrainConfig) -> None:
    for line in environment_lines(config.cluster, os.environ):
        print(line, flush=True)


def _log_broken_output(out_dir: Path, text: str) -> None:
    """Logs that this process' output pipe broke. Rank 0 does the same for the ranks."""
    status = read_status(out_dir)
    try_append_event(out_dir, "output_broken", 0 if status is None else status.step, f"the command's {text}")


def _run_as_rank(config: TrainConfig) -> int:
    guard_terminal()
    check_world_size(config.parallelism, os.environ)
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and config.resume != AUTO:
        rule = f"must be auto under torchrun --max-restarts={restarts}, so that restarted ranks resume from out_dir"
        raise broken("resume", rule, config.resume, f"resume=auto out_dir={config.out_dir or 'outputs/' + config.name}")
    apply_rank_environment(config.cluster)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_gpus(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        check_device_memory(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if is_other_rank(os.environ):
        return _train_as_rank(config)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and has_rescue(config):
        # Restarted ranks would start a new run instead of the one whose folder is gone.
        raise ConfigError(
            f"out_dir: the run's state was saved in {rescue_folder(config)}, because {config.out_dir!r} could not be "
            f"written; nearest valid: resume={rescue_folder(config)} with another out_dir"
        )
    check_folder(config)
    _print_environment(config)
    with locked_run_folder(config, datetime.now()) as (config, _):
        return _train_as_rank(config)


def _train_as_rank(config: TrainConfig) -> int:
    try:
        code = train_rank(config, reports_on_stderr=True)
        if config.out_dir and not is_other_rank(os.environ):
            report_end(config.track.on_end, Path(config.out_dir))
        return export_exit_code(code, os.environ)
    except Exception as error:
        if config.out_dir and is_last_attempt(os.environ):
            report_end(config.track.on_end, Path(config.out_dir), error)
        if not is_out_of_memory(error):
            raise
        line = out_of_memory_line(config, check_rules, int(os.environ["RANK"]), str(error))
        print(f"error: {line}", file=sys.stderr, flush=True)
        return EXIT_MEMORY


if __name__ == "__main__":
    handle_signals()
    sys.exit(command("train", main, preview, dry_run=dry_run, quiet=is_other_rank(os.environ)))
