"""Ranks exchange addresses through an untrusted store: records of other processes are ignored."""

import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import FileStore, HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from comm.watchdog.job_start import AbsentError, JobStart, Termination
from comm.watchdog.membership import (
    KEY_VARIABLE,
    JobKeyError,
    Membership,
    read_key_file,
    take_key_from_environment,
    write_key_file,
)
from comm.watchdog.messages import WatchdogSocket
from comm.watchdog.ranks import FANOUT
from comm.watchdog.rendezvous import AddressExchange
from tests.comm.watched_ranks import KEY


class Rank:
    def __init__(
        self, rank: int, store: Store, key: bytes | None = KEY, folder: Path | None = None, world_size: int = 3,
        seconds: float = 20.0, reach: str = "127.0.0.1", fanout: int = FANOUT,
    ) -> None:  # fmt: skip
        member = Membership(rank, world_size, reach, 1, 0, key=key, fanout=fanout)
        self.watchdog_socket = WatchdogSocket(rank, reach)
        self.exchange = AddressExchange(JobStart(member, seconds, Termination()), store, self.watchdog_socket, folder)


def run(ranks: list[Rank], meanwhile: Callable[[], None] = lambda: None) -> list[BaseException | None]:
    def one(rank: Rank) -> BaseException | None:
        try:
            rank.exchange.run()
        except (AbsentError, JobKeyError) as error:
            return error
        return None

    with ThreadPoolExecutor(len(ranks)) as pool:
        running = [pool.submit(one, rank) for rank in ranks]
        meanwhile()
        return [each.result() for each in running]


def assert_connected(ranks: list[Rank]) -> None:
    """Checks that every rank's message reaches every other rank."""
    for sender in ranks:
        for number in range(len(ranks)):
            sender.watchdog_socket.send(number, "state_request", {})
    for number, rank in enumerate(ranks):
        found: set[int] = set()
        until = time.monotonic() + 5
        while len(found) < len(ranks) - 1 and time.monotonic() < until:
            found |= {message.sender for message in rank.watchdog_socket.receive(0.2)[0]}
        assert found == set(range(len(ranks))) - {number}


