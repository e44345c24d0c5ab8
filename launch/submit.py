"""Submits a training run to Slurm; the job saves, is requeued and resumes: `python -m launch.submit`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from launch.config.compose import (
    chosen_options,
    compose,
    compose_defaults,
    default_groups,
    key_of,
    own_keys,
    system_errors,
)
from launch.config.run_config import check, read_run, write_config
from launch.help.command import command, experiment_text
from launch.plan_request import planner_config
from launch.ranks.run_folder import check_folder, locked_run_folder
from launch.slurm.script import SlurmConfig, check_slurm, render
from train.config import TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.memory.fit import gigabytes, memory_lines
from train.planner.job_plan import JobPlan, plan_job

SCRIPT_NAME = "job.sbatch"
OVERRIDES_NAME = "overrides.txt"
LOG_FOLDER = "log"
_LOCAL_CLUSTERS = ("laptop", "one_gpu")


def main(overrides: Sequence[str]) -> int:
    """Submits a run, or prints its batch script. All user errors are reported before the job is submitted."""
    with system_errors():
        overrides = with_cluster(overrides)
        values, slurm, is_dry = _composed(overrides)
        config = read_run({**values, "out_dir": str(_folder_of(values, datetime.now())), "resume": "auto"})
        check(config)
        check_slurm(slurm)
        check_folder(config)
        _check_path(config.out_dir)
        job = job_overrides(overrides, config.out_dir)
        plan = plan_job(config, planner_config(compose_defaults("plan")))
        script = render(config, slurm, job, Path.cwd(), plan.memory.worst.total)
        print(script if is_dry else _submit(config, script, job), end="" if is_dry else "\n", flush=True)
        for line in predicted_lines(plan, slurm):
            print(line, file=sys.stderr)
        return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the configuration of the job and of its run, as YAML for `conf/experiment/`. Writes nothing."""
    with system_errors():
        overrides = with_cluster(overrides)
        values, slurm, is_dry = _composed(overrides)
        config = read_run(values)
        check(config)
        check_slurm(slurm)
    own = {"dry_run": is_dry, "slurm": encode(slurm)}
    return experiment_text("submit", overrides, {**write_config(config), **own}, memory_lines(config))


def _composed(overrides: Sequence[str]) -> tuple[dict[str, Any], SlurmConfig, bool]:
    """Returns the composed values, the unchecked Slurm options, and whether to only print the script."""
    values = compose("submit", overrides)
    slurm = decode(SlurmConfig, _with_text_time(values["slurm"]), "slurm")
    is_dry = decode(bool, values["dry_run"], "dry_run")
    resume = values["resume"]
    if resume not in (None, "auto"):
        raise ConfigError(
            f"resume: must be auto under Slurm, because each attempt of the job resumes from out_dir, "
            f"is {resume!r}; to continue that run, use out_dir={resume}; "
            f"to start from its weights, use init_from={resume}"
        )
    return values, slurm, is_dry


def with_cluster(overrides: Sequence[str]) -> list[str]:
    """Adds the cluster of the chosen experiment to the overrides, so that its memory is checked.

    A cluster on the command line takes precedence. An experiment for a laptop is submitted with `cluster=slurm`.
    """
    keys = [key_of(text) for text in overrides]
    if "cluster" in keys or "experiment" not in keys:
        return list(overrides)
    own = own_keys("submit")
    kept = [text for text, key in zip(overrides, keys, strict=True) if key.partition(".")[0] not in own]
    cluster = chosen_options("train", kept)["cluster"]
    return list(overrides) if cluster in _LOCAL_CLUSTERS else [f"cluster={cluster}", *overrides]


def job_overrides(overrides: Sequence[str], out_dir: str) -> list[str]:
    """Returns the overrides for `launch.train` inside the job."""
    own = {*own_keys("submit"), "out_dir", "resume"}
    keys = [key_of(text) for text in overrides]
    kept = [text for text, key in zip(overrides, keys, strict=True) if key.partition(".")[0] not in own]
    cluster = [] if "cluster" in keys else ["cluster=slurm"]
    return [*cluster, *kept, f"out_dir={out_dir}", "resume=auto"]


