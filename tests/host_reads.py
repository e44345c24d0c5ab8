"""Finds operations that would make the host wait for a GPU, by tracing an execution on CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount", "_to_cpu")


class Reads(TorchDispatchMode):
    """Returns the names of operations whose result's shape or value the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_seen = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.num_seen += 1
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_", "index_put") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in _READING or by_mask or unsized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
