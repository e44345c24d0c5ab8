"""Reads a run's history from a `.wandb` file: LevelDB log records in blocks of 32 KiB, each a protocol buffer."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER_BYTES, _BLOCK_BYTES = 7, 32_768
_ENDS = (1, 4)  # a whole record, or the last piece of one


def read_history(path: Path) -> list[dict[str, Any]]:
    """Returns one object per logged step, with nested keys joined by dots and without wandb's own (`_step`)."""
    from wandb.proto import wandb_internal_pb2

    history = []
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            history.append(flat({key: value for key, value in items.items() if not key.startswith("_")}))
    return history


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, keys joined by dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _payloads(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    place, payload = _HEADER_BYTES, b""
    while place + _HEADER_BYTES <= len(content):
        left = _BLOCK_BYTES - place % _BLOCK_BYTES
        if left < _HEADER_BYTES:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        if (size, kind) == (0, 0):
            return
        place += _HEADER_BYTES
        payload += content[place : place + size]
        place += size
        if kind in _ENDS:
            yield payload
            payload = b""
