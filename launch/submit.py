"""Submits a training run to Slurm; the job saves, is requeued and resumes: `python -m launch.submit`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from base.decode import decode, encode
from base.files import replacing
from base.ranges import NonNegativeInt, PositiveInt
from base.refusal import ConfigError, broken, nearest
from launch.cli.entry import command, experiment_text
from launch.config.compose import (
    chosen_options,
    compose,
    compose_defaults,
    config_dir,
    default_groups,
    key_of,
    own_keys,
    system_errors,
)
from launch.config.folder import SCRIPT_NAME, check_folder, locked_run_folder
from launch.config.run import check, read_run, write_config
from launch.plan_request import planner_config
from planner.job_plan import JobPlan, plan_job
from train.config import TrainConfig
from train.predict.fit import gigabytes, memory_lines

OVERRIDES_NAME = "overrides.txt"
LOG_FOLDER = "log"
_LOCAL_CLUSTERS = ("laptop", "one_gpu")
_TEMPLATE = Path(__file__).with_name("job.sbatch")
# Options that the batch script sets itself. A second value in `extra` would silently override the script's value.
_OWN_OPTIONS = (
    "account",
    "array",
    "batch",
    "chdir",
    "cpus-per-task",
    "error",
    "gpus-per-node",
    "job-name",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "partition",
    "qos",
    "requeue",
    "signal",
    "time",
    "wait",
    "wrap",
)
_MOST_SIGNAL_SECONDS = 65535  # a limit of sbatch
_VERIFY_TIME = "01:00:00"
_VERIFY_SIGNAL_SECONDS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """Slurm options of a job with one training run."""

    partition: str | None
    account: str | None
    qos: str | None
    time: str
    signal_seconds: PositiveInt
    requeue: bool
    max_requeues: NonNegativeInt
    exclusive: bool
    gpus_per_node: NonNegativeInt | None
    cpus_per_node: PositiveInt | None
    python: str | None
    image: str | None
    setup: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def limit_seconds(self) -> int:
        """The time limit in seconds, or 0 if `time` is not valid."""
        return seconds_of(self.time) or 0


def main(overrides: Sequence[str]) -> int:
    """Submits a run, or prints its batch script. All user errors are reported before the job is submitted."""
    with system_errors():
        overrides = with_cluster(overrides)
        values, slurm, is_dry, is_verified = _composed(overrides)
        config = read_run({**values, "out_dir": str(_folder_of(values, datetime.now())), "resume": "auto"})
        check(config)
        check_slurm(slurm, config)
        check_folder(config)
        _check_path(config.out_dir)
        job = job_overrides(overrides, config.out_dir)
        plan = plan_job(config, planner_config(compose_defaults("plan")))
        rank_bytes = plan.memory.worst.total
        options: tuple[str, ...] = ()
        if is_verified:
            before = _verification(config, slurm, overrides, rank_bytes)
            if is_dry:
                print(before.script, end="", flush=True)
            else:
                number = _submit(before)
                options = (f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes")
        own = BatchJob(config=config, overrides=job, script=render(config, slurm, job, Path.cwd(), rank_bytes))
        if is_dry:
            print(own.script, end="", flush=True)
        else:
            _submit(own, options)
        for line in predicted_lines(plan, slurm):
            print(line, file=sys.stderr)
        return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the configuration of the job and of its run, as YAML for `conf/experiment/`. Writes nothing."""
    with system_errors():
        overrides = with_cluster(overrides)
        values, slurm, is_dry, is_verified = _composed(overrides)
        config = read_run(values)
        check(config)
        check_slurm(slurm, config)
    job_values = {"dry_run": is_dry, "verify": is_verified, "slurm": encode(slurm)}
    return experiment_text("submit", overrides, {**write_config(config), **job_values}, memory_lines(config))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchJob:
    """A job of a run's layout, with its script and what its command runs with."""

    config: TrainConfig
    overrides: Sequence[str]
    script: str


def _verification(config: TrainConfig, slurm: SlurmConfig, overrides: Sequence[str], rank_bytes: int) -> BatchJob:
    """Returns the job that verifies a run's ranks before it, in a folder next to the run's."""
    folder = f"{config.out_dir}-verify"
    cluster = replace(config.cluster, max_restarts=0)
    config = replace(config, out_dir=folder, cluster=cluster)
    check_folder(config)
    slurm = replace(slurm, time=_VERIFY_TIME, signal_seconds=_VERIFY_SIGNAL_SECONDS, requeue=False)
    job = job_overrides(overrides, folder)
    script = render(config, slurm, job, Path.cwd(), rank_bytes, module="launch.verify")
    return BatchJob(config=config, overrides=job, script=script)


