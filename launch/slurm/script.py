"""Slurm options of a job, the rules for them, and the batch script from `job.sbatch`."""

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels.ranges import NonNegativeInt, PositiveInt
from launch.config.compose import config_dir
from train.config import TrainConfig
from train.config.errors import ConfigError, broken, nearest

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


def check_slurm(config: SlurmConfig) -> None:
    """Rejects values that sbatch would reject or misinterpret."""
    for key in ("partition", "account", "qos"):
        _check_text(f"slurm.{key}", getattr(config, key), r"[A-Za-z0-9_.,@+-]+", "a name as sinfo or sacctmgr shows it")
    for key in ("python", "image"):
        pattern = r"[A-Za-z0-9_./:@+#~-]+"
        _check_text(f"slurm.{key}", getattr(config, key), pattern, "one word without shell metacharacters")
    _check_time(config)
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


def render(config: TrainConfig, slurm: SlurmConfig, overrides: Sequence[str], folder: Path, rank_bytes: int) -> str:
    """Returns the batch script of a run.

    Args:
        config: the run's configuration; `out_dir` is an absolute path that all attempts of the job share.
        folder: working directory, to which paths in `overrides` are relative.
        rank_bytes: predicted memory of the largest rank, which the nodes must have.
    """
    ranks = min(config.cluster.ranks_per_node, config.parallelism.world_size)
    cpus = slurm.cpus_per_node if slurm.cpus_per_node is not None else ranks * config.cluster.threads_per_rank
    checkout = config_dir().parent
    words = {
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
