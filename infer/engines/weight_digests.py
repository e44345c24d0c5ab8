"""Compares weights of two processes by hashes of every tensor.

vLLM stores some tensors of a Hugging Face folder side by side in one parameter. They are split again before hashing.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from infer.config import GenerateError

_FUSED_EXPERTS = re.compile(r"(.*\.experts)(?:\.\w+)*\.(w13|w2)_weight")
_FUSED_PAIR = re.compile(r"(.*)\.gate_up_proj\.weight")
_FUSED_LATENT = re.compile(r"(.*)\.(?:fused_qkv_a_proj|fused_qkv_a_proj_with_mqa)\.weight")


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """SHA-256 of a tensor's bytes in row-major order, with its type and shape."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorDigest":
        """Hashes a tensor of any device."""
        content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class ServedDigests:
    """Function that hashes a served model's weights under the names of a Hugging Face folder."""

    shapes: Mapping[str, tuple[int, ...]]

    def __call__(self, model: nn.Module) -> dict[str, TensorDigest]:
        """Returns the digests of the tensors that the model holds, by name."""
        found = (pair for name, parameter in _tensors(model) for pair in _split(name, parameter, self.shapes))
        held = ((name, part) for name, part in found if name in self.shapes)
        return {name: TensorDigest.of(_unpadded(part, self.shapes[name])) for name, part in held}


def check_digests(ours: Iterable[tuple[str, Tensor]], workers: Iterable[Mapping[str, TensorDigest]]) -> None:
    """Raises `GenerateError` for the first tensor that a worker lacks or holds with another content."""
    held = list(workers)
    for name, tensor in ours:
        expected = TensorDigest.of(tensor)
        for number, digests in enumerate(held):
            found = digests.get(name)
            if found != expected:
                raise GenerateError(
                    f"weights: worker {number} must hold {name} as {_shown(expected)}, holds "
                    f"{'no such tensor' if found is None else _shown(found)}"
                )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _split(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a Hugging Face folder that a parameter holds."""
    if match := _FUSED_EXPERTS.fullmatch(name):
        for expert, weight in enumerate(tensor):
            prefix = f"{match[1]}.{expert}"
            if match[2] == "w2":
                yield f"{prefix}.down_proj.weight", weight
            else:
                yield from _rows(weight, f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", shapes)
    elif match := _FUSED_PAIR.fullmatch(name):
        yield from _rows(tensor, f"{match[1]}.gate_proj.weight", f"{match[1]}.up_proj.weight", shapes)
    elif match := _FUSED_LATENT.fullmatch(name):
        yield from _rows(tensor, f"{match[1]}.q_a_proj.weight", f"{match[1]}.kv_a_proj_with_mqa.weight", shapes)
    else:
        yield name, tensor


def _rows(
    tensor: Tensor, first: str, second: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    """Yields two tensors whose rows follow each other."""
    if first in shapes:
        yield first, tensor[: shapes[first][0]]
        yield second, tensor[shapes[first][0] :]


def _unpadded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns the first rows of a parameter whose other sizes fit."""
    return tensor[: shape[0]] if tensor.shape[1:] == shape[1:] else tensor


def _shown(digest: TensorDigest) -> str:
    return f"{digest.dtype} {list(digest.shape)} with SHA-256 {digest.sha256[:12]}..."