def _composed(overrides: Sequence[str]) -> tuple[dict[str, Any], SlurmConfig, bool, bool]:
    """Returns composed values, unchecked Slurm options, whether to only print, and to verify first."""
    values = compose("submit", overrides)
    slurm = decode(SlurmConfig, _with_text_time(values["slurm"]), "slurm")
    is_dry = decode(bool, values["dry_run"], "dry_run")
    is_verified = decode(bool, values["verify"], "verify")
    resume = values["resume"]
    if resume not in (None, "auto"):
        raise ConfigError(
            f"resume: must be auto under Slurm, because each attempt of the job resumes from out_dir, "
            f"is {resume!r}; to continue that run, use out_dir={resume}; "
            f"to start from its weights, use init_from={resume}"
        )
    return values, slurm, is_dry, is_verified


def with_cluster(overrides: Sequence[str]) -> list[str]:
    """Adds the cluster of the chosen experiment to the overrides, so that its memory is checked.

    A cluster on the command line takes precedence. An experiment for a laptop is submitted with `cluster=slurm`.
    """
    keys = [key_of(text) for text in overrides]
    if "cluster" in keys or "experiment" not in keys:
        return list(overrides)
    cluster = chosen_options("train", _without(overrides, own_keys("submit")))["cluster"]
    return list(overrides) if cluster in _LOCAL_CLUSTERS else [f"cluster={cluster}", *overrides]


def job_overrides(overrides: Sequence[str], out_dir: str) -> list[str]:
    """Returns the overrides for `launch.train` inside the job."""
    run_overrides = _without(overrides, [*own_keys("submit"), "out_dir", "resume"])
    cluster = [] if "cluster" in map(key_of, overrides) else ["cluster=slurm"]
    return [*cluster, *run_overrides, f"out_dir={out_dir}", "resume=auto"]


def _without(overrides: Sequence[str], keys: Collection[str]) -> list[str]:
    """Returns the overrides of other keys, and of keys outside of these groups."""
    return [text for text in overrides if key_of(text).partition(".")[0] not in keys]


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
    run = plan.cost["stages"][0]
    rates = default_groups("plan")["rates"]
    lines.append(
        f"predicted with rates={rates} of launch.plan, not measured on this cluster: {plan.timed.time.step:.2f} s a "
        f"step, {run['days']:.1f} days and {run['gpu_hours']:,.0f} GPU-hours on {ranks:,} GPUs, "
        "without time in the queue"
    )
    seconds = run["days"] * 86400
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


