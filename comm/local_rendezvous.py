"""The rendezvous of torch's elastic launcher with itself, for ranks of one machine: it opens no port.

The launcher keeps its own records in memory, and ranks meet at a store in a file of a private folder. torch's `c10d`
and `static` rendezvous start a TCP server that listens on all addresses of the machine, and trusts whoever connects.
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
    """A rendezvous of one launcher, which looks after its ranks whenever the launcher does."""

    def __init__(self, run_id: str, check_ranks: Callable[[], None]) -> None:
        """Opens nothing.

        Args:
            run_id: of the attempt.
            check_ranks: called several times a second while the launcher finds all ranks well; may raise.
        """
        self._run_id = run_id
        self._check_ranks = check_ranks
        self._store = HashStore()

    def get_backend(self) -> str:
        """Returns the name under which it is registered."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Returns the launcher's place: the only one. Ranks are given an address at which nothing listens."""
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def num_nodes_waiting(self) -> int:
        """Returns 0, as no other launcher joins; the launcher calls this after each check of its ranks."""
        self._check_ranks()
        return 0

    def is_closed(self) -> bool:
        """Returns that it stays open."""
        return False

    def set_closed(self) -> None:
        """Does nothing: no other launcher is to learn of it."""

    def get_run_id(self) -> str:
        """Returns the id of the attempt."""
        return self._run_id

    def shutdown(self) -> bool:
        """Returns that nothing is left to close."""
        return True


def register_private_rendezvous() -> None:
    """Lets torch's elastic launcher find it as `BACKEND`. Its `rdzv_configs` must hold `check_ranks`."""
    rendezvous_handler_registry.register(BACKEND, _create)


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return PrivateRendezvous(parameters.run_id, parameters.config["check_ranks"])
