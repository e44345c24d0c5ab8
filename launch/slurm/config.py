"""Slurm options of a job, and the rules for them."""

import re
from dataclasses import dataclass

from kernels.ranges import NonNegativeInt
from train.config.errors import ConfigError, nearest

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


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmConfig:
    """Slurm options of a job with one training run.

    Attributes:
        partition: Slurm partition; None for the cluster's default, as for `account` and `qos`.
        account: account to charge.
        qos: quality of service.
        time: time limit, after which Slurm stops the job.
        signal_seconds: seconds before the time limit at which the ranks receive the signal to save.
        requeue: whether the job is started again after the time limit, preemption, and a lost or unresponsive rank.
        max_requeues: how often it is started again after a lost rank or node without a new checkpoint in between.
        exclusive: whether the job has its nodes and their memory for itself.
        gpus_per_node: GPUs per node; None for what the ranks of a node need.
        cpus_per_node: CPU cores per node; None for what the ranks of a node need.
        python: Python interpreter; None for the one that submits the job.
        image: container image; None for no container.
        setup: shell lines that run before training on the first node.
        extra: further sbatch options, with their dashes.
    """

    partition: str | None
    account: str | None
    qos: str | None
    time: str
    signal_seconds: int
    requeue: bool
    max_requeues: NonNegativeInt
    exclusive: bool
    gpus_per_node: int | None
    cpus_per_node: int | None
    python: str | None
    image: str | None
    setup: tuple[str, ...]
    extra: tuple[str, ...]

    @property
    def limit_seconds(self) -> int:
        """The time limit in seconds, or 0 if `time` is not valid."""
        return seconds_of(self.time) or 0


def seconds_of(time: str) -> int | None:
    """Converts Slurm's time notation (M, M:S, H:M:S, D-H, D-H:M, D-H:M:S) to seconds.

    Returns None if it is not valid.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if match is None:
        return None
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    # Without days, one number is minutes and two are minutes and seconds.
    units = (60, 1) if days is None and len(numbers) < 3 else (3600, 60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def check_slurm(config: SlurmConfig) -> None:
    """Rejects values that sbatch would reject or misinterpret."""
    for key in ("partition", "account", "qos"):
        _check_text(f"slurm.{key}", getattr(config, key), r"[A-Za-z0-9_.,@+-]+", "a name as sinfo or sacctmgr shows it")
    for key in ("python", "image"):
        _check_text(
            f"slurm.{key}", getattr(config, key), r"[A-Za-z0-9_./:@+#~-]+", "one word without shell metacharacters"
        )
    least = {"signal_seconds": 1, "gpus_per_node": 0, "cpus_per_node": 1}
    for key, bound in least.items():
        value = getattr(config, key)
        if value is not None and value < bound:
            raise ConfigError(f"slurm.{key}: must be at least {bound}, is {value}; nearest valid: {bound}")
    _check_time(config)
    for index, line in enumerate(config.setup):
        if "\n" in line:
            raise ConfigError(f"slurm.setup[{index}]: must be one line of shell, is {line!r}; write a list of lines")
    for index, option in enumerate(config.extra):
        _check_extra(f"slurm.extra[{index}]", option)


def _check_time(config: SlurmConfig) -> None:
    limit = config.limit_seconds
    if limit <= 0:
        raise ConfigError(
            f"slurm.time: must be a time above 0 as sbatch reads it, minutes or [days-]hours:minutes:seconds, "
            f"is {config.time!r}; nearest valid: 60 or 1-00:00:00"
        )
    most = min(limit - 1, _MOST_SIGNAL_SECONDS)
    if config.signal_seconds > most:
        raise ConfigError(
            f"slurm.signal_seconds: must be at most {most}, so that the signal is sent after the start of a job of "
            f"slurm.time={config.time} ({limit} s), is {config.signal_seconds}; nearest valid: {most}"
        )


def _check_text(key: str, value: str | None, pattern: str, rule: str) -> None:
    if value is not None and not re.fullmatch(pattern, value):
        raise ConfigError(f"{key}: must be {rule}, is {value!r}; nearest valid: null")


def _check_extra(key: str, option: str) -> None:
    match = re.fullmatch(r"--([a-z][a-z-]*)(=[^\n]*)?", option)
    if match is None:
        word = re.sub(r"[^a-z-].*", "", option.lstrip("-").lower()) or "constraint"
        raise ConfigError(
            f"{key}: must be a long option of sbatch as --name or --name=value, is {option!r}; "
            f"nearest valid: {f'--{word}' if word not in _OWN_OPTIONS else '--constraint=NAME'}"
        )
    name = match.group(1)
    if name == "array":
        raise ConfigError(f"{key}: must not be an array, whose jobs would share out_dir, is {option!r}; leave it out")
    if name in _OWN_OPTIONS:
        keys = ("partition", "account", "qos", "time", "requeue", "exclusive", "gpus_per_node", "cpus_per_node")
        raise ConfigError(
            f"{key}: {option!r} is set by the script itself; leave it out, or use a key of slurm: "
            f"{nearest(name.replace('-', '_'), keys)}"
        )
