"""Measures how much work the start of a large job is for the store: real requests of its ranks to a real store.

The store runs in its own process, which does nothing else, so its CPU time is the work. The requests are those of
`StoreGather`. Ranks send them one after another, in an order in which no rank has to wait: first every rank's record,
then the records of leaders from the last rank to the first, then what each rank reads. In a job of more than 20,000
ranks, all leaders and a sample of the other ranks read, and their work is multiplied.
"""

import secrets
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from comm.watchdog.job_start import WAITS_PER_LOOK, JobStart, Termination
from comm.watchdog.membership import Membership
from comm.watchdog.messages import AddressBook, encode_addresses
from comm.watchdog.ranks import FANOUT, RankTree
from comm.watchdog.rendezvous import Record, StoreGather

LIMITED_RANKS, LIMIT_SECONDS = 16_384, 60.0
"""The store may use so much CPU time for a rendezvous of so many ranks."""
_MAX_SIMULATED = 20_000
_ANNOUNCEMENT = "watchdog/key"
_NUM_LOOKS = 10_000


@dataclass(slots=True)
class CountedStore:
    """Client of a store that counts requests and the longest record. Without a client, it is a store itself."""

    client: Any = None
    requests: Counter[str] = field(default_factory=Counter)
    longest_bytes: int = 0
    values: dict[str, bytes] = field(default_factory=dict)

    def set(self, key: str, value: str) -> None:
        self.requests["set"] += 1
        self.longest_bytes = max(self.longest_bytes, len(value))
        if self.client is None:
            self.values[key] = value.encode()
        else:
            self.client.set(key, value)

    def get(self, key: str) -> bytes:
        self.requests["get"] += 1
        return self.values[key] if self.client is None else self.client.get(key)

    def check(self, keys: list[str]) -> bool:
        self.requests["check"] += 1
        return all(key in self.values for key in keys) if self.client is None else self.client.check(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests["multi_get"] += 1
        return [self.values[key] for key in keys] if self.client is None else self.client.multi_get(keys)


@dataclass(slots=True)
class Work:
    """Work of the store: CPU seconds, requests, and the longest record."""

    seconds: float = 0.0
    requests: float = 0.0
    longest_bytes: int = 0
    seconds_per_look: float = 0.0


class Simulation:
    """Rendezvous whose ranks send their requests one after another."""

    def __init__(self, num_ranks: int, store: CountedStore, cpu: Callable[[], float], fanout: int = FANOUT) -> None:
        """Stores the arguments; `cpu` returns the CPU seconds of the store so far."""
        self._tree = RankTree(num_ranks, fanout)
        self._store = store
        self._cpu = cpu
        self._key = secrets.token_bytes(32)
        self._work = Work()
        self._termination = Termination()

    def run(self) -> Work:
        tree, stride = self._tree, -(-self._tree.world_size // _MAX_SIMULATED)
        self._store.set(_ANNOUNCEMENT, "x" * 200)
        ranks = range(tree.world_size)
        self._measure(self._read_announcement, ranks[::stride], len(ranks))
        self._gather("nonce", stride)
        gathers = self._gather("address", stride)
        self._measure(lambda rank: gathers[rank].confirm(), ranks[::-1], len(ranks))
        assert not gathers[0].book.missing_blocks()
        self._measure(self._look, range(_NUM_LOOKS), 0)
        self._work.longest_bytes = self._store.longest_bytes
        return self._work

    def _gather(self, name: str, stride: int) -> dict[int, StoreGather]:
        book = AddressBook(self._tree)  # the ranks of this process share one
        gathers = {rank: self._open(rank, name, book) for rank in range(self._tree.world_size)}
        leaders = [rank for rank in gathers if rank % self._tree.fanout == 0]
        others = [rank for rank in gathers if rank % self._tree.fanout]
        self._measure(lambda rank: gathers[rank].publish(), gathers, len(gathers))
        self._measure(lambda rank: gathers[rank].lead(), leaders[::-1], len(leaders))
        self._measure(lambda rank: gathers[rank].read_path(), leaders, len(leaders))
        self._measure(lambda rank: gathers[rank].read_path(), others[::stride], len(others))
        return gathers

    def _open(self, rank: int, name: str, book: AddressBook) -> StoreGather:
        member = Membership(rank, self._tree.world_size, "127.0.0.1", 1, 0, fanout=self._tree.fanout)
        start = JobStart(member, 600.0, self._termination)
        store: Any = self._store
        record = Record(secrets.token_hex(16), encode_addresses([(_host(rank), 1024 + rank % 50_000)]))
        gather = StoreGather(start, store, self._key, name, record, lambda: self._read_announcement(rank), {})
        gather.book = book
        return gather

    def _measure(self, act: Callable[[int], object], ranks: Iterable[int], num_ranks: int) -> None:
        """Adds the work of `act` for some ranks, multiplied to `num_ranks`. Without ranks it is that of a look."""
        seconds, requests, num_measured = self._cpu(), self._store.requests.total(), 0
        for rank in ranks:
            act(rank)
            num_measured += 1
        seconds, requests = self._cpu() - seconds, self._store.requests.total() - requests
        if num_ranks == 0:
            self._work.seconds_per_look = seconds / num_measured
        elif num_measured:
            self._work.seconds += seconds * num_ranks / num_measured
            self._work.requests += requests * num_ranks / num_measured

    def _read_announcement(self, rank: int) -> None:
        self._store.check([_ANNOUNCEMENT])
        self._store.get(_ANNOUNCEMENT)

    def _look(self, number: int) -> None:
        """Sends the requests of a waiting rank: for its groups' records, and each fourth time four more."""
        self._store.check([f"watchdog/absent/{level}" for level in range(self._tree.num_levels)])
        if number % WAITS_PER_LOOK == 0:
            self._store.check(["watchdog/verdict"])
            self._read_announcement(number)
            self._store.set("watchdog/nonce/0", "x" * 200)


@contextmanager
def opened_server() -> Iterator[tuple[CountedStore, Callable[[], float]]]:
    """Starts a store in its own process, and yields a client and a function that returns the store's CPU seconds."""
    command = [sys.executable, "-m", "bench.scale.store_server"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        client = TCPStore("127.0.0.1", int(process.stdout.readline()), is_master=False, wait_for_workers=False)
        server = psutil.Process(process.pid)
        try:
            yield CountedStore(client), lambda: sum(server.cpu_times()[:2])
        finally:
            process.stdin.close()


def count_requests(num_ranks: int, fanout: int = FANOUT) -> Work:
    """Returns the work without a store's process: seconds are 0."""
    return Simulation(num_ranks, CountedStore(), lambda: 0.0, fanout).run()


def measure(num_ranks: int) -> dict[str, float]:
    """Measures the work of the store for a rendezvous of so many ranks."""
    with opened_server() as (store, cpu):
        work = Simulation(num_ranks, store, cpu).run()
    start = JobStart(Membership(1, num_ranks, "127.0.0.1", 1, 0), 1.0, Termination())
    looks_per_second = num_ranks / start._longest_pause
    return {
        "rendezvous: requests to the store": round(work.requests),
        "rendezvous: CPU of the store, s": work.seconds,
        "rendezvous: CPU of the store per s of waiting for a late rank, s": looks_per_second * work.seconds_per_look,
        "rendezvous: longest record, bytes": work.longest_bytes,
    }


def broken_laws(num_ranks: int, figures: dict[str, float]) -> Sequence[str]:
    """Returns the limits that the figures of `measure` exceed."""
    seconds = figures["rendezvous: CPU of the store, s"]
    limit = LIMIT_SECONDS * num_ranks / LIMITED_RANKS
    return [f"{num_ranks} ranks: the store needs {seconds:.1f} s, more than {limit:.0f} s"] if seconds > limit else []


def _host(rank: int) -> str:
    node = rank // 8
    return f"10.{node >> 16}.{node >> 8 & 255}.{node & 255}"
