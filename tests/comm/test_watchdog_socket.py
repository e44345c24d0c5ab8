"""A watchdog reacts to datagrams as specified, without collectives."""

import os
import signal
import time

import pytest

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.tree.address_book import AddressBook
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.watchdog_socket import WatchdogSocket

KEY = b"the key of a test's job".ljust(32)


def _two_sockets() -> tuple[WatchdogSocket, WatchdogSocket]:
    endpoints = WatchdogSocket(0, "127.0.0.1"), WatchdogSocket(1, "127.0.0.1")
    for endpoint in endpoints:
        endpoint.open(AddressBook.of([(other.host, other.port) for other in endpoints]), KEY)
    return endpoints


def test_socket_distinguishes_closed_from_silent_peers_and_ignores_other_senders() -> None:
    first, second = _two_sockets()
    outsider = WatchdogSocket(1, "127.0.0.1")
    outsider.open(AddressBook.of([(each.host, each.port) for each in (first, second)]), b"another job's key".ljust(32))
    outsider.send(0, "state_request", {"who": "outsider"})
    second.send(0, "state_request", {"who": "peer", "padding": "x" * 200_000})  # more than a datagram holds, compressed
    messages, _ = first.receive(5.0)
    messages += first.receive(0.1)[0]
    assert [(message.rank, message.values["who"]) for message in messages] == [(1, "peer")]
    first.probe(1, {})
    assert first.receive(0.1)[0] == []
    assert first.refused == set()
    second.close()
    first.probe(1, {})
    first.receive(1.0)
    assert first.refused == {1}
    first.close()
    outsider.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("others", ["verdict 2", "error 2"])
@pytest.mark.parametrize("is_first", [False, True])
def test_watchdog_keeps_the_same_of_two_verdicts_in_any_order(
    others: str, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest rank's verdict wins, but a rank's own error, a possible cause, comes first."""
    monkeypatch.setattr("comm.watchdog.inquiries.shutdown._FOLLOW_SECONDS", 0.5)
    endpoints = [WatchdogSocket(rank, "127.0.0.1") for rank in range(3)]
    for endpoint in endpoints:
        endpoint.open(AddressBook.of([(other.host, other.port) for other in endpoints]), KEY)
    kept: list[Verdict] = []

    def crash_report(verdict: Verdict) -> None:
        kept.append(verdict)
        raise SystemExit  # ends the watchdog's thread instead of the process

    watchdog = Watchdog(0, endpoints[0], CollectiveLog(), 60.0, crash_report)
    watchdog.start()
    for word in (others, "verdict 1") if is_first else ("verdict 1", others):
        kind, _, rank = word.partition(" ")
        if kind == "error":
            endpoints[int(rank)].send(0, "departure", {"end": "error", "text": "ValueError: x"})
        else:
            body = {"code": 76, "text": f"by {rank}", "judge": int(rank), "culprits": [[0, 1, 1]]}
            endpoints[int(rank)].send(0, "verdict", body)
    until = time.monotonic() + 20
    while not kept and time.monotonic() < until:
        time.sleep(0.05)
    assert kept.pop().text == ("rank 2: ValueError: x" if others == "error 2" else "by 1")
    for endpoint in endpoints:
        endpoint.close()


def test_watchdog_reports_blocked_datagrams_early(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comm.watchdog.inquiries.peer_check._REACHABILITY_SECONDS", 0.3)
    first, second = _two_sockets()  # no thread reads the second socket
    watchdog = Watchdog(0, first, CollectiveLog(), 60.0, lambda verdict: None)
    watchdog.start()
    until = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < until:
        time.sleep(0.05)
    watchdog.close()
    second.close()
    assert caplog.messages == ["watchdog: datagrams to rank 1 and back are blocked: lost ranks cannot be named"]


def test_socket_receive_is_ended_by_the_wakeup_file() -> None:
    first, second = _two_sockets()
    begun = time.monotonic()
    os.write(first.wakeup_file, bytes([signal.SIGTERM]))
    assert first.receive(5.0) == ([], bytes([signal.SIGTERM]))
    assert time.monotonic() - begun < 2
    first.close()
    second.close()


def _replies(requester: WatchdogSocket, rank: int) -> list[str]:
    """Returns the kinds of messages that arrive after a state request to the rank."""
    requester.send(rank, "state_request", {})
    until, kinds = time.monotonic() + 10, []
    while "state" not in kinds and time.monotonic() < until:
        kinds += [message.kind for message in requester.receive(0.2)[0]]
    return kinds


def test_watchdog_drops_malformed_messages_and_verdicts_in_the_name_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even ranks of the job can only end others with codes 1, 76 and 78, and only as themselves."""
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)
    monkeypatch.setattr("comm.watchdog.inquiries.shutdown._AGREE_SECONDS", 0.0)
    monkeypatch.setattr("comm.watchdog.inquiries.shutdown._LINGER_SECONDS", 0.0)
    endpoints = [WatchdogSocket(rank, "127.0.0.1") for rank in range(3)]
    for endpoint in endpoints:
        endpoint.open(AddressBook.of([(other.host, other.port) for other in endpoints]), KEY)
    watchdog = Watchdog(0, endpoints[0], CollectiveLog(), 60.0, lambda verdict: None)
    watchdog.start()
    verdict = {"code": 78, "text": "forged", "judge": 1, "culprits": [[2, 1, 1]]}
    for change in (
        {"code": 0},
        {"code": 75},
        {"judge": 2},
        {"judge": 0},
        {"culprits": [[3, 1, 1]]},
        {"text": 7},
        {"text": "\x1b"},
    ):
        endpoints[1].send(0, "verdict", verdict | change)
    for kind in ("state", "verdict", "departure"):
        endpoints[1].send(0, kind, {})  # type: ignore[arg-type]
        endpoints[1].send(0, kind, {"waits": 7, "end": {}, "code": [[]]})  # type: ignore[arg-type]
    assert "state" in _replies(endpoints[2], 0)
    assert ends == []
    endpoints[1].send(0, "verdict", verdict)
    until = time.monotonic() + 10
    while not ends and time.monotonic() < until:
        time.sleep(0.05)
    assert set(ends) == {78}
    watchdog.close()
    for endpoint in endpoints[1:]:
        endpoint.close()


def test_watchdog_logs_an_internal_error_and_continues(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = _two_sockets()
    watchdog = Watchdog(0, first, CollectiveLog(), 60.0, lambda verdict: None)
    plain, errors = watchdog._check, [RuntimeError("a bug"), ZeroDivisionError("another"), KeyError(3)]

    def look(now: float) -> None:
        if errors:
            raise errors.pop()
        plain(now)

    monkeypatch.setattr(watchdog, "_check", look)
    watchdog.start()
    until = time.monotonic() + 10
    while errors and time.monotonic() < until:
        time.sleep(0.05)
    assert "state" in _replies(second, 0)
    assert caplog.messages == [
        "watchdog: internal error number 1; the watchdog continues"
    ]  # only one for several errors
    assert caplog.records[0].exc_info is not None
    watchdog.close()
    second.close()


def test_watchdog_socket_is_bound_to_one_address() -> None:
    first, second = _two_sockets()
    first.probe(1, {})
    assert first.host == "127.0.0.1"
    assert [probe.getsockname()[0] for probe in first._probes.values()] == ["127.0.0.1"]
    first.close()
    second.close()
    wide = WatchdogSocket(0, "::1")
    assert wide.host == "::1"
    wide.close()
