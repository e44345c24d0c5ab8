"""Moves what a micro-batch keeps for its backward to host memory, and back.

Only memory moves. Tensors, views and graphs stay the same objects, so a tensor that is saved twice is copied once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node

from comm.protocol import Work

_LEAST_BYTES = 4096
"""Size below which the memory of a tensor stays on the device: a copy would take longer than it is worth."""


class HostMemoryLink(Protocol):
    """Copies tensors between the device and host memory, next to computation."""

    def to_host(self, tensors: Sequence[Tensor]) -> Work[Sequence[Tensor]]:
        """Starts to copy tensors to host memory. They must stay unchanged until the work is complete."""

    def to_device(self, hosts: Sequence[Tensor], tensors: Sequence[Tensor]) -> Work[None]:
        """Starts to copy host tensors into tensors of the same shape."""


def graph_tensors(nodes: Iterable[Node]) -> Iterator[Tensor]:
    """Yields the tensors that autograd graphs keep for their backward, including weights, maybe twice.

    A custom function names those that it keeps outside `save_for_backward` in the context's attribute `inner_tensors`.
    """
    left = list(nodes)
    seen = set[Node]()
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions if before is not None]
        for name in _saved_names(type(node)):
            yield from _tensors_in(getattr(node, name))
        for tensor in getattr(node, "inner_tensors", ()):
            yield tensor
            if tensor.grad_fn is not None:
                left.append(tensor.grad_fn)


@cache
def _saved_names(kind: type[Node]) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors")


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        yield from (each for each in value if isinstance(each, Tensor))


class ActivationOffload:
    """Offload of the activation of one micro-batch in one stage: start, release, reload, restore.

    Shared tensors never move: weights, tokens, masks and tables, which other micro-batches read meanwhile.
    """

    def __init__(self, link: HostMemoryLink, shared: Callable[[], Iterable[Tensor]]) -> None:
        self._link = link
        self._shared = shared
        self._storages: list[torch.UntypedStorage] = []
        self._to_host: Work[Sequence[Tensor]] | None = None
        self._hosts: Sequence[Tensor] = ()
        self._to_device: Work[None] | None = None

    def start(self, kept: Iterable[Tensor]) -> None:
        """Starts to copy the memory of kept tensors to the host."""
        self._storages = movable_storages(kept, self._shared())
        self._to_host = self._link.to_host([_bytes_of(storage) for storage in self._storages])

    def release(self) -> None:
        """Waits for the copy, and frees the memory on the device."""
        assert self._to_host is not None
        self._hosts = self._to_host.wait()
        self._to_host = None
        for storage in self._storages:
            storage.resize_(0)

    def reload(self) -> None:
        """Allocates the memory again, and starts to copy it back."""
        for storage, host in zip(self._storages, self._hosts, strict=True):
            storage.resize_(host.nbytes)
        self._to_device = self._link.to_device(self._hosts, [_bytes_of(storage) for storage in self._storages])

    def restore(self) -> None:
        """Waits for the copy back, and frees the memory on the host."""
        assert self._to_device is not None
        self._to_device.wait()
        self._storages = []
        self._hosts = ()
        self._to_device = None


def movable_storages(kept: Iterable[Tensor], shared: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Returns the memory of kept tensors, each once, that torch allocated and that is not shared or small."""
    fixed = {tensor.untyped_storage().data_ptr() for tensor in shared}
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= _LEAST_BYTES and storage.data_ptr() not in fixed and storage.resizable():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