def close(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.watchdog_socket.close()


@pytest.mark.parametrize("kind", ["given", "file"])
def test_ranks_that_share_a_key_are_connected_and_leave_no_secret(kind: str, tmp_path: Path) -> None:
    key, folder = (KEY, None) if kind == "given" else (None, tmp_path)
    # A file store, so that the test can read everything that a rank wrote.
    path = tmp_path / "store"
    ranks = [Rank(rank, FileStore(str(path), -1), key, folder if rank == 0 else None) for rank in range(3)]
    assert run(ranks) == [None] * 3
    assert_connected(ranks)
    close(ranks)
    assert not list(tmp_path.glob(".job-key*"))
    assert KEY not in path.read_bytes()
    codecs = [rank.watchdog_socket._codec for rank in ranks]
    assert len({codec._key for codec in codecs if codec}) == 1


@pytest.mark.slow
def test_ranks_of_three_blocks_meet_at_a_server_and_absent_ones_are_named() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Rank(rank, TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False), world_size=130)
        for rank in range(130)
    ]
    assert run(ranks) == [None] * 130
    truth = [(rank.watchdog_socket.host, rank.watchdog_socket.port) for rank in ranks]
    for number, rank in enumerate(ranks):
        book = rank.watchdog_socket.book
        known = {other: book.address(other) for other in range(130) if book.address(other) is not None}
        block = range(number // 64 * 64, min(number // 64 * 64 + 64, 130))
        assert known.keys() == (set(range(130)) if number == 0 else {0, 64, 128, *block})
        assert known == {other: truth[other] for other in known}
    close(ranks)
    present = [rank for rank in range(130) if rank not in (3, 64, 65, 129)]
    few = [Rank(rank, store, world_size=130, seconds=3.0) for store in [HashStore()] for rank in present]
    texts = {str(error) for error in run(few)}
    assert texts == {
        "ranks 3, 64, 65 and 129 are absent: not joined within 3 s; "
        "ranks 0 to 2, 4 to 63 and 66 to 128 waited for start of the job"
    }
    close(few)


def test_each_attempt_has_a_new_key() -> None:
    first, second = ([Rank(rank, store) for rank in range(3)] for store in (HashStore(), HashStore()))
    assert run(first) == run(second) == [None] * 3
    first[1].watchdog_socket._book = second[1].watchdog_socket.book
    first[1].watchdog_socket.send(0, "verdict", {"code": 78, "text": "earlier", "judge": 1, "culprits": []})
    assert second[0].watchdog_socket.receive(0.3)[0] == []
    assert second[0].watchdog_socket.num_dropped == 1
    close(first + second)


def test_records_of_an_earlier_attempt_and_of_other_processes_count_as_absent(tmp_path: Path) -> None:
    """The store contains records of an earlier attempt, and another process keeps writing to it."""
    store = HashStore()
    (tmp_path / "before").mkdir()
    before = [Rank(rank, store, None, tmp_path / "before") for rank in range(3)]
    assert run(before) == [None] * 3
    ranks = [Rank(rank, store, None, tmp_path) for rank in range(3)]

    def interfere() -> None:
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            for name in ("nonce/0", "nonce/1", "verdict"):
                store.set(f"watchdog/{name}", f"{'0' * 64} " + '{"code": 0, "text": "x", "judge": 0, "culprits": [1]}')
            store.set("watchdog/key", '{"source": "file", "path": "/tmp/.job-key-' + "0" * 32 + '"}')
            time.sleep(0.05)

    assert run(ranks, interfere) == [None] * 3
    assert_connected(ranks)
    close(before + ranks)


def test_forged_verdict_in_the_store_is_replaced_by_an_authentic_one() -> None:
    store = HashStore()
    store.set("watchdog/verdict", '{"code": 0, "text": "forged", "judge": 0, "culprits": []}')
    ranks = [Rank(rank, store, seconds=1.0) for rank in (0, 2)]
    errors = run(ranks)
    assert all(isinstance(error, AbsentError) for error in errors)
    texts = {(error.verdict.code, error.verdict.text) for error in errors if isinstance(error, AbsentError)}
    assert texts == {(76, "rank 1 is absent: not joined within 1 s; ranks 0 and 2 waited for start of the job")}
    close(ranks)


@pytest.mark.parametrize("planted", [None, '{"code": 0, "text": "forged", "judge": 1, "culprits": []}', "[" * 9999])
def test_ranks_without_a_key_end_with_the_first_verdict(planted: str | None) -> None:
    store = HashStore()
    if planted is not None:
        store.set("watchdog/verdict_without_key", planted)
    ranks = [Rank(rank, store, seconds=seconds) for rank, seconds in ((1, 0.5), (2, 1.5))]
    verdicts = [error.verdict for error in run(ranks) if isinstance(error, AbsentError)]
    text = "is absent: not joined within {} s; ranks 1 and 2 waited for start of the job"
    # A forged record is ignored, and then the ranks have no common verdict.
    expected = ["0.5", "0.5"] if planted is None else ["0.5", "1.5"]
    assert [(verdict.code, verdict.text) for verdict in verdicts] == [
        (76, f"rank 0 {text.format(seconds)}") for seconds in expected
    ]
    close(ranks)


def test_record_that_is_not_authentic_is_named_at_the_deadline() -> None:
    store = HashStore()
    stop = threading.Event()

    def pretend() -> None:
        while not stop.wait(0.02):
            store.set("watchdog/nonce/1", '{"host": "127.0.0.1", "nonce": "00"}')

    thread = threading.Thread(target=pretend)
    thread.start()
    (error,) = run([rank := Rank(0, store, world_size=2, seconds=1.0)])
    stop.set()
    thread.join()
    assert str(error) == (
        "rank 1 is absent: not joined within 1 s (the addresses in the store are not authentic); "
        "rank 0 waited for start of the job"
    )
    close([rank])


def test_key_on_some_ranks_only_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comm.watchdog.rendezvous._FILE_SECONDS", 0.3)
    for keys, place, other in (((KEY, None), "rank 0", "rank 1"), ((None, KEY), "rank 1", "rank 0")):
        ranks = [Rank(rank, store, keys[rank], tmp_path, 2, 1.0) for store in [HashStore()] for rank in (0, 1)]
        _, error = run(ranks)
        assert isinstance(error, JobKeyError)
        assert (
            f"DUALPIPE_JOB_KEY: must be set for all ranks or for none, is set on {place} and not on {other}; "
            in str(error)
        )
        close(ranks)


@pytest.mark.parametrize("is_gone", [True, False])
def test_rank_without_access_to_the_key_file_reports_it(
    is_gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its out_dir is another one, without a shared file system. Or the file that the store names is another user's."""
    monkeypatch.setattr("comm.watchdog.rendezvous._FILE_SECONDS", 0.3)
    store, file = HashStore(), write_key_file(tmp_path)
    reasons = ["must belong to user 0, belongs to user 12345"]
    if is_gone:
        file.remove()
        reasons = [
            "out_dir: rank 1 must see the file with the job's key that rank 0 wrote",
            "nearest valid: an out_dir on a file system that all ranks share, or export DUALPIPE_JOB_KEY=",
        ]
    elif os.geteuid() == 0:
        os.chown(file.path, 12345, -1)
    else:
        pytest.skip("only root can give a file to another user")
    store.set("watchdog/key", f'{{"source": "file", "path": "{file.path}"}}')
    (error,) = run([rank := Rank(1, store, None, world_size=2)])
    assert isinstance(error, JobKeyError)
    assert all(reason in str(error) for reason in reasons)
    close([rank])


def test_rank_with_only_a_loopback_address_rebinds_to_a_reachable_one() -> None:
    """The first machine may resolve its own name to 127.0.1.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but its own loopback")
        far = probe.getsockname()[0]
    store = HashStore()
    ranks = [Rank(0, store, reach="127.0.0.1"), Rank(1, store, reach=far), Rank(2, store, reach=far)]
    assert run(ranks) == [None] * 3
    assert [rank.watchdog_socket.host for rank in ranks] == [far] * 3
    assert_connected(ranks)
    close(ranks)


def test_key_file_is_private_and_returns_the_key(tmp_path: Path) -> None:
    file = write_key_file(tmp_path)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert read_key_file(file.path) == file.key
    assert file.key.hex() not in file.path.name
    assert len(file.key) == 32
    second = write_key_file(tmp_path)
    assert second.key != file.key
    assert not file.path.exists()  # a file of an earlier attempt
    second.remove()
    second.remove()
    assert not list(tmp_path.iterdir())


def test_key_file_that_others_can_read_or_replace_is_rejected(tmp_path: Path) -> None:
    file = write_key_file(tmp_path)
    file.path.chmod(0o640)
    with pytest.raises(JobKeyError, match="must have mode 600, has mode 640"):
        read_key_file(file.path)
    file.path.chmod(0o600)
    other = tmp_path / "other"
    os.link(file.path, other)
    with pytest.raises(JobKeyError, match="one link"):
        read_key_file(file.path)
    file.path.unlink()
    file.path.symlink_to(other)
    with pytest.raises(JobKeyError, match="cannot be read"):
        read_key_file(file.path)
    file.path.unlink()
    os.mkfifo(file.path, 0o600)
    with pytest.raises(JobKeyError, match="regular file"):
        read_key_file(file.path)
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(JobKeyError, match="regular file"):
        read_key_file(file.path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_key_file_of_another_user_is_rejected(tmp_path: Path) -> None:
    file = write_key_file(tmp_path)
    os.chown(file.path, 12345, -1)
    with pytest.raises(
        JobKeyError, match=r"must belong to user 0, belongs to user 12345; nearest valid: .*DUALPIPE_JOB_KEY"
    ):
        read_key_file(file.path)


def test_key_file_whose_name_does_not_match_its_key_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    first, second = write_key_file(tmp_path / "other"), write_key_file(tmp_path)
    second.path.write_bytes(first.key)
    with pytest.raises(JobKeyError, match="must contain the key whose hash is in its name"):
        read_key_file(second.path)
    second.path.write_bytes(second.key + b"x")
    with pytest.raises(JobKeyError, match="must contain the key whose hash is in its name"):
        read_key_file(second.path)
    second.path.write_bytes(second.key[:7])
    with pytest.raises(FileNotFoundError):  # not all of it has arrived
        read_key_file(second.path)


@pytest.mark.parametrize("name", ["/etc/passwd", ".job-key-" + "0" * 32, "/tmp/.job-key-x", "/proc/self/mem", "", "/"])
def test_path_that_is_not_a_key_file_is_rejected_unread(name: str) -> None:
    with pytest.raises(JobKeyError, match="which is not a file with a job's key"):
        read_key_file(Path(name))


def test_folder_that_rejects_a_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobKeyError, match=r"out_dir: must accept a file with the job's key, .*; nearest valid: "):
        write_key_file(tmp_path / "missing")


def test_key_is_removed_from_the_environment_and_must_be_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_key_from_environment() is None
    monkeypatch.setenv(KEY_VARIABLE, "k" * 31)
    with pytest.raises(JobKeyError, match="at least 32 random characters, has 31"):
        take_key_from_environment()
    monkeypatch.setenv(KEY_VARIABLE, "k" * 32)
    key = take_key_from_environment()
    assert key is not None
    assert len(key) == 32
    assert KEY_VARIABLE not in os.environ
