"""Measures messages of the watchdogs of a large job: the longest ones, and those of an inquiry and of a verdict.

A second process plays all other ranks: they share one socket, whose answers are authentic for each of them.
"""

import multiprocessing
import random
import socket
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from base.decode import encode
from bench.scale.groups import published_layout
from comm.watchdog import wire
from comm.watchdog.collective_log import CollectiveLog, group_name
from comm.watchdog.messages import (
    MAX_BLOCKS,
    AddressBook,
    AddressReply,
    Departure,
    Message,
    Reached,
    StateRequest,
    WatchdogSocket,
    encode_addresses,
)
from comm.watchdog.ranks import FANOUT, RankSet, RankTree, name_ranks
from comm.watchdog.verdict import MAX_CULPRITS, MainThread, RankState, Started, Verdict, Wait
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.wire import Kind, SocketAddress
from tests.comm.watched_ranks import full_book

LIMIT_BYTES = 65_507
_KEY = bytes(range(32))
_RECIPIENT = slice(37, 41)  # of a datagram: after its tag, kind and sender
_DEADLINE_SECONDS = 0.2
_NUM_GROUPS = 64
_NUM_WAITS = 8


def longest_messages(num_ranks: int) -> dict[Kind, int]:
    """Returns the bytes of the longest message of each kind that grows with its content.

    They hold as much as a message may: the state of a rank that waits in eight irregular groups, a verdict on irregular
    ranks with a text of the longest kind, and the addresses of ranks that all are on different machines. Texts are
    random characters, which do not compress.
    """
    noise = random.Random(num_ranks)
    squares = [number * number for number in range(num_ranks) if number * number < num_ranks]
    groups = [group_name(f"group {number}", [*squares, number + 2]) for number in range(_NUM_GROUPS)]
    ranks = RankSet.of(squares).first(num_ranks)
    waits = tuple(
        Wait(text=_random_text(noise, 512), group=name, number=2**40, ranks=ranks, seconds=noise.random() * 1e6)
        for name in groups[:_NUM_WAITS]
    )
    state = RankState(
        waits=waits,
        started={name: noise.randrange(2**40) for name in groups},
        is_busy=True,
        place=_random_text(noise, 256),
        last=_random_text(noise, 512),
        idle_seconds=noise.random() * 1e6,
        log=tuple(Started(group=name, number=2**40, name=_random_text(noise, 64)) for name in groups[:36]),
    )
    text = _random_text(noise, wire.MAX_TEXT_CHARACTERS)
    verdict = Verdict(code=78, text=text, judge=num_ranks - 1, culprits=RankSet.of(squares).first(MAX_CULPRITS))
    addresses = [(f"fd00::{noise.randrange(2**64):x}", noise.randrange(1, 65536)) for _ in range(FANOUT)]
    messages: dict[Kind, Message] = {
        "state": state,
        "verdict": verdict,
        "addresses": AddressReply(0, (encode_addresses(addresses),) * MAX_BLOCKS),
        "departure": Departure("error", _random_text(noise, wire.MAX_TEXT_CHARACTERS)),
        "state_request": StateRequest(groups[-1], 2**40),
    }
    return _sizes(messages, num_ranks)


def training_messages(num_ranks: int) -> dict[Kind, int]:
    """Returns the bytes of the longest messages of a training run in the published layout, at a common deadline."""
    layout, rank, log = published_layout(num_ranks), num_ranks // 2, CollectiveLog()
    members: dict[str, Iterable[int]] = {
        "world": range(num_ranks),
        "stage": layout.stage_group(rank, mirrored=True),
        "expert_data": layout.expert_data_group(rank, mirrored=True),
        "embedding": layout.ranks_at((0, 15)),
        "pipeline": layout.pipeline_group(rank),
        "expert": layout.expert_group(rank),
    }
    awaited = []
    for kind, ranks in members.items():
        name = group_name(kind, ranks)
        for number in range(100):
            awaited.append(log.awaiting(log.start(name, ranks, "sum of gradients of stage 15", f"layer {number}")))
    for peer in (rank - 1, rank + 1):
        for kind in ("activation", "gradient"):
            log.start(f"{kind} {rank}->{peer}", (rank, peer), "transfer", "micro-batch 119")
    with ExitStack() as inside:
        for wait in awaited[-8:]:
            inside.enter_context(wait)
        state = RankState.of(log, MainThread())
    assert len(state.waits) == 8
    missing = RankSet.of(range(0, num_ranks, 97)).first(MAX_CULPRITS)
    waiters = f"{name_ranks(range(num_ranks))} waited for {state.waits[0].text}"
    text = f"{name_ranks(missing)} did not reach a collective; {waiters}"
    addresses = [
        [(f"10.{block >> 5}.{block & 31}.{place >> 3}", 30_000 + 7 * place) for place in range(FANOUT)]
        for block in range(MAX_BLOCKS)
    ]
    messages: dict[Kind, Message] = {
        "state": state,
        "verdict": Verdict(code=76, text=text, judge=rank, culprits=missing),
        "addresses": AddressReply(0, tuple(map(encode_addresses, addresses))),
    }
    return _sizes(messages, num_ranks)


def _sizes(messages: dict[Kind, Message], num_ranks: int) -> dict[Kind, int]:
    codec = wire.DatagramCodec(_KEY, num_ranks - 1, num_ranks)
    relay = {"relay": {"origin": num_ranks - 1, "turn": 63}}
    return {kind: len(codec.encode(0, kind, encode(each) | relay)) for kind, each in messages.items()}


