"""The log records started collectives and waits, in order."""

import threading
import time
from collections.abc import Callable

import pytest

from comm.protocol import Label
from comm.watchdog.collective_log import CollectiveLog, CollectiveProgress, group_name

LABEL = Label(layer=1, direction=0, micro_batch=2)


def test_log_numbers_collectives_within_their_group() -> None:
    log = CollectiveLog()
    numbers = [log.start(group, (0, 1), "dispatch", LABEL).number for group in ("a", "b", "a", "a", "b")]
    assert numbers == [0, 0, 1, 2, 1]
    assert log.progress() == {"a": CollectiveProgress(3, -1), "b": CollectiveProgress(2, -1)}
    assert [operation.group for _, operation in log.recent()] == ["a", "b", "a", "a", "b"]


def test_collective_prints_name_label_number_and_group() -> None:
    log = CollectiveLog()
    text = "dispatch of layer 1, direction 0, micro-batch 2 (number 0 of group expert [4, 5])"
    assert str(log.start(group_name("expert", (4, 5)), (4, 5), "dispatch", LABEL)) == text
    assert str(log.start("world [0]", (0,), "sum of losses")) == "sum of losses (number 0 of group world [0])"


def test_order_hashes_are_equal_exactly_for_equal_orders() -> None:
    def hashes(*names: str) -> str:
        log = CollectiveLog()
        for name in names:
            log.start("a", (0, 1), name, LABEL)
        return log.order_hashes()["a"]

    assert hashes("x", "y") == hashes("x", "y")
    assert len({hashes("x", "y"), hashes("y", "x"), hashes("x"), hashes("xy"), hashes("x", "y", "y")}) == 5
    log = CollectiveLog()
    log.start("a", (0, 1), "x", None)
    assert log.order_hashes()["a"] != hashes("x")  # another label


def test_log_returns_waits_the_longest_first() -> None:
    log = CollectiveLog()
    first, second, third = (log.start("a", (0,), name) for name in ("first", "second", "third"))
    with log.awaiting(second):
        time.sleep(0.02)
        with log.awaiting(first):
            waits = log.awaited()
            assert [operation for operation, _ in waits] == [second, first]
            assert waits[0][1] >= waits[1][1] + 0.02
            assert log.is_waiting(threading.get_ident())
        assert [operation for operation, _ in log.awaited()] == [second]
        assert log.progress()["a"] == CollectiveProgress(3, 0)
    assert log.awaited() == []
    assert not log.is_waiting(threading.get_ident())
    assert log.progress()["a"] == CollectiveProgress(3, 1)
    with log.awaiting(third):
        pass
    assert log.progress()["a"] == CollectiveProgress(3, 2)


def test_log_records_failed_collectives_without_finishing_them() -> None:
    log = CollectiveLog()
    operation = log.start("a", (0,), "broken")

    def fail() -> None:
        with log.awaiting(operation):
            time.sleep(0.02)
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        fail()
    assert log.num_failed == 1
    assert log.awaited() == []
    assert [failed for failed, _ in log.failed()] == [operation]
    assert log.failed()[0][1] >= 0.02
    assert log.progress()["a"] == CollectiveProgress(1, -1)


def test_collectives_in_a_stream_are_waits_until_the_stream_has_passed_them() -> None:
    reached = [0]
    enqueued = [0]

    def mark() -> Callable[[], bool]:
        enqueued[0] += 1
        mine = enqueued[0]
        return lambda: reached[0] >= mine

    log = CollectiveLog()
    log.follow_streams(mark)
    operations = [log.start("a", (0, 1), name) for name in ("x", "y")]
    for operation in operations:
        with log.awaiting(operation):
            pass
    assert [operation for operation, _ in log.awaited()] == operations
    reached[0] = 1
    assert [operation for operation, _ in log.awaited()] == operations[1:]
    assert log.progress()["a"] == CollectiveProgress(2, 0)
    reached[0] = 2
    assert log.awaited() == []
    assert log.progress()["a"] == CollectiveProgress(2, 1)


def test_log_keeps_only_the_last_collectives() -> None:
    log = CollectiveLog(num_kept=3)
    for name in "abcde":
        log.start("a", (0,), name)
    assert [operation.name for _, operation in log.recent()] == ["c", "d", "e"]
    assert log.progress()["a"].started == 5
