"""Implements a rendezvous for torch's elastic launcher on one machine that opens no port.

Ranks use a store in a file of a private folder. torch's own rendezvous start a TCP server that listens on all addresses
of the machine and accepts any connection.
"""

from collections.abc import Callable

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "private"


class PrivateRendezvous(RendezvousHandler):
    """Rendezvous of a single launcher, which also checks the ranks each time the launcher does."""

    def __init__(self, run_id: str, check_ranks: Callable[[], None]) -> None:
        """Creates the rendezvous; it calls `check_ranks`, which may raise, while all ranks are healthy."""
        self._run_id = run_id
        self._check_ranks = check_ranks
        self._store = HashStore()

    def get_backend(self) -> str:
        """Returns the name under which this rendezvous is registered."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns node rank 0 of 1. The address that ranks receive has no listener."""
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def num_nodes_waiting(self) -> int:
        """Calls `check_ranks` and returns 0, as no other launcher joins. Called after each check of the ranks."""
        self._check_ranks()
        return 0

    def is_closed(self) -> bool:
        """Returns False: the rendezvous stays open."""
        return False

    def set_closed(self) -> None:
        """Does nothing: there is no other launcher to inform."""

    def get_run_id(self) -> str:
        """Returns the id of the attempt."""
        return self._run_id

    def shutdown(self) -> bool:
        """Returns True: nothing is left to close."""
        return True


def register_private_rendezvous() -> None:
    """Registers the rendezvous with torch's launcher as `BACKEND`; `rdzv_configs` must hold `check_ranks`."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return PrivateRendezvous(parameters.run_id, parameters.config["check_ranks"])
