"""Reads weights from a Hugging Face checkpoint in runs of rows, at most `CHUNK_BYTES` at a time.

Shape legend: R rows read at a time, M blocks in a column, T blocks in a row.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import dequantize_128x128
from model.attention.form import inverse_frequencies
from model.config import ModelConfig, PlainRope
from model.hf.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from model.hf.files import HfError, format_value, nearest
from model.hf.names import BLOCK, StoredDtype, copied_from, is_rotary, scale_name, weights

CHUNK_BYTES = 2**24
TORCH_DTYPES: dict[StoredDtype, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HfSource:
    """How a checkpoint stores its tensors, scales of FP8 weights included, to write them in the same form."""

    dtypes: Mapping[str, StoredDtype]
    scales: Mapping[str, Tensor]
    config: Mapping[str, Any]
    rotary: Mapping[str, Tensor]


class HfReader:
    """Reader of a released checkpoint: `config.json`, `model.safetensors` or shards with an index.

    Raises:
        HfError: as `model.hf.checkpoint.open_checkpoint`, or stored frequencies differ from those of config.json.
    """

    def __init__(self, path: Path | str, *, drop_mtp: bool = False) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(Path(path), drop_mtp=drop_mtp)
        self._rotary = {name: self._read_rotary(name) for name in self.checkpoint.entries if is_rotary(name)}
        originals = ((name, copied_from(name)) for name, _ in weights(self.config))
        self._copies = [(copy, original) for copy, original in originals if original is not None]

    @property
    def config(self) -> ModelConfig:
        """Architecture of the checkpoint, without MTP modules if the files hold none."""
        return self.checkpoint.config

    def fill(self, named: Mapping[str, Tensor]) -> None:
        """Copies weights into tensors by released name, file by file in the order of the data.

        FP8 weights are dequantized: code times scale in float32, then rounded to the tensor's type.

        Raises:
            HfError: the checkpoint lacks a name, a shape differs, a value or scale is not finite (or becomes so in the
                tensor's type), a file is truncated, or an MTP module's copy of an embedding or head differs from it.
        """
        for name, target in named.items():
            self._check_target(name, target)
        ordered = sorted(named, key=lambda name: (self._entry(name).file, self._entry(name).offset))
        for path, names in groupby(ordered, key=lambda name: self._entry(name).file):
            with _open(path) as file:
                for name in names:
                    self._fill_one(file, name, named[name])
        self._check_copies(named)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """Returns one weight on the CPU, as `fill` would fill it."""
        target = torch.empty(self._entry(name).shape, dtype=dtype)
        self.fill({name: target})
        return target

    @property
    def rotary(self) -> Mapping[str, Tensor]:
        """Stored frequencies of the rotary embedding, by name."""
        return self._rotary

    def source(self) -> HfSource:
        """Returns how the checkpoint stores its tensors; reads the scales of every FP8 weight."""
        entries = self.checkpoint.entries
        names = [name for name, _ in weights(self.config) if name in entries]
        scales = {name: self._scales(name) for name in names if entries[name].dtype == "F8_E4M3"}
        stored = [*names, *(scale_name(name) for name in scales)]
        return HfSource(
            dtypes={name: entries[name].dtype for name in stored},
            scales=scales,
            config=self.checkpoint.carried,
            rotary=self._rotary,
        )

    def _read_rotary(self, name: str) -> Tensor:
        """Returns stored frequencies, [R / 2], if `config.json` determines them, plain or interpolated."""
        entry = self._entry(name)
        config = self.config
        stored = read_tensor(entry, name)
        plain = inverse_frequencies(replace(config, rope_scaling=PlainRope(kind="plain")))
        # A computed power is exact to a few roundings of the stored type.
        tolerance = 8 * torch.finfo(stored.dtype).eps
        for expected in (plain, inverse_frequencies(config)):
            if torch.allclose(stored.double(), expected, rtol=tolerance, atol=0):
                return stored
        index = int((stored.double() / plain - 1).abs().nan_to_num(torch.inf).argmax())
        raise HfError(
            entry.file,
            name,
            f"must be the frequencies of rope_theta {config.rope_theta:g}, {plain[index]:g} at [{index}], "
            f"is {stored[index].item():g}",
        )

    def _entry(self, name: str) -> TensorEntry:
        entries = self.checkpoint.entries
        if name not in entries:
            raise HfError(self.checkpoint.folder, name, f"must be in the checkpoint, is not{nearest(name, entries)}")
        return entries[name]

    def _check_target(self, name: str, target: Tensor) -> None:
        entry = self._entry(name)
        if tuple(target.shape) != entry.shape:
            raise HfError(entry.file, name, f"must have shape {list(target.shape)}, has {list(entry.shape)}")

    def _fill_one(self, file: BinaryIO, name: str, target: Tensor) -> None:
        entry = self._entry(name)
        scales = self._scales(name) if entry.dtype == "F8_E4M3" else None
        if not entry.num_bytes:
            target.zero_()
        for first, rows in _read_runs(file, entry, name):
            if scales is None:
                values = rows.to(target.dtype)
            else:
                blocks = slice(first // BLOCK, -(-(first + len(rows)) // BLOCK))
                values = dequantize_128x128(QuantizedBlocks(rows, scales[blocks]), target.dtype)
            if not all_finite(values):
                where = (~values.isfinite()).nonzero()[0].tolist()
                value = values[tuple(where)].item()
                where[0] += first
                raise HfError(entry.file, name, f"must hold finite numbers in {target.dtype}, holds {value} at {where}")
            target[first : first + len(rows)].copy_(values)

    def _scales(self, name: str) -> Tensor:
        entry = self._entry(scale_name(name))
        scaled = scale_name(name)
        return checked_scales(read_tensor(entry, scaled), entry.file, scaled)

    def _check_copies(self, named: Collection[str]) -> None:
        for copy, original in self._copies:
            if original not in named:
                continue
            first = self._entry(original)
            second = self._entry(copy)
            with _open(first.file) as original_file, _open(second.file) as copy_file:
                pairs = zip(
                    _read_bytes(original_file, first, original), _read_bytes(copy_file, second, copy), strict=True
                )
                if any(ours != theirs for ours, theirs in pairs):
                    raise HfError(second.file, copy, f"must equal {original} byte for byte, differs")


def checked_scales(stored_MT: Tensor, path: Path, name: str) -> Tensor:
    """Returns stored scales in float32, or raises an `HfError` if one is not a finite number above 0."""
    scales_MT = stored_MT.float()  # E8M0 exponents become powers of two, exactly
    good = scales_MT.isfinite() & (scales_MT > 0)
    if not good.all():
        where = (~good).nonzero()[0].tolist()
        value = scales_MT[tuple(where)].item()
        raise HfError(path, name, f"must hold finite numbers above 0, holds {format_value(value)} at {where}")
    return scales_MT


def read_tensor(entry: TensorEntry, name: str) -> Tensor:
    """Returns a whole tensor in the type in which it is stored."""
    with _open(entry.file) as file:
        runs = [rows for _, rows in _read_runs(file, entry, name)]
    return torch.cat(runs) if runs else torch.zeros(entry.shape, dtype=TORCH_DTYPES[entry.dtype])


def all_finite(values: Tensor) -> bool:
    """Returns whether all values are finite.

    A sum with a term that is not finite is not finite, and costs a fortieth of asking every value. These are asked only
    if the sum is not finite, because a sum of finite terms may overflow.
    """
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise HfError(path, "", f"must be readable, is not ({error.strerror})") from error


def _read_runs(file: BinaryIO, entry: TensorEntry, name: str) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, rows) of a tensor; runs begin at multiples of `BLOCK` rows."""
    row_shape = entry.shape[1:]
    num_rows = entry.shape[0]
    first = 0
    for chunk in _read_bytes(file, entry, name):
        rows = torch.frombuffer(chunk, dtype=TORCH_DTYPES[entry.dtype]).reshape(-1, *row_shape)
        yield first, rows
        first += len(rows)
    assert first == num_rows or not entry.num_bytes


def _read_bytes(file: BinaryIO, entry: TensorEntry, name: str) -> Iterator[bytearray]:
    if not entry.num_bytes:
        return
    row_bytes = entry.num_bytes // entry.shape[0]
    run_bytes = max(1, CHUNK_BYTES // (row_bytes * BLOCK)) * BLOCK * row_bytes
    for offset in range(0, entry.num_bytes, run_bytes):
        chunk = bytearray(min(run_bytes, entry.num_bytes - offset))
        try:
            file.seek(entry.offset + offset)
            num_read = file.readinto(chunk)  # type: ignore[attr-defined]
        except OSError as error:
            raise HfError(entry.file, name, f"must be readable, is not ({error.strerror})") from error
        if num_read != len(chunk):
            raise HfError(entry.file, name, f"must have {entry.num_bytes} bytes, file ends early")
        yield chunk


def stored_dtype(dtype: torch.dtype) -> StoredDtype:
    """Returns the name that safetensors uses for a torch type, or raises a `ValueError`."""
    for word, candidate in TORCH_DTYPES.items():
        if candidate == dtype:
            return word
    raise ValueError(f"dtype: must be one of {', '.join(map(str, TORCH_DTYPES.values()))}, is {dtype}")
