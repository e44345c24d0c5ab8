"""Tests of network attacks: nothing that is sent to a run's sockets has an effect on the run."""

import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.wire import DatagramCodec
from tests import ROOT
from tests.comm.watched_ranks import WatchedRanks
from tests.finished_run import losses
from tests.tiny import write_text

pytestmark = pytest.mark.long

# A flood has at least so many datagrams and lasts for several periods of a watchdog's thread.
NUM_FLOOD, FLOOD_SECONDS = 60_000, 1.5
VERDICT = {"code": 0, "text": "forged", "judge": 1, "culprits": [[0, 1, 1]]}


@dataclass(frozen=True)
class Victim:
    """A run of two ranks that waits in the middle of training, with the datagrams of this run and of an earlier one."""

    command: subprocess.Popen[str]
    folder: Path
    ranks: tuple[dict[str, Any], dict[str, Any]]

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in order."""
        return [rank["pid"] for rank in self.ranks]

    def ports(self, kind: str) -> list[list[tuple[str, int]]]:
        """Returns the addresses of each rank's sockets that others can send to: bound `udp` or listening `tcp`."""
        found = []
        for pid in self.pids:
            sockets = psutil.Process(pid).net_connections(kind)
            found.append([each.laddr for each in sockets if each.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)])
        return found

    def sent(self, run: str) -> list[tuple[int, int, bytes]]:
        """Returns sender, recipient and bytes of each datagram of a run so far."""
        return [
            (rank, recipient, bytes.fromhex(data))
            for rank in (0, 1)
            for recipient, data in map(json.loads, (self.folder / run / f"sent_{rank}").read_text().splitlines())
        ]

    def num_ticks(self) -> list[int]:
        """Returns how often each watchdog's thread has polled."""
        paths = [self.folder / "attacked" / f"ticks_{rank}" for rank in (0, 1)]
        return [path.stat().st_size for path in paths]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("network")
    write_text(folder)
    command = [sys.executable, "-m", "tests.attacks.network_ranks", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL) as process:
        try:
            paths = [folder / "attacked" / f"waiting_{rank}" for rank in (0, 1)]
            until = time.monotonic() + 180
            while not all(path.exists() and path.read_text() for path in paths):
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < until
                time.sleep(0.05)
            yield Victim(process, folder, (json.loads(paths[0].read_text()), json.loads(paths[1].read_text())))
        finally:
            (folder / "over").touch()
            process.terminate()  # so that it removes its temporary folder
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _send(victim: Victim, datagrams: list[tuple[int, bytes]]) -> None:
    """Sends each datagram to its rank from a foreign socket, with time to read in between."""
    ports = [each[0] for each in victim.ports("udp")]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
        for number, (rank, data) in enumerate(datagrams):
            attacker.sendto(data, ports[rank])
            if number % 64 == 63:
                time.sleep(0.01)


def _both(*datagrams: bytes) -> list[tuple[int, bytes]]:
    return [(rank, data) for data in datagrams for rank in (0, 1)]


def garbage(victim: Victim) -> None:
    noise = random.Random(1)
    _send(victim, _both(b"", b"\0", *(noise.randbytes(noise.choice((1, 48, 49, 50, 200, 65507))) for _ in range(200))))


def forged(victim: Victim) -> None:
    """Sends datagrams as a rank would, but with another key."""
    for key in (bytes(32), b"guessed".ljust(32)):
        for rank in (0, 1):
            codec = DatagramCodec(key, 1 - rank, 2)
            kinds = [codec.encode(rank, "verdict", VERDICT | {"code": code}) for code in (0, 1, 76, 78)]
            kinds.append(codec.encode(rank, "departure", {"end": "error", "text": "forged"}))
            _send(victim, [(rank, data) for data in kinds])


def without_authentication(victim: Victim) -> None:
    """Sends datagrams in the old format: a secret from the store, then compressed JSON."""
    texts = [
        json.dumps(["verdict", 1, VERDICT]),
        json.dumps(["departure", 1, {"end": "error", "text": "x"}]),
        "[[" * 9000,
    ]
    _send(victim, _both(*(prefix + zlib.compress(text.encode()) for text in texts for prefix in (b"", bytes(16)))))


