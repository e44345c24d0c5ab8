"""A rank's place in its job, as its launcher describes it in the environment. No torch here."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from comm.watchdog.job_key import take_key_from_environment

STORE_FILE_VARIABLE = "DUALPIPE_STORE_FILE"
"""Path of the job's store, which the built-in launcher keeps in a file of a private folder."""

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class MembershipError(ValueError):
    """A process that its launcher gave no place in a job."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A rank's place in its job.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        host: of the store; other ranks are reached by the same way.
        port: of the store.
        store_rank: the rank that opens the store at `host` and `port`; None if the launcher did.
        store_file: the store, instead of one at `host` and `port`; None if there is no such file.
        is_one_machine: all ranks are on this machine.
        key: that the launcher or the user gave all ranks; None if rank 0 is to write one into a file.
    """

    rank: int
    world_size: int
    host: str
    port: int
    store_rank: int | None
    store_file: Path | None = None
    is_one_machine: bool = False
    key: bytes | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> "Membership":
        """Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and takes the job's key out of the environment.

        Raises:
            MembershipError: a variable is not set.
            JobKeyError: the key is too short.
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
