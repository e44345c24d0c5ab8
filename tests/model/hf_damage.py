"""Ways to damage a sound checkpoint, and what must come of it: one error of one line."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.hf.files import HfError
from model.pretrained import load_hf
from tests.model.hf_checkpoints import edit_json, read_tensors, save_checkpoint, write_tensors

Damage = Callable[[Path], Any]
CONFIG, INDEX = "config.json", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
NORM = "model.norm.weight"
SCALED = "model.layers.0.self_attn.kv_b_proj.weight"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
COPY = "model.layers.1.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate.weight"
SMALL = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    # kv_b_proj has 10 x 18 rows: two rows of scales, the second ragged
    "num_attention_heads": 10,
    "num_key_value_heads": 10,
}


def sound_checkpoint(folder: Path) -> Path:
    """Saves a checkpoint in FP8 with one layer and one MTP module, in three files."""
    save_checkpoint(folder, fp8=True, num_files=3, **SMALL)
    return folder


def damaged(sound: Path, folder: Path, damage: Damage) -> Path:
    """Returns a damaged copy of a checkpoint, under `folder`."""
    shutil.copytree(sound, folder / "broken")
    damage(folder / "broken")
    return folder / "broken"


def assert_refused(folder: Path, words: tuple[str, ...]) -> None:
    with pytest.raises(HfError) as caught:
        load_hf(folder, torch.float32)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert text.startswith(str(folder))
    assert len(text) < 500 + len(str(folder))
    for word in words:
        assert word in text


def file_of(folder: Path, name: str) -> Path:
    return folder / str(json.loads((folder / INDEX).read_text())["weight_map"][name])


def split_file(path: Path) -> tuple[dict[str, Any], bytearray]:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), bytearray(content[start:])


def join_file(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit_entry(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes what a header says of a tensor."""

    def edit(folder: Path) -> None:
        header, data = split_file(file_of(folder, name))
        header[name] |= changes
        join_file(file_of(folder, name), header, data)  # type: ignore[arg-type]

    return edit


def edit_header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        header, data = split_file(folder / FIRST)
        edit(header)
        join_file(folder / FIRST, header, data)  # type: ignore[arg-type]

    return apply


def edit_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Changes tensors and writes all files again."""

    def apply(folder: Path) -> None:
        tensors = read_tensors(folder)
        edit(tensors)
        write_tensors(folder, tensors, num_files=3)

    return apply


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name].clone()).contiguous()

    return edit_tensors(edit)


def put(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


def edit_index(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, edit)


def name_file(file: Any) -> Callable[[Path], None]:
    return edit_index(lambda index: index["weight_map"].update({NORM: file}))


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None  # type: ignore[return-value]


def cut(name: str, keep: Callable[[int], int]) -> Callable[[Path], None]:
    """Keeps the first bytes of a file."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: keep(len(content))])

    return edit


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def copy_into_second(folder: Path) -> None:
    """Copies a tensor of the first file to the second one."""
    header, data = split_file(folder / SECOND)
    first, _ = split_file(folder / FIRST)
    name = next(name for name in first if name != "__metadata__")
    header[name] = {"dtype": "BF16", "shape": [1], "data_offsets": [len(data), len(data) + 2]}
    join_file(folder / SECOND, header, bytes(data) + b"\0\0")


def twice_in_header(folder: Path) -> None:
    header, data = split_file(folder / FIRST)
    name = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    join_file(folder / FIRST, f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode(), data)  # type: ignore[arg-type]


def swap_offsets(header: dict[str, Any]) -> None:
    """Makes two tensors claim the same bytes."""
    names = [name for name in header if name != "__metadata__"]
    same = [name for name in names if header[name]["shape"] == header[names[0]]["shape"]]
    header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]


def rename_expert(tensors: dict[str, Tensor]) -> None:
    tensors[EXPERT.replace("up_proj", "up_projection")] = tensors.pop(EXPERT)


def in_a_folder_above(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder.parent / "above.safetensors")
    name_file("../above.safetensors")(folder)


def single_too(folder: Path) -> None:
    shutil.copy(folder / FIRST, folder / "model.safetensors")


def make_pipe(name: str) -> Callable[[Path], None]:
    """Replaces a file by a pipe without a writer."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return edit


def make_endless(name: str) -> Callable[[Path], None]:
    """Replaces a file by a device that never ends."""

    def edit(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return edit
