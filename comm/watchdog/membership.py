"""Reads a rank's membership in its job from the launcher's environment. Does not import torch."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from comm.watchdog.job_key import take_key_from_environment
from comm.watchdog.tree.rank_tree import FANOUT

STORE_FILE_VARIABLE = "DUALPIPE_STORE_FILE"
"""Environment variable with the path of the job's store, which the built-in launcher keeps in a private folder."""

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class MembershipError(ValueError):
    """Raised if the launcher did not make the process a member of a job."""


@dataclass(frozen=True, slots=True)
class Membership:
    """Membership of a rank in its job.

    Attributes:
        rank: rank of this process.
        world_size: number of ranks.
        host: host of the store, which is on the same network as the other ranks.
        port: port of the store.
        store_rank: rank that opens the store at `host` and `port`; None if the launcher opened it.
        store_file: file of the store, instead of `host` and `port`; None if there is no such file.
        is_one_machine: whether all ranks are on this machine.
        key: key that the launcher or the user set for all ranks; None if rank 0 writes one into a file.
        fanout: ranks of a block of the tree of ranks, equal on all ranks.
    """

    rank: int
    world_size: int
    host: str
    port: int
    store_rank: int | None
    store_file: Path | None = None
    is_one_machine: bool = False
    key: bytes | None = field(default=None, repr=False)
    fanout: int = FANOUT

    @classmethod
    def from_environment(cls) -> "Membership":
        """Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and removes the job's key from the environment.

        Raises:
            MembershipError: if a variable is not set.
            JobKeyError: if the key is too short.
        """
        missing = [name for name in _REQUIRED if name not in os.environ]
        if missing:
            raise MembershipError(f"cluster: the launcher must set {', '.join(missing)}; start ranks with torchrun")
        rank, world_size, host, port = (os.environ[name] for name in _REQUIRED)
        store_file = os.environ.get(STORE_FILE_VARIABLE)
        is_launchers = store_file is not None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            rank=int(rank),
            world_size=int(world_size),
            host=host,
            port=int(port),
            store_rank=None if is_launchers else 0,
            store_file=None if store_file is None else Path(store_file),
            is_one_machine=os.environ.get("LOCAL_WORLD_SIZE") == world_size,
            key=take_key_from_environment(),
        )
