"""Memory that operators fill: what of it is alive, and what autograd keeps."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Storages that operators make while it is on. Those of their inputs are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.num_made = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self._made[storage._cdata] = weakref.ref(storage)
                self.num_made += 1
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return made

    def live(self) -> list[torch.UntypedStorage]:
        """Returns live storages, largest first, without those that were freed by hand."""
        found = {key: reference() for key, reference in self._made.items()}
        self._made = {key: self._made[key] for key, storage in found.items() if storage is not None}
        alive = [storage for storage in found.values() if storage is not None and storage.nbytes()]
        return sorted(alive, key=lambda storage: -storage.nbytes())

    def live_bytes(self) -> int:
        """Bytes of `live`."""
        return sum(storage.nbytes() for storage in self.live())


class Saved:
    """Bytes that autograd saved, each storage once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Total number of bytes."""
        return sum(self.sizes.values())

    def save(self, tensor: Tensor) -> Tensor:
        """Notes a tensor, and keeps it, so that its place in memory is its own."""
        self._alive.append(tensor.detach())
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


@contextmanager
def saved_memory() -> Iterator[Saved]:
    """Records what autograd saves inside the context, including weights and inputs."""
    saved = Saved()
    with saved_tensors_hooks(saved.save, lambda tensor: tensor):
        yield saved
