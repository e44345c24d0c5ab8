"""Whoever writes to the store while ranks meet can prevent the start, and cannot make a rank accept a wrong address.

Blocks have two ranks here, so that nine ranks have leaders of four levels.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from base.decode import encode
from comm.watchdog.job_start import AbsentError, JobStart, Termination
from comm.watchdog.membership import Membership
from comm.watchdog.messages import Addresses, decode_addresses, encode_addresses
from comm.watchdog.ranks import RankTree
from comm.watchdog.rendezvous import Record, StoreGather
from comm.watchdog.wire import MessageError, decode_fields, seal_object
from tests.comm.test_watchdog_addresses import KEY, Rank, close, run

WORLD_SIZE, FANOUT = 9, 2


ELSEWHERE = encode(Record("0" * 32, encode_addresses([("192.0.2.1", 9)])))
TABLE = encode(Record("0" * 64, encode_addresses([("192.0.2.1", 9)] * FANOUT)))


def _ranks(store: Store, seconds: float = 20.0) -> list[Rank]:
    return [Rank(rank, store, world_size=WORLD_SIZE, seconds=seconds, fanout=FANOUT) for rank in range(WORLD_SIZE)]


def _keys() -> list[str]:
    tree = RankTree(WORLD_SIZE, FANOUT)
    groups = [f"level_{level}/{index}" for level in range(1, tree.num_levels + 1) for index in range(WORLD_SIZE)]
    return [
        f"watchdog/{name}/{key}" for name in ("nonce", "address") for key in (*map(str, range(WORLD_SIZE)), *groups)
    ]


def forged(store: Store, before: dict[str, bytes]) -> None:
    """Writes records with a guessed key."""
    for key in _keys():
        values: dict[str, Any] = TABLE if "level" in key else ELSEWHERE
        store.set(key, seal_object(b"guessed".ljust(32), key, values))


def without_tag(store: Store, before: dict[str, bytes]) -> None:
    for key in _keys():
        store.set(key, json.dumps(TABLE))


def replayed(store: Store, before: dict[str, bytes]) -> None:
    """Writes the records of an earlier attempt with the same key of the user."""
    for key, record in before.items():
        store.set(key, record.decode())


def exchanged(store: Store, before: dict[str, bytes]) -> None:
    """Writes each authentic record to the place of another one."""
    present = [key for key in _keys() if store.check([key])]
    for key, other in pairwise(present):
        store.set(key, store.get(other).decode())


def oversized(store: Store, before: dict[str, bytes]) -> None:
    for key in _keys()[::7]:
        store.set(key, "x" * 3_000_000)


def empty(store: Store, before: dict[str, bytes]) -> None:
    for key in _keys():
        store.set(key, "")


ATTACKS = (forged, without_tag, replayed, exchanged, oversized, empty)
Attack = Callable[[Store, dict[str, bytes]], None]


@contextmanager
def _attacked(attack: Attack, store: Store, before: dict[str, bytes]) -> Iterator[Callable[[], None]]:
    """Repeats an attack on a thread until the block ends or the yielded function is called."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(0.05):
            attack(store, before)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield stop.set
    finally:
        stop.set()
        thread.join()


def _true_addresses(ranks: list[Rank]) -> list[tuple[str, int]]:
    return [(rank.watchdog_socket.host, rank.watchdog_socket.port) for rank in ranks]


def _assert_true(ranks: list[Rank]) -> None:
    """Checks that every rank knows its block and leaders, rank 0 all ranks, and no rank a wrong address."""
    truth, tree = _true_addresses(ranks), RankTree(WORLD_SIZE, FANOUT)
    for number, rank in enumerate(ranks):
        book = rank.watchdog_socket.book
        known = {other: book.address(other) for other in range(WORLD_SIZE) if book.address(other) is not None}
        assert known == {other: truth[other] for other in known}
        needed = set(tree.block(number)) | {tree.parent(number) or 0, 0}
        assert needed <= known.keys() if number else len(known) == WORLD_SIZE


@pytest.fixture(scope="module")
def records() -> dict[str, bytes]:
    """Returns the records of an earlier attempt with the same key."""
    store = HashStore()
    ranks = _ranks(store)
    assert run(ranks) == [None] * WORLD_SIZE
    close(ranks)
    records = {key: store.get(key) for key in _keys() if store.check([key])}
    assert len(records) == 2 * (9 + 5 + 3 + 2 + 1)
    return records


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_start_during_an_attack_that_ends_has_the_true_addresses(attack: Attack, records: dict[str, bytes]) -> None:
    store = HashStore()
    ranks = _ranks(store)
    with _attacked(attack, store, records) as stop:
        timer = threading.Timer(0.4, stop)
        timer.start()
        assert run(ranks) == [None] * WORLD_SIZE
        timer.join()
    _assert_true(ranks)
    close(ranks)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_start_during_an_endless_attack_has_the_true_addresses_or_ends_at_the_deadline(
    attack: Attack, records: dict[str, bytes]
) -> None:
    store = HashStore()
    ranks = _ranks(store, seconds=1.5)
    with _attacked(attack, store, records):
        errors = run(ranks)
    assert all(error is None or isinstance(error, AbsentError) for error in errors)
    assert {error.verdict.code for error in errors if isinstance(error, AbsentError)} <= {76}
    if errors == [None] * WORLD_SIZE:
        _assert_true(ranks)
    close(ranks)


