"""Datagrams of a watchdog that are not authentic, not new or malformed are rejected."""

import json
import zlib
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.decode import encode
from comm.watchdog import messages, wire
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.messages import (
    Departure,
    Message,
    Reached,
    StateRequest,
    decode_message,
    encode_addresses,
)
from comm.watchdog.ranks import RankSet
from comm.watchdog.verdict import MainThread, RankState, Verdict, Wait
from comm.watchdog.wire import DatagramCodec, Kind, MessageError, open_object, seal_object
from tests.comm.watched_ranks import KEY

WORLD_SIZE = 4
VERDICT: dict[str, Any] = {"code": 78, "text": "rank 2 is lost", "judge": 1, "culprits": [[2, 1, 1]]}
STATE = json.loads(json.dumps(encode(RankState.of(CollectiveLog(), MainThread()))))
WAIT = {"text": "dispatch", "group": "world [0, 1]", "number": 3, "ranks": [[0, 2, 1]], "seconds": 1.5}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
    max_leaves=20,
)


def codec(rank: int, key: bytes = KEY) -> DatagramCodec:
    return DatagramCodec(key, rank, WORLD_SIZE)


def refuses(receiver: DatagramCodec, data: bytes) -> bool:
    try:
        receiver.decode(data)
    except MessageError:
        return True
    return False


def test_datagram_arrives_once_and_only_at_its_recipient() -> None:
    sender, receiver = codec(1), codec(0)
    data = sender.encode(0, "verdict", VERDICT)
    assert refuses(codec(2), data)
    arrived = receiver.decode(data)
    assert (arrived.kind, arrived.sender, arrived.values) == ("verdict", 1, VERDICT)
    assert refuses(receiver, data)
    assert refuses(codec(0, b"an earlier attempt's key".ljust(32)), data)
    # A rank rejects its own datagrams, and those of ranks that the job does not have.
    assert refuses(codec(0), codec(0).encode(0, "state_request", {}))
    assert refuses(codec(0), DatagramCodec(KEY, 7, 8).encode(0, "state_request", {}))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_datagram_with_another_key_is_rejected(data: bytes) -> None:
    assert refuses(codec(0), data)
    # A valid header does not help.
    header = codec(1).encode(0, "verdict", VERDICT)[32:49]
    assert refuses(codec(0), data[:32].ljust(32, b"\0") + header + data)


@settings(max_examples=200, deadline=None)
@given(bit=st.integers(0, 8 * 200), size=st.integers(0, 200), more=st.binary(min_size=1, max_size=50))
def test_changed_datagram_is_rejected(bit: int, size: int, more: bytes) -> None:
    data, receiver = codec(1).encode(0, "verdict", VERDICT), codec(0)
    flipped = bytearray(data)
    flipped[bit // 8 % len(data)] ^= 1 << bit % 8
    assert refuses(receiver, bytes(flipped))
    assert refuses(receiver, data[: min(size, len(data) - 1)])
    assert refuses(receiver, data + more)
    assert not refuses(receiver, data)  # and none of them consumed its counter


@settings(max_examples=100, deadline=None)
@given(order=st.permutations(range(40)), again=st.lists(st.integers(0, 39), max_size=40))
def test_datagrams_may_arrive_out_of_order_and_none_counts_twice(order: list[int], again: list[int]) -> None:
    sender, receiver = codec(1), codec(0)
    sent = [sender.encode(0, "state_request", {}) for _ in order]
    assert not any(refuses(receiver, sent[number]) for number in order)
    assert all(refuses(receiver, sent[number]) for number in again)


@settings(max_examples=100, deadline=None)
@given(counters=st.lists(st.integers(0, 3 * wire.REPLAY_WINDOW) | st.integers(2**63, 2**64 - 1), max_size=60))
def test_replay_window_accepts_each_counter_at_most_once_and_every_new_highest(counters: list[int]) -> None:
    window, accepted, highest = wire.ReplayWindow(), set(), -1
    for counter in counters:
        is_new = window.is_new(counter)
        assert is_new == (counter not in accepted and counter > highest - wire.REPLAY_WINDOW)
        if is_new:
            window.add(counter)
            accepted.add(counter)
            highest = max(highest, counter)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no zlib",
        zlib.compress(b"{}")[:-1],
        zlib.compress(b"{}") + b"x",
        zlib.compress(b" " * (wire.MAX_DECODED_BYTES + 1)),
        zlib.compress(bytes(64 << 20), 9),
        zlib.compress(b"[" * 500_000),
        zlib.compress(b'{"a":' * 100_000),
        zlib.compress(b"[]"),
        zlib.compress(b"1"),
        zlib.compress(b"{"),
        zlib.compress(b'{"a": NaN}'),
        zlib.compress(b'{"a": -Infinity}'),
        zlib.compress(b'{"a": ' + b"9" * 5000 + b"}"),
        zlib.compress(b'{"a": "\xff"}'),
    ],
    ids=range(15),
)
def test_content_other_than_a_small_json_object_is_rejected(body: bytes) -> None:
    with pytest.raises(MessageError):
        wire.decompress_object(body)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(values=st.dictionaries(st.sampled_from([*VERDICT, *STATE, "end", "group", "block", "other"]), JSON))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_message_with_any_fields_is_decoded_or_rejected_without_another_error(
    values: dict[str, Any], kind: Kind
) -> None:
    try:
        decoded = decode_message(kind, values, WORLD_SIZE, 1)
    except MessageError:
        return
    if isinstance(decoded, Verdict):
        assert decoded.code in (1, 76, 78)
        assert decoded.judge == 1
        assert decoded.text.isprintable()


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (values | changes).items() if value is not None}


