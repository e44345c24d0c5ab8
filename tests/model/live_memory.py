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

from model.attention.form import RotationTable
from model.config import Computing, ModelConfig
from model.linear import GradientStore
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.phases import ComputePhase
from model.size import StageShape
from model.stage import Stage
from model.transformer import Transformer
from train.predict.memory import stage_phases
from train.predict.rank_bytes import Sizes


class LiveMemory(TorchDispatchMode):
    """Storages that operators make while it is on. Those of their inputs are not counted.

    Args:
        measures_inside: whether `peak_bytes` is measured after every operator.
        ignored_bytes: largest size that is not counted.
    """

    def __init__(self, *, measures_inside: bool = True, ignored_bytes: int = 0) -> None:
        super().__init__()
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._measures_inside = measures_inside
        self._ignored_bytes = ignored_bytes
        self.num_made = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given: set[int] | None = None
        is_larger = False
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                if given is None:
                    inputs = tree_leaves((args, kwargs))
                    given = {each.untyped_storage()._cdata for each in inputs if isinstance(each, Tensor)}
                storage = leaf.untyped_storage()
                if storage._cdata not in given:
                    self._made[storage._cdata] = weakref.ref(storage)
                    self.num_made += 1
                    is_larger = True
        # Only an operator that makes storages can raise the peak.
        if self._measures_inside and is_larger:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return made

    def live(self) -> list[torch.UntypedStorage]:
        """Returns live storages, without those that were freed by hand."""
        found = {key: reference() for key, reference in self._made.items()}
        self._made = {key: self._made[key] for key, storage in found.items() if storage is not None}
        return [each for each in found.values() if each is not None and each.nbytes() > self._ignored_bytes]

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


def rotation_tables(model: Transformer) -> list[Tensor]:
    """Returns the tables of rotation that the layers keep, of which a model that has run has one each."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    tables = [turns for value in attributes if isinstance(value, RotationTable) for turns in value._tables.values()]
    assert tables, "no layer keeps a table of rotation"
    return tables


def kept_bytes(model: Transformer, batch: MicroBatch) -> int:
    """Returns the bytes that the phases of a whole model keep after their forward, each storage once.

    Weights, tokens, rotation tables and single numbers are left out.
    """
    depths = model.config.mtp_depth + 1
    stage = Stage(model, range(model.config.num_layers), first=True, last=True)
    objective, sums = CrossEntropy(factors=(1.0,) * depths, balance=1.0), LossSums(loss_names(depths - 1))
    run = stage.start(batch, objective, sums, GradientStore(model.parameters()))
    for phase, lane in enumerate(stage.lanes):
        run.forward(phase)
        if lane == "comm":
            run.wait()
    others = (*model.parameters(), *model.buffers(), *batch.inputs_BT, *batch.targets_BT, *rotation_tables(model))
    ignored = {tensor.untyped_storage()._cdata for tensor in others}
    kept = [tensor for phase in run._phases if isinstance(phase, ComputePhase) for tensor in phase.kept()]
    sizes = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept if tensor.numel() > 1
    }
    return sum(size for storage, size in sizes.items() if storage not in ignored)


def counted_bytes(config: ModelConfig, dtype: torch.dtype, computing: Computing, tokens: int, **changes: Any) -> int:
    """Returns the same, measured without memory, for two sequences on a CPU with all experts on this rank."""
    shape = {"sequences": 2, "tokens": tokens, "pads_heads": True} | changes
    sizes = make_sizes(config, dtype, computing, **shape)
    whole = StageShape(layers=range(config.num_layers), is_first=True, is_last=True)
    return sum(phase.kept for phase in stage_phases([sizes], whole)[0])


def make_sizes(config: ModelConfig, dtype: torch.dtype, computing: Computing, **changes: Any) -> Sizes:
    """Returns sizes of a micro-batch whose rows all arrive at this rank's experts."""
    shape = {
        "device": "cpu",
        "expert_rows": changes["sequences"] * changes["tokens"] * config.num_experts_per_token,
        "num_local_experts": config.num_routed_experts,
    }
    return Sizes(config=config, computing=computing, value_bytes=dtype.itemsize, **(shape | changes))
