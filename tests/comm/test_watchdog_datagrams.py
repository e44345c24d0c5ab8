"""A watchdog reacts to datagrams as specified, and drops those that are malformed or in the name of others."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.messages import WatchdogSocket
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog import Watchdog
from tests.comm.watched_ranks import full_book, open_sockets, wait_until


@pytest.fixture
def endpoints() -> Iterator[list[WatchdogSocket]]:
    with open_sockets(3) as opened:
        yield opened


def _start(endpoint: WatchdogSocket) -> Watchdog:
    watchdog = Watchdog(0, endpoint, CollectiveLog(), 60.0, lambda verdict: None)
    watchdog.start()
    return watchdog


def test_socket_distinguishes_closed_from_silent_peers_and_ignores_other_senders(
    endpoints: list[WatchdogSocket],
) -> None:
    first, second, _ = endpoints
    outsider = WatchdogSocket(1, "127.0.0.1")
    outsider.open(full_book([(first.host, first.port)] * 3), b"another job's key".ljust(32))
    outsider.send(0, "state_request", {"who": "outsider"})
    outsider.close()
    second.send(0, "state_request", {"who": "peer", "padding": "x" * 200_000})  # more than a datagram holds, compressed
    messages, _ = first.receive(5.0)
    messages += first.receive(0.1)[0]
    assert [(message.sender, message.values["who"]) for message in messages] == [(1, "peer")]
    first.probe(1, {})
    assert first.receive(0.1)[0] == []
    assert first.refused == set()
    second.close()
    first.probe(1, {})
    first.receive(1.0)
    assert first.refused == {1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("others", ["verdict 2", "error 2"])
@pytest.mark.parametrize("is_first", [False, True])
def test_watchdog_keeps_the_same_of_two_verdicts_in_any_order(
    others: str, is_first: bool, endpoints: list[WatchdogSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lowest rank's verdict wins, but a rank's own error, a possible cause, comes first."""
    monkeypatch.setattr("comm.watchdog.watchdog._FOLLOW_SECONDS", 0.5)
    verdicts: list[Verdict] = []

    def crash_report(verdict: Verdict) -> None:
        verdicts.append(verdict)
        raise SystemExit  # ends the watchdog's thread instead of the process

    Watchdog(0, endpoints[0], CollectiveLog(), 60.0, crash_report).start()
    for word in (others, "verdict 1") if is_first else ("verdict 1", others):
        kind, _, rank = word.partition(" ")
        if kind == "error":
            endpoints[int(rank)].send(0, "departure", {"end": "error", "text": "ValueError: x"})
        else:
            body = {"code": 76, "text": f"by {rank}", "judge": int(rank), "culprits": [[0, 1, 1]]}
            endpoints[int(rank)].send(0, "verdict", body)
    wait_until(lambda: bool(verdicts))
    assert verdicts.pop().text == ("rank 2: ValueError: x" if others == "error 2" else "by 1")


def test_watchdog_reports_blocked_datagrams_early(
    caplog: pytest.LogCaptureFixture, endpoints: list[WatchdogSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comm.watchdog.watchdog._REACHABILITY_SECONDS", 0.3)
    watchdog = _start(endpoints[0])  # no thread reads the second socket
    wait_until(lambda: bool(caplog.messages))
    watchdog.close()
    assert caplog.messages == ["watchdog: datagrams to rank 1 and back are blocked: lost ranks cannot be named"]


def test_socket_receive_is_ended_by_the_wakeup_file(endpoints: list[WatchdogSocket]) -> None:
    begun = time.monotonic()
    os.write(endpoints[0].wakeup_file, bytes([signal.SIGTERM]))
    assert endpoints[0].receive(5.0) == ([], bytes([signal.SIGTERM]))
    assert time.monotonic() - begun < 2


def _replies(requester: WatchdogSocket) -> list[str]:
    """Returns the kinds of messages that arrive after a state request to rank 0."""
    requester.send(0, "state_request", {})
    kinds: list[str] = []

    def has_state() -> bool:
        kinds.extend(message.kind for message in requester.receive(0.2)[0])
        return "state" in kinds

    wait_until(has_state, 10)
    return kinds


def test_watchdog_drops_malformed_messages_and_verdicts_in_the_name_of_others(
    endpoints: list[WatchdogSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even ranks of the job can only end others with codes 1, 76 and 78, and only as themselves."""
    ends: list[int] = []
    monkeypatch.setattr("os._exit", ends.append)
    monkeypatch.setattr("comm.watchdog.watchdog._AGREE_SECONDS", 0.0)
    monkeypatch.setattr("comm.watchdog.watchdog._LINGER_SECONDS", 0.0)
    watchdog = _start(endpoints[0])
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
        endpoints[1].send(0, kind, {})
        endpoints[1].send(0, kind, {"waits": 7, "end": {}, "code": [[]]})
    assert "state" in _replies(endpoints[2])
    assert ends == []
    endpoints[1].send(0, "verdict", verdict)
    wait_until(lambda: bool(ends), 10)
    assert set(ends) == {78}
    watchdog.close()


def test_watchdog_logs_an_internal_error_and_continues(
    caplog: pytest.LogCaptureFixture, endpoints: list[WatchdogSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = Watchdog(0, endpoints[0], CollectiveLog(), 60.0, lambda verdict: None)
    check = watchdog._check
    errors = [RuntimeError("a bug"), ZeroDivisionError("another"), KeyError(3)]

    def fail(now: float) -> None:
        if errors:
            raise errors.pop()
        check(now)

    monkeypatch.setattr(watchdog, "_check", fail)
    watchdog.start()
    wait_until(lambda: not errors, 10)
    assert "state" in _replies(endpoints[1])
    assert caplog.messages == [
        "watchdog: internal error number 1; the watchdog continues"
    ]  # only one for several errors
    assert caplog.records[0].exc_info is not None
    watchdog.close()


def test_watchdog_socket_is_bound_to_one_address(endpoints: list[WatchdogSocket]) -> None:
    endpoints[0].probe(1, {})
    assert endpoints[0].host == "127.0.0.1"
    assert [probe.getsockname()[0] for probe in endpoints[0]._probes.values()] == ["127.0.0.1"]
    wide = WatchdogSocket(0, "::1")
    assert wide.host == "::1"
    wide.close()