def _submit(job: BatchJob, options: Sequence[str] = ()) -> str:
    """Writes a script into the run's folder, submits it, prints a line, and returns the job's number."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("slurm: sbatch must be on PATH, is not; dry_run=true prints the script")
    folder = Path(job.config.out_dir)
    is_new = not folder.exists()
    log = folder / LOG_FOLDER
    path = folder / SCRIPT_NAME
    # The lock is held only while writing, because the job locks the folder when it starts.
    with locked_run_folder(job.config, datetime.now()):
        log.mkdir(exist_ok=True)
        write_private(path, job.script)
        write_private(folder / OVERRIDES_NAME, "".join(f"{override}\n" for override in job.overrides))
    done = subprocess.run([sbatch, "--parsable", *options, str(path)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        number = done.stdout.strip().partition(";")[0]
        print(f"submitted job {number}: {path}; it writes to {log}", flush=True)
        return number
    if is_new:
        shutil.rmtree(folder)
    reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
    raise ConfigError(f"slurm: sbatch must accept the job, did not: {reason}")


def write_private(path: Path, text: str) -> None:
    """Writes a text file with mode 0600, atomically replacing an existing file."""
    with replacing(path) as partial:
        # O_EXCL and O_NOFOLLOW: another user cannot place a link or a file with wider permissions here.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def seconds_of(time: str) -> int | None:
    """Converts Slurm's time (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) to seconds; None if it is not valid."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    # Without days, one number is minutes and two are minutes and seconds.
    units = (60, 1) if days is None and len(numbers) < 3 else (3600, 60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def check_slurm(config: SlurmConfig, run: TrainConfig) -> None:
    """Rejects values that sbatch would reject or misinterpret, and nodes with too few GPUs."""
    for key in ("partition", "account", "qos"):
        _check_text(f"slurm.{key}", getattr(config, key), r"[A-Za-z0-9_.,@+-]+", "a name as sinfo or sacctmgr shows it")
    for key in ("python", "image"):
        pattern = r"[A-Za-z0-9_./:@+#~-]+"
        _check_text(f"slurm.{key}", getattr(config, key), pattern, "one word without shell metacharacters")
    _check_time(config)
    ranks = _ranks_per_node(run)
    if run.cluster.device == "cuda" and 0 < (config.gpus_per_node or 0) < ranks:
        rule = f"must be at least {ranks}, one for each rank of a node, or 0 if Slurm does not manage GPUs"
        near = f"{ranks}, or cluster.ranks_per_node={config.gpus_per_node}"
        raise broken("slurm.gpus_per_node", rule, config.gpus_per_node, near)
    for index, line in enumerate(config.setup):
        if "\n" in line:
            raise ConfigError(f"slurm.setup[{index}]: must be one line of shell, is {line!r}; write a list of lines")
    for index, option in enumerate(config.extra):
        _check_extra(f"slurm.extra[{index}]", option)


def _check_time(config: SlurmConfig) -> None:
    limit = config.limit_seconds
    if limit <= 0:
        rule = "must be a time above 0 as sbatch reads it, minutes or [days-]hours:minutes:seconds"
        raise broken("slurm.time", rule, repr(config.time), "60 or 1-00:00:00")
    most = min(limit - 1, _MOST_SIGNAL_SECONDS)
    if config.signal_seconds > most:
        start = f"slurm.time={config.time} ({limit} s)"
        rule = f"must be at most {most}, so that the signal is sent after the start of a job of {start}"
        raise broken("slurm.signal_seconds", rule, config.signal_seconds, most)


def _check_text(key: str, value: str | None, pattern: str, rule: str) -> None:
    if value is not None and not re.fullmatch(pattern, value):
        raise broken(key, f"must be {rule}", repr(value), "null")


def _check_extra(key: str, option: str) -> None:
    match = re.fullmatch(r"--([a-z][a-z-]*)(=[^\n]*)?", option)
    if match is None:
        word = re.sub(r"[^a-z-].*", "", option.lstrip("-").lower()) or "constraint"
        near = f"--{word}" if word not in _OWN_OPTIONS else "--constraint=NAME"
        raise broken(key, "must be a long option of sbatch as --name or --name=value", repr(option), near)
    name = match.group(1)
    if name == "array":
        raise ConfigError(f"{key}: must not be an array, whose jobs would share out_dir, is {option!r}; leave it out")
    if name in _OWN_OPTIONS:
        keys = ("partition", "account", "qos", "time", "requeue", "exclusive", "gpus_per_node", "cpus_per_node")
        raise ConfigError(
            f"{key}: {option!r} is set by the script itself; leave it out, or use a key of slurm: "
            f"{nearest(name.replace('-', '_'), keys)}"
        )


def render(
    config: TrainConfig,
    slurm: SlurmConfig,
    overrides: Sequence[str],
    folder: Path,
    rank_bytes: int,
    module: str = "launch.train",
) -> str:
    """Returns the batch script of a run, or of another command (`module`) with its layout.

    Args:
        config: the run's configuration; `out_dir` is an absolute path that all attempts of the job share.
        folder: working directory, to which paths in `overrides` are relative.
        rank_bytes: predicted memory of the largest rank, which the nodes must have.
    """
    ranks = _ranks_per_node(config)
    cpus = slurm.cpus_per_node if slurm.cpus_per_node is not None else ranks * config.cluster.threads_per_rank
    checkout = config_dir().parent
    words = {
        "module": module,
        "name": config.name,
        "nodes": str(config.parallelism.world_size // ranks),
        "ranks_per_node": str(ranks),
        "cpus_per_node": str(cpus),
        "time": slurm.time,
        "signal_seconds": str(slurm.signal_seconds),
        "options": "\n".join(f"#SBATCH {option}" for option in _options(config, slurm, ranks)),
        "run": config.out_dir,
        "may_requeue": str(int(slurm.requeue)),
        "max_requeues": str(slurm.max_requeues),
        "health": f"gpus={_num_gpus(config, slurm, ranks)} ranks={ranks} rank_bytes={rank_bytes}",
        "folder": shlex.quote(str(folder)),
        "checkout": shlex.quote(str(checkout)),
        "setup": "\n".join(slurm.setup),
        "overrides": "\n".join(f"    {shlex.quote(override)}" for override in overrides),
        "python": shlex.quote(slurm.python or ("python3" if slurm.image else sys.executable)),
        "max_restarts": str(config.cluster.max_restarts),
        "container": _container(slurm, (checkout, folder, Path(config.out_dir))),
    }
    return re.sub(r"@\{(\w+)\}", lambda match: words[match[1]], _TEMPLATE.read_text(encoding="utf-8"))


def _ranks_per_node(config: TrainConfig) -> int:
    return min(config.cluster.ranks_per_node, config.parallelism.world_size)


def _options(config: TrainConfig, slurm: SlurmConfig, ranks: int) -> list[str]:
    named = {"partition": slurm.partition, "account": slurm.account, "qos": slurm.qos}
    gpus = _num_gpus(config, slurm, ranks) if slurm.gpus_per_node is None else slurm.gpus_per_node
    options = [f"--{name}={value}" for name, value in named.items() if value is not None]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += ["--exclusive", "--mem=0"] if slurm.exclusive else []
    return [*options, "--requeue" if slurm.requeue else "--no-requeue", *slurm.extra]


def _num_gpus(config: TrainConfig, slurm: SlurmConfig, ranks: int) -> int:
    return (slurm.gpus_per_node or ranks) if config.cluster.device == "cuda" else 0


def _container(slurm: SlurmConfig, folders: Sequence[Path]) -> str:
    """Returns srun options for a container image that mounts the run's folders at the same paths."""
    if slurm.image is None:
        return ""
    mounts = ",".join(f"{folder}:{folder}" for folder in dict.fromkeys(folders))
    return shlex.join([f"--container-image={slurm.image}", f"--container-mounts={mounts}"]) + " "


if __name__ == "__main__":
    sys.exit(command("submit", main, preview))