BAD_VERDICTS: list[dict[str, Any]] = [
    *({"code": code} for code in (0, 2, 75, 77, 130, 143, -1, "78", 78.0, True, None, 2**70)),
    *({"judge": judge} for judge in (-1, 4, "1", True, 1.0, None, [1], 2)),  # 2 is a rank, but not the sender
    *({"culprits": [[rank, 1, 1]]} for rank in (4, -1, "2", True, 2.0, None)),
    *({"culprits": [[0, count, step]]} for count, step in ((5, 1), (2, 4), (0, 1), (1, 0), (-1, 1), (1, 2**63))),
    *({"culprits": culprits} for culprits in (2, None, {"2": 2}, [2], [[2]], [[2, 1]], [[2, 1, 1, 1]], [[[2], 1, 1]])),
    *({"culprits": culprits} for culprits in ([[0, 1, 1]] * 2, [[0, 2, 2], [2, 1, 1]])),
    *({"text": text} for text in (None, 7, "a\nb", "a\x1b[2J", "a\u202eb", "\ud800", "x" * 70_000, ["x"])),
]


@pytest.mark.parametrize("change", BAD_VERDICTS, ids=range(len(BAD_VERDICTS)))
def test_malformed_verdict_is_rejected(change: dict[str, Any]) -> None:
    key = next(iter(change))
    values = changed(VERDICT, **change)
    with pytest.raises(MessageError, match=key):
        decode_message("verdict", values, WORLD_SIZE, 1)


BAD_OTHERS: list[tuple[Kind, dict[str, Any]]] = [
    *(("state", {key: None}) for key in STATE),
    ("state", {"waits": [WAIT] * 9}),
    ("state", {"waits": [changed(WAIT, ranks=[[0, 2, 4]])]}),
    ("state", {"waits": [changed(WAIT, seconds=-1.0)]}),
    ("state", {"waits": [changed(WAIT, seconds=1e400)]}),
    ("state", {"waits": [changed(WAIT, number=2**63)]}),
    ("state", {"waits": [7]}),
    ("state", {"started": {"a": -1}}),
    ("state", {"started": {str(number): 1 for number in range(5000)}}),
    ("state", {"is_busy": 1}),
    ("state", {"place": "a\tb"}),
    ("state", {"idle_seconds": float("nan")}),
    ("departure", {"end": "gone", "text": "x"}),
    ("departure", {"end": ["done"], "text": "x"}),
    ("reached", {"group": "a", "number": 1, "is_waiting": 0}),
    ("address_request", {"block": -1}),
    ("addresses", {"block": 0, "blocks": [None] * 17}),
]


@pytest.mark.parametrize(("kind", "change"), BAD_OTHERS, ids=range(len(BAD_OTHERS)))
def test_other_malformed_message_is_rejected(kind: Kind, change: dict[str, Any]) -> None:
    with pytest.raises(MessageError):
        decode_message(kind, changed(STATE, **change) if kind == "state" else change, WORLD_SIZE, 1)


def test_messages_survive_their_encoding() -> None:
    wait = Wait(text="dispatch", group="world [0, 1]", number=3, ranks=RankSet.of((0, 1)), seconds=1.5)
    state = replace(RankState.of(CollectiveLog(), MainThread()), waits=(wait,), started={"world [0, 1]": 4})
    addresses = encode_addresses([("127.0.0.1", 9), ("::1", 10), ("127.0.0.1", 11)])
    samples: dict[Kind, Message] = {
        "state_request": StateRequest("world [0, 1]", 3),
        "state": state,
        "reached": Reached("world [0, 1]", 3, is_waiting=True),
        "verdict": Verdict(code=78, text="rank 2 is lost", judge=1, culprits=RankSet.of((2,))),
        "departure": Departure("done", "it finished"),
        "notice": messages.Notice(),
        "address_request": messages.AddressRequest(3),
        "addresses": messages.AddressReply(1, (addresses, None)),
    }
    assert samples.keys() == set(get_args(Kind))
    for kind, message in samples.items():
        arrived = wire.decompress_object(wire.compress_object(encode(message)))
        assert decode_message(kind, arrived, WORLD_SIZE, 1) == message
    assert decode_message("state_request", {}, WORLD_SIZE, 1) == StateRequest()


def test_printable_text_is_always_accepted_and_short() -> None:
    text = wire.printable("a\n\x1b[0m\u202e\ud800" + "x" * 100_000)
    assert text.startswith("a\ufffd\ufffd[0m\ufffd\ufffdxx")
    assert decode_message("verdict", VERDICT | {"text": text}, WORLD_SIZE, 1)


def test_record_in_the_store_is_valid_for_its_purpose_alone() -> None:
    sealed = seal_object(KEY, "address/1", {"host": "127.0.0.1"}).encode()
    assert open_object(KEY, "address/1", sealed) == {"host": "127.0.0.1"}
    for key, purpose, record in (
        (KEY, "address/2", sealed),
        (KEY[::-1], "address/1", sealed),
        (KEY, "address/1", sealed.replace(b"127", b"128")),
        (KEY, "address/1", b""),
        (KEY, "address/1", sealed[:64]),
        (KEY, "address/1", b"\xff" * 200),
    ):
        with pytest.raises(MessageError):
            open_object(key, purpose, record)
    # Parts are separated.
    assert (
        wire.derive(KEY, "a", b"bc", b"d") != wire.derive(KEY, "a", b"b", b"cd") != wire.derive(KEY, "ab", b"c", b"d")
    )
