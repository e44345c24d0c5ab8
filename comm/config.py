"""Defines the configuration of the cluster, of the ranks' layout and of the dispatch.

Does not import torch.
"""

from dataclasses import dataclass
from typing import Literal, Self

from kernels.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Machines of a run. A node is `ranks_per_node` consecutive ranks; simulated nodes share a machine.

    Attributes:
        device: device type of every rank.
        backend: backend of `torch.distributed`.
        ranks_per_node: number of consecutive ranks that share fast links.
        threads_per_rank: CPU threads of a rank.
        timeout_seconds: timeout of a collective.
        peak_flops: dense bf16 floating-point operations per second of a rank, for MFU; None if unknown.
        memory_bytes: memory of a rank's device. A run must fit it before it starts. None skips the check.
        memory_reserve_bytes: part of the memory that the prediction leaves to CUDA, NCCL and the allocator.
        grace_seconds: time that ranks of the built-in launcher have to save a checkpoint before it ends them.
        max_restarts: how often the built-in launcher restarts all ranks after one was lost.
        num_sms: streaming multiprocessors of a rank's device; None as those of the planner's rates.
        communication_sms: how many of them the planner assumes that dispatch and combine use; None as for the rates. No
            kernel and no communicator reads it.
        inter_node_bytes_per_second: rate of a rank's link to other nodes in each direction; None as for the rates.
        intra_node_bytes_per_second: rate of a rank's link within its node in each direction; None as for the rates.
        memory_bytes_per_second: rate of the device's memory; None as for the rates.
        dollars_per_gpu_hour: price of a device; None if unknown.
    """

    device: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    ranks_per_node: PositiveInt
    threads_per_rank: PositiveInt
    timeout_seconds: PositiveFloat
    peak_flops: PositiveFloat | None
    memory_bytes: PositiveInt | None
    memory_reserve_bytes: NonNegativeInt
    grace_seconds: PositiveFloat
    max_restarts: NonNegativeInt
    num_sms: PositiveInt | None = None
    communication_sms: NonNegativeInt | None = None
    inter_node_bytes_per_second: PositiveFloat | None = None
    intra_node_bytes_per_second: PositiveFloat | None = None
    memory_bytes_per_second: PositiveFloat | None = None
    dollars_per_gpu_hour: NonNegativeFloat | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Way to cut the model's layers into pipeline stages. YAML writes a word or a list.

    Attributes:
        kind: `auto` gives every rank about equal work, `even` gives stages about equal numbers of layers, `listed` uses
            the given numbers.
        layers: number of layers of each stage if `kind` is `listed`, else empty.
    """

    kind: Literal["auto", "even", "listed"]
    layers: tuple[int, ...] = ()

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a cut from `auto`, `even` or a list of whole numbers.

        Raises:
            ValueError: the value is invalid. The message holds the rule and the value, without the key.
        """
        if value == "auto":
            return cls("auto")
        if value == "even":
            return cls("even")
        if isinstance(value, list | tuple) and value and all(type(size) is int and size >= 0 for size in value):
            return cls("listed", tuple(value))
        raise ValueError(
            f"must be auto, even, or a list of the number of layers of each stage, is {value!r}; nearest valid: auto"
        )

    def to_plain(self) -> object:
        """Returns what `from_plain` reads."""
        return list(self.layers) if self.kind == "listed" else self.kind


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """Axes of the device mesh: world = pipeline x data x context; expert divides data x context.

    Attributes:
        pipeline: pipeline ranks.
        data: groups of ranks that read different sequences.
        expert: ranks that share the experts of a layer.
        cut: layers of each pipeline stage.
        context: ranks that share each sequence; every one holds an equal part of its tokens.
    """

    pipeline: PositiveInt
    data: PositiveInt
    expert: PositiveInt
    cut: Cut = Cut("auto")
    context: PositiveInt = 1

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Number of ranks at one index of the pipeline, data x context, which hold the same stages."""
        return self.data * self.context

    def axes(self, separator: str = " ") -> str:
        """Returns the axes whose product is the number of ranks, as in `pipeline 2 x data 4`."""
        sizes = {"pipeline": self.pipeline, "data": self.data} | ({"context": self.context} if self.context > 1 else {})
        return " x ".join(f"{name}{separator}{size}" for name, size in sizes.items())


Payload = Literal["full", "fp8"]
"""Format of rows that are sent to experts: their own dtype, or e4m3 codes with one power-of-two scale per 128 columns.

Rows that return from experts are never quantized (arXiv:2412.19437, section 3.3).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """Configuration of a dispatcher.

    Attributes:
        kind: name in `comm.dispatch.registry.DISPATCHERS`.
        payload: format of rows that are sent to experts.
    """

    kind: str
    payload: Payload


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedDispatchConfig(DispatchConfig):
    """Configuration of a dispatcher between ranks that limits the nodes of each token.

    Attributes:
        max_nodes: maximum number of nodes that hold a token's experts.
        node_cap: what happens to a token over that limit. `verify` ends the run and names the token. `clip` keeps the
            experts on its best nodes and renormalizes the weights.
    """

    max_nodes: PositiveInt
    node_cap: Literal["verify", "clip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDispatchConfig(DispatchConfig):
    """Configuration for all experts on one rank. Nothing is sent; rows are quantized if `payload` is fp8."""

    kind: Literal["local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAllDispatchConfig(CappedDispatchConfig):
    """Configuration of one all-to-all over the expert group each way, with one copy of a row per expert."""

    kind: Literal["all_to_all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoHopDispatchConfig(CappedDispatchConfig):
    """Configuration of a dispatch that sends each row once per node, then within the node to its experts.

    Source: arXiv:2412.19437, section 3.2.2.

    Attributes:
        chunks: parts of a micro-batch. The hop between nodes of one overlaps the hop within nodes of the previous one.
        partial_sums: dtype of the partial sum that each node returns to the home node: the rows' own, or float32.
    """

    kind: Literal["two_hop"]
    chunks: PositiveInt
    partial_sums: Literal["rows", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepEPDispatchConfig(CappedDispatchConfig):
    """Configuration of DeepEP's kernels. They need CUDA and the package `deep_ep`."""

    kind: Literal["deepep"]