def _with_text_time(slurm: object) -> object:
    """Converts an integer `time` to text: `slurm.time=60` is a number in YAML but minutes in Slurm."""
    if isinstance(slurm, Mapping) and type(slurm.get("time")) is int:
        return {**slurm, "time": str(slurm["time"])}
    return slurm


def predicted_lines(plan: JobPlan, slurm: SlurmConfig) -> list[str]:
    """Returns lines about predicted memory, days and GPU-hours, and about the time limit."""
    room = plan.config.cluster.memory_bytes
    ranks = plan.config.parallelism.world_size
    of = "" if room is None else f" of {gigabytes(room)}"
    lines = [f"predicted: the largest rank needs {gigabytes(plan.memory.worst.total)}{of}"]
    if plan.timed is None or plan.cost is None:
        return [*lines, f"predicted: no days and GPU-hours: {plan.untimed}"]
    run = plan.cost.stages[0]
    rates = default_groups("plan")["rates"]
    lines.append(
        f"predicted with rates={rates} of launch.plan, not measured on this cluster: {plan.timed.time.step:.2f} s a "
        f"step, {run.days:.1f} days and {run.gpu_hours:,.0f} GPU-hours on {ranks:,} GPUs, without time in the queue"
    )
    seconds = run.days * 86400
    limit = slurm.limit_seconds - slurm.signal_seconds
    if seconds <= limit:
        return lines
    if slurm.requeue:
        effect = f"the job saves, is requeued and continues about {int(seconds / limit)} times"
        return [*lines, f"slurm.time={slurm.time} is shorter: {effect}"]
    effect = f"the run stops with code 75 after about {100 * limit / seconds:.2g} % of its time"
    nearest = f"slurm.requeue=true, or slurm.time={int(seconds / 86400) + 1}-00:00:00"
    return [*lines, f"warning: slurm.time={slurm.time} is shorter: {effect}; nearest: {nearest}"]


def _folder_of(values: Mapping[str, Any], now: datetime) -> Path:
    """Returns the run's folder. It is fixed before submission, so that a requeued job finds it."""
    name = decode(str, values["name"], "name")
    chosen = decode(str, values["out_dir"], "out_dir") or f"outputs/{name}/{now:%Y-%m-%d_%H-%M-%S}"
    return Path(chosen).expanduser().absolute()


def _check_path(out_dir: str) -> None:
    wrong = re.sub(r"[A-Za-z0-9._/@+=,-]", "", out_dir)
    if wrong:
        raise ConfigError(
            f"out_dir: must contain only letters, digits and ._/@+=,- under Slurm, which interprets other characters, "
            f"is {out_dir!r} with {wrong[0]!r}"
        )


def _submit(config: TrainConfig, script: str, overrides: Sequence[str]) -> str:
    """Writes the script into the run's folder and submits it. Returns a line that describes the job."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("slurm: sbatch must be on PATH, is not; dry_run=true prints the script")
    folder = Path(config.out_dir)
    is_new = not folder.exists()
    log = folder / LOG_FOLDER
    path = folder / SCRIPT_NAME
    # The lock is held only while writing, because the job locks the folder when it starts.
    with locked_run_folder(config, datetime.now()):
        log.mkdir(exist_ok=True)
        write_private(path, script)
        write_private(folder / OVERRIDES_NAME, "".join(f"{override}\n" for override in overrides))
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return f"submitted job {done.stdout.strip().partition(';')[0]}: {path}; it writes to {log}"
    if is_new:
        shutil.rmtree(folder)
    reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
    raise ConfigError(f"slurm: sbatch must accept the job, did not: {reason}")


def write_private(path: Path, text: str) -> None:
    """Writes a text file with mode 0600, atomically replacing an existing file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    # O_EXCL and O_NOFOLLOW: another user cannot place a link or a file with wider permissions here.
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


if __name__ == "__main__":
    sys.exit(command("submit", main, preview))
