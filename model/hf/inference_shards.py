"""Reads the files of DeepSeek's own inference code, one for each rank: `model0-mp8.safetensors`, ...

Source: names and split dimensions of deepseek-ai/DeepSeek-V3, `inference/convert.py`. Each rank has some routed
experts whole, a slice of most other matrices, and a copy of everything else. MTP modules are left out.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.hf.checkpoint import TensorEntry, read_header
from model.hf.files import HfError
from model.hf.names import Stored
from model.hf.reader import read_tensor

_FILE = re.compile(r"model(0|[1-9][0-9]{0,3})-mp([1-9][0-9]{0,3})\.safetensors")
_RELEASED = {
    "embed": "embed_tokens",
    "head": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn": "self_attn",
    "wq": "q_proj",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_layernorm",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "ffn": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "bias": "e_score_correction_bias",
    "scale": "weight_scale_inv",
}
_ROWS = frozenset(("embed_tokens", "lm_head", "q_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"))
_COLUMNS = frozenset(("o_proj", "down_proj"))


@dataclass(frozen=True, slots=True)
class RankTensor:
    """A tensor's parts in the order of the ranks: slices along a dimension, or equal copies if it is None.

    A routed expert has one part, the whole.
    """

    parts: tuple[TensorEntry, ...]
    dimension: int | None

    @property
    def stored(self) -> Stored:
        """Type of the tensor, and shape of its joined slices."""
        shape = list(self.parts[0].shape)
        if self.dimension is not None:
            shape[self.dimension] = sum(part.shape[self.dimension] for part in self.parts)
        return Stored(tuple(shape), self.parts[0].dtype)

    def read(self, name: str) -> Tensor:
        """Joins the slices, or raises an `HfError` if copies of ranks differ."""
        tensors = [read_tensor(part, name) for part in self.parts]
        if self.dimension is not None:
            return torch.cat(tensors, self.dimension)
        for part, tensor in zip(self.parts, tensors, strict=True):
            if not torch.equal(tensor.view(torch.uint8), tensors[0].view(torch.uint8)):
                raise HfError(part.file, name, f"must equal the copy in {self.parts[0].file.name}, differs")
        return tensors[0]


def find_inference_shards(folder: Path) -> list[Path]:
    """Returns the files of all ranks in order, none if the folder has another layout.

    Raises:
        HfError: a rank's file is missing.
    """
    matches = [matched for path in folder.glob("model*.safetensors") if (matched := _FILE.fullmatch(path.name))]
    sizes = {int(matched[2]) for matched in matches}
    names = [f"model{rank}-mp{size}.safetensors" for size in sorted(sizes) for rank in range(size)]
    for name in names:
        if len(sizes) > 1 or not (folder / name).is_file():
            raise HfError(folder, name, f"must be there with the other files of ranks of mp{max(sizes)} alone, is not")
    return [folder / name for name in names]


def read_inference_shards(paths: list[Path]) -> Mapping[str, RankTensor]:
    """Reads the headers of all ranks' files; returns tensors by released name."""
    found: dict[str, list[TensorEntry]] = {}
    for rank, path in enumerate(paths):
        for name, entry in read_header(path).items():
            parts = found.setdefault(_released_name(name), [])
            parts.append(entry)
            if parts[0].dtype != entry.dtype or len(parts[0].shape) != len(entry.shape):
                raise HfError(path, name, f"must be {parts[0].dtype} as on rank 0, is {entry.dtype}")
            if len(parts) > rank + 1:
                raise HfError(path, name, "must be in a file once, is twice under two names")
    return {name: RankTensor(tuple(parts), _split_dimension(name)) for name, parts in found.items()}


def _released_name(name: str) -> str:
    released = ".".join(_RELEASED.get(part, part) for part in name.split("."))
    return released if released.startswith("lm_head.") else f"model.{released}"


def _split_dimension(name: str) -> int | None:
    key = name.split(".")[-2] if "." in name else ""
    return 0 if key in _ROWS else 1 if key in _COLUMNS else None
