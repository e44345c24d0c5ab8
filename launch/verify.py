"""Verifies ranks, links and numbers before a run: `python -m launch.verify`, also under torchrun."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

from base.decode import decode
from base.ranges import NonNegativeInt
from launch.cli.entry import command, experiment_text
from launch.config.compose import compose, system_errors
from launch.config.folder import check_folder, locked_run_folder
from launch.config.rules import check_rules
from launch.config.run import check, read_run, write_config
from launch.ranks.local import preload_modules, run_ranks, start_fork_server, stop_fork_server
from launch.ranks.machine import (
    apply_rank_environment,
    check_driver,
    check_environment,
    check_gpus,
    check_packages,
    check_world_size,
    is_other_rank,
    is_torchrun,
)
from launch.train import export_exit_code, handle_signals
from train.config import TrainConfig
from train.records.display import guard_terminal
from verify.layouts import choose_trials

_KEY = "layouts"


def main(overrides: Sequence[str]) -> int:
    """Verifies a run's ranks. All user errors are reported before a process starts or a file is written.

    Returns the exit code: 0 if all checks passed, 3 if one failed, 76 or 78 if a rank did not respond or was lost.
    """
    config, layouts = _composed(overrides)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_environment(config, os.environ)
        check_driver(config.cluster.device, "cluster.device")
        check_packages(config)
    if is_torchrun(os.environ):
        return _run_as_rank(config, layouts)
    check_folder(config)
    guard_terminal()
    try:
        start_fork_server(config.cluster, [*preload_modules(config.cluster), "verify.run", "launch.config.rules"])
        check_gpus(config, config.parallelism.world_size)
        print(f"{config.name}: verifying {config.parallelism.world_size} ranks", flush=True)
        with locked_run_folder(config, datetime.now()) as (config, _):
            return run_ranks(Path(config.out_dir), config.parallelism.world_size, partial(verify_rank, layouts))
    finally:
        stop_fork_server()


def preview(overrides: Sequence[str]) -> str:
    """Returns the configuration that `main` would verify, and the layouts of its small runs."""
    config, layouts = _composed(overrides)
    check_folder(config)
    comments = [f"{trial.name}: {trial}" for trial in choose_trials(config, layouts, check_rules)]
    return experiment_text("verify", overrides, {**write_config(config), _KEY: layouts}, comments)


def _composed(overrides: Sequence[str]) -> tuple[TrainConfig, int]:
    """Returns the checked configuration without restarts, and the number of random layouts."""
    with system_errors():
        values = compose("verify", overrides)
        layouts = decode(NonNegativeInt, values.pop(_KEY), _KEY)
        config = read_run(values)
        check(config)
        config = replace(config, cluster=replace(config.cluster, max_restarts=0))
        choose_trials(config, layouts, check_rules)
        return config, layouts


def verify_rank(layouts: int, config: TrainConfig, *, reports_on_stderr: bool = False) -> int:
    """Runs the verification on one rank from start to end."""
    from verify.run import verify_job

    return verify_job(config, choose_trials(config, layouts, check_rules), reports_on_stderr=reports_on_stderr)


def _run_as_rank(config: TrainConfig, layouts: int) -> int:
    guard_terminal()
    check_world_size(config.parallelism, os.environ)
    apply_rank_environment(config.cluster)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        check_gpus(config, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if is_other_rank(os.environ):
        return export_exit_code(verify_rank(layouts, config, reports_on_stderr=True), os.environ)
    check_folder(config)
    with locked_run_folder(config, datetime.now()) as (config, _):
        return export_exit_code(verify_rank(layouts, config, reports_on_stderr=True), os.environ)


if __name__ == "__main__":
    handle_signals()
    sys.exit(command("verify", main, preview, quiet=is_other_rank(os.environ)))
