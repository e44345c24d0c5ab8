"""Describes the tensors that pipeline ranks exchange, in message headers and in the log."""

import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from comm.watchdog.collective_log import Collective, CollectiveLog

MessageKind = Literal["activation", "gradient", "tokens"]
MESSAGE_KINDS: tuple[MessageKind, ...] = get_args(MessageKind)
TRAINING_KINDS: tuple[MessageKind, ...] = ("activation", "gradient")
DECODING_KINDS: tuple[MessageKind, ...] = ("activation", "tokens")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64)
_MAX_DIMS = 8
_FORMAT = struct.Struct(f"<{8 + _MAX_DIMS}q")
HEADER_BYTES = _FORMAT.size


class TransferError(RuntimeError):
    """Raised if a link delivers another message than expected: its two ranks disagree on the order."""

    def __init__(self, place: str, expected: str, got: str) -> None:
        super().__init__(f"{place}: expected {expected}, got {got}")
        self.place = place
        self.expected = expected
        self.got = got


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageKey:
    """Identity of a message, with pipeline indices; both ends use the same stage number."""

    kind: MessageKind
    direction: int
    stage: int
    micro_batch: int
    source: int
    destination: int

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.source}->{self.destination} of direction {self.direction}, stage {self.stage}, "
            f"micro-batch {self.micro_batch}"
        )


@dataclass(frozen=True, slots=True)
class Header:
    """Header that precedes a payload; raises ValueError if it cannot hold the dtype or dimensions."""

    key: MessageKey
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"transfer: a message's dtype must be one of {_DTYPES}, is {self.dtype}")
        if len(self.shape) > _MAX_DIMS:
            raise ValueError(f"transfer: a message must have at most {_MAX_DIMS} dimensions, has shape {self.shape}")

    def encode(self) -> bytes:
        """Encodes the header in `HEADER_BYTES` bytes, which are unique for each header."""
        key = self.key
        return _FORMAT.pack(
            MESSAGE_KINDS.index(key.kind),
            key.direction,
            key.stage,
            key.micro_batch,
            key.source,
            key.destination,
            _DTYPES.index(self.dtype),
            len(self.shape),
            *self.shape,
            *(0,) * (_MAX_DIMS - len(self.shape)),
        )

    @classmethod
    def decode(cls, encoded: bytes | bytearray) -> Self:
        """Decodes the bytes that `encode` returned."""
        kind, direction, stage, micro_batch, source, destination, dtype, num_dims, *shape = _FORMAT.unpack(encoded)
        key = MessageKey(
            kind=MESSAGE_KINDS[kind],
            direction=direction,
            stage=stage,
            micro_batch=micro_batch,
            source=source,
            destination=destination,
        )
        return cls(key, _DTYPES[dtype], tuple(shape[:num_dims]))

    def __str__(self) -> str:
        return f"{self.key}, {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


def as_bytes(tensor: Tensor) -> Tensor:
    """Returns the bytes of a tensor as a flat uint8 tensor on the same device."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


class LinkLog:
    """Log of one link: one direction and message kind between two ranks, logged as a separate group."""

    def __init__(self, log: CollectiveLog, kind: MessageKind, ranks: tuple[int, int]) -> None:
        self._log = log
        self._ranks = ranks
        self._group = f"{kind} {ranks[0]}->{ranks[1]}"

    def start(self, key: MessageKey) -> Collective:
        """Logs the link's next message, when it is sent or its receive is posted."""
        return self._log.start(self._group, self._ranks, "transfer", key)

    def opening(self) -> AbstractContextManager[None]:
        """Logs the opening of the link while inside."""
        return self._log.awaiting(self._log.start(self._group, self._ranks, "opening of the link"))

    def awaiting(self, collective: Collective) -> AbstractContextManager[None]:
        """Logs that this end waits for the message while inside."""
        return self._log.awaiting(collective)