def replayed(victim: Victim) -> None:
    _send(victim, [(recipient, data) for _, recipient, data in victim.sent("attacked")] * 20)


def replayed_to_another_rank(victim: Victim) -> None:
    _send(victim, [(1 - recipient, data) for _, recipient, data in victim.sent("attacked")] * 20)


def replayed_from_an_earlier_attempt(victim: Victim) -> None:
    _send(victim, [(rank, data) for _, _, data in victim.sent("uninterrupted") for rank in (0, 1)])


def truncated(victim: Victim) -> None:
    _send(victim, [(to, data[:size]) for _, to, data in victim.sent("attacked") for size in range(0, len(data), 3)])


def extended(victim: Victim) -> None:
    """Sends datagrams with appended bytes, up to the largest size."""
    sent = [(to, data) for _, to, data in victim.sent("attacked")]
    _send(victim, [(to, data.ljust(size, b"x")) for to, data in sent for size in (len(data) + 1, 9000, 65507)])


def with_flipped_bits(victim: Victim) -> None:
    for _, recipient, data in victim.sent("attacked")[:4]:
        flipped = [bytearray(data) for _ in range(0, 8 * len(data), 5)]
        for number, each in enumerate(flipped):
            each[number * 5 // 8] ^= 1 << number * 5 % 8
        _send(victim, [(recipient, bytes(each)) for each in flipped])


def decompression_bombs(victim: Victim) -> None:
    _send(victim, _both(bytes(49) + zlib.compress(bytes(40 << 20), 9), zlib.compress(bytes(40 << 20), 9)))


def flood(victim: Victim) -> None:
    """Sends datagrams without a pause. Every watchdog's thread must keep its polling interval."""
    ports = [each[0] for each in victim.ports("udp")]
    before, begun = victim.num_ticks(), time.monotonic()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
        # Up to their tags these are another rank's, so their tags have to be computed, for 1 of 100 over 65 kB.
        headers = [bytes(32) + struct.pack("!BIIQ", 0, 1 - rank, rank, 1 << 40) for rank in (0, 1)]
        large = [header.ljust(65507, b"x") for header in headers]
        for number in count(1):
            attacker.sendto((headers if number // 2 % 100 else large)[number % 2], ports[number % 2])
            if number >= NUM_FLOOD and time.monotonic() >= begun + FLOOD_SECONDS:
                break
    seconds = time.monotonic() - begun
    ticks = [after - earlier for after, earlier in zip(victim.num_ticks(), before, strict=True)]
    print(f"{number} datagrams in {seconds:.1f} s; {ticks} looks of the watchdogs meanwhile")
    assert min(ticks) >= 2 * seconds, (ticks, seconds)


def attackers_on_listening_ports(victim: Victim) -> None:
    """Sends garbage, connects and disconnects, and stays connected silently."""
    noise = random.Random(2)
    with ExitStack() as held:
        for address in {address for each in victim.ports("tcp") for address in each}:
            for number in range(40):
                attacker = held.enter_context(socket.create_connection(address, timeout=5))
                if number % 4 == 0:
                    attacker.sendall(noise.randbytes(noise.choice((1, 8, 64, 100_000))))
                if number % 4 == 1:
                    attacker.sendall(bytes(8))
                if number % 4 == 2:
                    attacker.close()
        time.sleep(0.5)


def works_on(rank: int, log: CollectiveLog, strike: Callable[[], None]) -> None:
    """Runs a rank of a job whose store is attacked."""
    for number in range(4):
        distributed.all_reduce(torch.ones(3))
        if number == 1:
            strike()
        time.sleep(0.5)


def _connect(port: int) -> socket.socket | None:
    try:
        return socket.create_connection(("127.0.0.1", port), timeout=2)
    except OSError:
        return None


def _open_store(port: int) -> distributed.TCPStore:  # type: ignore[name-defined]
    """Opens the store as an attacker does, which needs only the port."""
    until = time.monotonic() + 60
    while (opened := _connect(port)) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    opened.close()
    return distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]


def test_network_attackers_on_the_port_of_a_store_have_no_effect() -> None:
    """Under torchrun the store listens: on this machine alone, if all ranks are on it."""
    ranks, noise = WatchedRanks(2, works_on, 10.0), random.Random(3)
    store = _open_store(ranks.port)
    with ExitStack() as held:
        until = time.monotonic() + 60
        while not ranks.has_failed and time.monotonic() < until:
            if (attacker := _connect(ranks.port)) is not None:
                held.enter_context(attacker)
                with suppress(OSError):
                    attacker.sendall(noise.randbytes(noise.choice((1, 4, 64, 9000))))
            time.sleep(0.05)
        for _ in range(200):
            if (attacker := _connect(ranks.port)) is not None:
                held.enter_context(attacker)
        records = [f"{kind}/{place}" for kind in ("nonce", "address") for place in ("0", "1", "level_1/0")]
        for name in ("key", "verdict", *records, "ready/0", "ready/1"):
            store.set(f"watchdog/{name}", json.dumps(VERDICT))
            store.delete_key(f"watchdog/{name}")
            store.set(f"watchdog/{name}", "")
        ends = ranks.ends()
    assert {end.exit_code for end in ends.values()} == {0}, ends


ATTACKS: tuple[Callable[[Victim], None], ...] = (
    *(garbage, forged, without_authentication, replayed, replayed_to_another_rank, replayed_from_an_earlier_attempt),
    *(truncated, extended, with_flipped_bits, decompression_bombs, flood, attackers_on_listening_ports),
)


def test_network_run_is_reached_from_this_machine_alone(victim: Victim) -> None:
    session = [psutil.Process(victim.command.pid), *psutil.Process(victim.command.pid).children(recursive=True)]
    assert set(victim.pids) <= {process.pid for process in session}
    open_sockets = [(process.pid, each) for process in session for each in process.net_connections("inet")]
    assert len(open_sockets) >= 4
    outside = [each for each in open_sockets if not ip_address(each[1].laddr.ip).is_loopback]
    assert not outside, outside
    # Ranks meet in a file, so no port leads to their store.
    listening = {pid for pid, each in open_sockets if each.status == psutil.CONN_LISTEN}
    assert listening <= set(victim.pids)


def test_network_key_is_in_no_environment_and_the_store_is_private(victim: Victim) -> None:
    session = [psutil.Process(victim.command.pid), *psutil.Process(victim.command.pid).children(recursive=True)]
    environments = [Path(f"/proc/{process.pid}/environ").read_bytes() for process in session]
    assert not any(b"DUALPIPE_JOB_KEY" in each for each in environments)
    assert not any(rank["has_key"] for rank in victim.ranks)
    store = Path(victim.ranks[0]["store"])
    assert store.is_file()
    assert (store.parent.stat().st_mode & 0o777, store.parent.stat().st_uid) == (0o700, os.geteuid())
    assert not list((victim.folder / "attacked").glob(".job-key*"))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_network_attack_leaves_watchdogs_at_work(attack: Callable[[Victim], None], victim: Victim) -> None:
    attack(victim)
    before = victim.num_ticks()
    until = time.monotonic() + 10
    while min(after - earlier for after, earlier in zip(victim.num_ticks(), before, strict=True)) < 3:
        assert victim.command.poll() is None
        assert time.monotonic() < until, "a watchdog's thread has ended"
        time.sleep(0.05)
    assert all(psutil.pid_exists(pid) for pid in victim.pids)


def test_network_attacked_run_ends_as_an_uninterrupted_one(victim: Victim) -> None:
    """Runs last, because it lets the run end."""
    (victim.folder / "over").touch()
    _, err = victim.command.communicate(timeout=120)
    assert victim.command.returncode == 0, err
    assert losses(victim.folder / "attacked") == losses(victim.folder / "uninterrupted")
    assert not list((victim.folder / "attacked" / "log").glob("*.error.log"))
    assert "watchdog" not in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in victim.pids)
