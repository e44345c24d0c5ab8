"""Slices written under any layout are read bitwise under any other, and each is written once."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import MODEL
from train.checkpoint import parts
from train.checkpoint.index import INDEX_NAME, Index, index_json, merge, read_index
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.parts import PartReader, index_of, write_part
from train.checkpoint.state import Slice, State, as_slice

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64)
Layout = tuple[int, int]
"""Ranks over which each tensor is cut, and ranks that hold the same slices."""


def draw_tensors() -> dict[str, Tensor]:
    """Returns tensors of all types, one of them without dimensions and one empty."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{place}.{dtype}": (torch.randn(100 + 37 * place, generator=generator) * 8).to(dtype)
        for place in range(3)
        for dtype in DTYPES
    }
    return {**tensors, "scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "matrix": torch.arange(12.0).view(3, 4)}


def cut(tensors: dict[str, Tensor], layout: Layout) -> list[State]:
    """Returns the state of each rank: slices of flat tensors, and the whole of others."""
    num_slices, num_copies = layout
    states: list[State] = []
    for rank in range(num_slices * num_copies):
        state: State = {}
        for name, values in tensors.items():
            if values.ndim == 1:
                first, end = (len(values) * (rank % num_slices + place) // num_slices for place in (0, 1))
                state[name] = Slice(len(values), first, values[first:end].clone())
            else:
                state[name] = values.clone()
        states.append(state)
    return states


def write(folder: Path, states: list[State]) -> Index:
    """Writes the files of all ranks and their index."""
    files = [f"rank_{rank:05}.safetensors" for rank in range(len(states))]
    held = [index_of(state, file) for state, file in zip(states, files, strict=True)]
    index = merge(held)
    written: list[Index] = []
    for state, file, own in zip(states, files, held, strict=True):
        chosen = {name: own[name] for name, entry in index.items() if file in (part.file for part in entry.parts)}
        written.append(write_part(folder, file, chosen, lambda name, state=state: as_slice(state[name]).local)[1])  # type: ignore[misc]
    (folder / INDEX_NAME).write_text(index_json(merge(written)))
    return read_index(folder, MODEL)


def bits(values: Slice | Tensor) -> list[int]:
    return as_slice(values).local.view(torch.uint8).tolist()


@pytest.mark.parametrize("written", [(1, 1), (4, 1), (3, 2), (8, 2)], ids=str)
@pytest.mark.parametrize("chunk_bytes", [2**24, 64])
def test_slices_of_any_layout_load_bitwise_under_any_other(
    written: Layout, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "CHUNK_BYTES", chunk_bytes)
    tensors = draw_tensors()
    index = write(tmp_path, cut(tensors, written))
    size = sum(values.numel() * values.element_size() for values in tensors.values())
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) == size + headers
    blank = {name: torch.zeros_like(values) for name, values in tensors.items()}
    for layout in ((1, 1), (2, 1), (5, 1), (8, 2)):
        for state, expected in zip(cut(blank, layout), cut(tensors, layout), strict=True):
            PartReader(tmp_path, index).fill(state)
            for name, values in state.items():
                assert bits(values) == bits(expected[name]), name


def test_writers_of_replicated_slices_write_equally_much(tmp_path: Path) -> None:
    write(tmp_path, cut({f"t{place}": torch.zeros(1000) for place in range(16)}, (1, 4)))
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) < 100


def test_values_are_converted_to_the_type_that_they_fill(tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1.0009765625, -2.5])}
    index = write(tmp_path, cut(tensors, (2, 1)))
    state: State = {"a": Slice(2, 0, torch.zeros(2, dtype=torch.bfloat16))}
    PartReader(tmp_path, index).fill(state)
    assert as_slice(state["a"]).local.tolist() == [1.0, -2.5]


def test_ranks_that_hold_other_slices_of_a_tensor_are_refused() -> None:
    halves = [index_of({"a": Slice(4, first, torch.zeros(2))}, "f") for first in (0, 1)]
    with pytest.raises(CheckpointError, match="a: a part must begin at element 2"):
        merge(halves)
    with pytest.raises(CheckpointError, match=r"a: must be Stored\(shape=\(4,\), dtype='F32'\) on all ranks"):
        merge([halves[0], index_of({"a": Slice(4, 2, torch.zeros(2, dtype=torch.int64))}, "f")])


def test_a_rank_reads_only_the_files_of_its_slices(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(8.0)}
    index = write(tmp_path, cut(tensors, (4, 1)))
    assert len(json.loads((tmp_path / INDEX_NAME).read_text())["files"]) == 4
    for rank in (0, 3):
        (tmp_path / f"rank_{rank:05}.safetensors").unlink()
    state: State = {"a": Slice(8, 3, torch.zeros(3))}
    PartReader(tmp_path, index).fill(state)
    assert as_slice(state["a"]).local.tolist() == [3.0, 4.0, 5.0]