def _random_text(noise: random.Random, num_characters: int) -> str:
    letters = [chr(code) for code in range(0x21, 0x3000) if chr(code).isprintable()]
    return wire.printable("".join(noise.choices(letters, k=num_characters)), num_characters)


class PlayedRanks:
    """All other ranks of a job on one socket: each has reached every collective and waits for it, except one."""

    def __init__(self, num_ranks: int, silent: int) -> None:
        """Starts the process that plays the ranks; rank `silent` replies nothing."""
        self.num_datagrams: Counter[str] = Counter()
        self._num_ranks = num_ranks
        self._silent = silent
        self._codecs: dict[int, wire.DatagramCodec] = {}
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.2)
        context = multiprocessing.get_context("fork")
        self._is_over = context.Event()
        self._counts, counts = context.Pipe(duplex=False)
        self._process = context.Process(target=self._run, args=(counts,), daemon=True)
        self._process.start()

    @property
    def address(self) -> SocketAddress:
        host, port = self._socket.getsockname()
        return host, port

    def close(self) -> None:
        """Ends the process, after which `num_datagrams` is known, and closes the socket."""
        self._is_over.set()
        self.num_datagrams = self._counts.recv()
        self._process.join()
        self._socket.close()

    def _run(self, counts: Any) -> None:
        while True:
            try:
                data, sender = self._socket.recvfrom(wire.MAX_DATAGRAM_BYTES)
            except TimeoutError:
                if self._is_over.is_set():
                    counts.send(self.num_datagrams)
                    return
                continue
            rank = int.from_bytes(data[_RECIPIENT], "big")
            codec = self._codecs.setdefault(rank, wire.DatagramCodec(_KEY, rank, self._num_ranks))
            datagram = codec.decode(data)
            self.num_datagrams[datagram.kind] += 1
            if datagram.kind == "state_request" and rank != self._silent:
                request = wire.decode_fields(StateRequest, datagram.values)
                reply = Reached(str(request.group), request.number, is_waiting=True)
                self._socket.sendto(codec.encode(datagram.sender, "reached", encode(reply)), sender)
                self.num_datagrams["reached"] += 1


@dataclass(frozen=True, slots=True)
class InquiryFigures:
    """What one inquiry of rank 0 to all other ranks took, until all have the verdict."""

    seconds: float
    cpu_seconds: float
    num_datagrams: int
    verdict: Verdict


def inquire(num_ranks: int, fanout: int = FANOUT) -> InquiryFigures:
    """Lets rank 0 wait for all ranks, of which the last but one is silent, and measures until it has a verdict."""
    played = PlayedRanks(num_ranks, silent=num_ranks - 2)
    watchdog_socket = WatchdogSocket(0, "127.0.0.1")
    addresses = [(watchdog_socket.host, watchdog_socket.port), *[played.address] * (num_ranks - 1)]
    watchdog_socket.open(full_book(addresses, RankTree(num_ranks, fanout)), _KEY)
    verdicts: list[Verdict] = []
    has_ended = threading.Event()

    def crash_report(verdict: Verdict) -> None:
        verdicts.append(verdict)
        has_ended.set()
        raise SystemExit  # ends the watchdog's thread in place of the process

    log = CollectiveLog()
    watchdog = Watchdog(0, watchdog_socket, log, _DEADLINE_SECONDS, crash_report)
    with log.awaiting(log.start(group_name("world", range(num_ranks)), range(num_ranks), "sum of losses")):
        begun, cpu_begun = time.monotonic(), time.process_time()
        watchdog.start()
        assert has_ended.wait(120)
    seconds, cpu_seconds = time.monotonic() - begun - _DEADLINE_SECONDS, time.process_time() - cpu_begun
    played.close()
    watchdog_socket.close()
    return InquiryFigures(seconds, cpu_seconds, played.num_datagrams.total(), verdicts[0])


def measure(num_ranks: int) -> dict[str, float]:
    """Measures the messages of the watchdogs of so many ranks."""
    tree, inquiry = RankTree(num_ranks), inquire(num_ranks)
    return {
        "watchdog: longest possible message, bytes": max(longest_messages(num_ranks).values()),
        "watchdog: longest message of a training run, bytes": max(training_messages(num_ranks).values()),
        "watchdog: datagrams of an inquiry to all ranks": inquiry.num_datagrams,
        "watchdog: time of that inquiry, s": inquiry.seconds,
        "watchdog: CPU of its rank, s": inquiry.cpu_seconds,
        "watchdog: datagrams of a verdict to all ranks": num_ranks - 1,
        "watchdog: most of them sent by one rank": len(list(tree.children(0))),
        "watchdog: addresses held by a rank, bytes": _address_bytes(num_ranks),
    }


def broken_laws(num_ranks: int, figures: dict[str, float]) -> list[str]:
    """Returns the limits that the figures of `measure` exceed."""
    longest = figures["watchdog: longest possible message, bytes"]
    is_long = longest > LIMIT_BYTES
    return [f"{num_ranks} ranks: a message has {longest} bytes, more than {LIMIT_BYTES}"] if is_long else []


def _address_bytes(num_ranks: int) -> int:
    """Returns the memory of the addresses of all ranks, eight on each machine."""
    addresses = [
        (f"10.{rank >> 19}.{rank >> 11 & 255}.{rank >> 3 & 255}", 1024 + rank % 8) for rank in range(num_ranks)
    ]
    tracemalloc.start()
    try:
        book = AddressBook(RankTree(num_ranks))
        # Parsed texts, as they arrive in messages, share no memory.
        book.add(range(num_ranks), ((host[:3] + host[3:], port) for host, port in addresses))
        del addresses
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