def test_start_records_with_wrong_counts_or_hosts_are_rejected() -> None:
    """Also records of ranks that have the key: another version of this program may write them."""
    good = encode(encode_addresses([("10.0.0.1", 1), ("10.0.0.2", 2)]))
    assert decode_addresses(decode_fields(Addresses, good), 2) == [("10.0.0.1", 1), ("10.0.0.2", 2)]
    bad: list[dict[str, Any]] = [
        {"ports": [1]}, {"ports": [1, 2, 3]}, {"ports": [0, 1]}, {"ports": [1, 65536]}, {"ports": ["1", 2]},
        {"ports": None}, {"host_of": [0]}, {"host_of": [0, 2]}, {"host_of": [-1, 0]}, {"host_of": [0, 1, 1]},
        {"host_of": {}}, {"hosts": []}, {"hosts": ["10.0.0.1"]}, {"hosts": ["10.0.0.1"] * 3}, {"hosts": [7, 7]},
        {"hosts": ["attacker.example", "10.0.0.2"]}, {"hosts": ["10.0.0.1\n", "10.0.0.2"]}, {"hosts": ["1" * 65] * 2},
        {"hosts": "10.0.0.1"},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(MessageError):
            decode_addresses(decode_fields(Addresses, good | change), 2)


def _gathers(num_ranks: int, nonce: str = "") -> list[StoreGather]:
    gathers = []
    for rank in range(num_ranks):
        start = JobStart(Membership(rank, num_ranks, "127.0.0.1", 1, 0, fanout=FANOUT), 1.0, Termination())
        record = Record(f"{nonce}{rank}", encode_addresses([(f"10.0.0.{rank + 1}", 10 + rank)]))
        gathers.append(StoreGather(start, HashStore(), KEY, "nonce", record, lambda: None, {}))
    return gathers


def test_records_without_ones_own_nonce_and_address_or_of_another_size_are_rejected() -> None:
    """So a rank does not take part in an attempt that it is not in, whoever replays its records."""
    gathers = _gathers(5)
    gathers[0]._add_all = lambda: None  # type: ignore[method-assign]
    leaves = [gather._record for gather in gathers]
    level_1 = [gathers[0].combine(1, index, leaves[2 * index : 2 * index + 2]) for index in range(3)]
    level_2 = [gathers[0].combine(2, index, level_1[2 * index : 2 * index + 2]) for index in range(2)]
    root = gathers[0].combine(3, 0, level_2)
    for rank, gather in enumerate(gathers):
        gather.accept([level_1[rank // 2], level_2[rank // 4], root])
    assert len({gather.digest for gather in gathers}) == 1
    truth = [(f"10.0.0.{rank + 1}", 10 + rank) for rank in range(5)]
    assert [gathers[3].book.address(rank) for rank in range(5)] == [truth[0], None, *truth[2:]]
    swapped = encode_addresses(truth[1::-1])
    wrong = [
        [level_1[1], level_2[0], root],
        [level_1[0], level_2[1], root],
        [level_1[0], level_2[0], replace(root, content=level_2[0].content)],
        [replace(level_1[0], content=level_1[0].content + "0" * 32), level_2[0], root],
        [replace(level_1[0], content=level_1[0].content[:32]), level_2[0], root],
        [replace(level_1[0], addresses=swapped), level_2[0], root],
        [level_1[0], replace(level_2[0], addresses=encode_addresses(truth[:1])), root],
    ]
    for path in wrong:
        with pytest.raises(MessageError):
            gathers[0].accept(path)
    with pytest.raises(MessageError, match="nonce"):
        _gathers(5, "a new nonce")[0].accept([level_1[0], level_2[0], root])


@pytest.mark.parametrize(
    "change", [{"content": ["x"]}, {"content": "0" * 5000}, {"addresses": {}}, {"addresses": None}]
)
def test_malformed_record_counts_as_absent(change: dict[str, Any]) -> None:
    (gather,) = _gathers(1)
    gather.publish()
    assert gather._states(["watchdog/nonce/0", "watchdog/nonce/1"]) == ["authentic", "absent"]
    key = "watchdog/nonce/0"
    gather._store.set(key, seal_object(KEY, key, encode(gather._record) | change))
    assert gather._states([key]) == ["forged"]
