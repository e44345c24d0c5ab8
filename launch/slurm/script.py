"""Renders a run's batch script from the template `job.sbatch`."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.config.groups import config_dir
from launch.slurm.config import SlurmConfig
from train.config import TrainConfig

_TEMPLATE = Path(__file__).with_name("job.sbatch")


def render(config: TrainConfig, slurm: SlurmConfig, overrides: Sequence[str], folder: Path, rank_bytes: int) -> str:
    """Returns the batch script of a run.

    Args:
        config: the run's configuration; `out_dir` is an absolute path that all attempts of the job share.
        overrides: overrides for `launch.train`.
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
    """Returns the number of GPUs that the ranks of a node use."""
    return (slurm.gpus_per_node or ranks) if config.cluster.device == "cuda" else 0


def _container(slurm: SlurmConfig, folders: Sequence[Path]) -> str:
    """Returns srun options for a container image that mounts the run's folders at the same paths."""
    if slurm.image is None:
        return ""
    mounts = ",".join(f"{folder}:{folder}" for folder in dict.fromkeys(folders))
    return shlex.join([f"--container-image={slurm.image}", f"--container-mounts={mounts}"]) + " "
