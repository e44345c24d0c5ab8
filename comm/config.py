"""Defines the configuration of the cluster, of the ranks' layout and of dispatch. Imports no torch."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from base.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

# Most SMs of a device that kernels of NCCL occupy, by what they do. A kernel may wait for its peers while it occupies
# them, so all groups of a rank together must leave some free: else what a peer waits for might not start.
LINK_CTAS = 2  # of a pipeline link, from the post of a receive on
EXCHANGE_CTAS = 24  # of dispatch and combine without `cluster.communication_sms`
CONTEXT_CTAS = 16  # of a context group
REDUCTION_CTAS = 16  # of sums of gradients and gathers of weights, which run one after the other
SMALL_CTAS = 4  # of sums of few numbers on the main thread


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """Machines of a run. A node is `ranks_per_node` consecutive ranks; simulated nodes share a machine."""

    device: Literal["cpu", "cuda"]  # device type of every rank
    backend: Literal["gloo", "nccl"]  # backend of `torch.distributed`
    ranks_per_node: PositiveInt  # number of consecutive ranks that share fast links
    threads_per_rank: PositiveInt  # CPU threads of a rank
    timeout_seconds: PositiveFloat  # timeout of a collective
    # dense bf16 floating-point operations per second of a rank, for MFU; None if unknown.
    peak_flops: PositiveFloat | None
    # memory of a rank's device. A run must fit it before it starts. None skips the check.
    memory_bytes: PositiveInt | None
    # part of the memory that the prediction leaves to CUDA, NCCL and the allocator.
    memory_reserve_bytes: NonNegativeInt
    # time that ranks of the built-in launcher have to save a checkpoint before it ends them.
    grace_seconds: PositiveFloat
    max_restarts: NonNegativeInt  # how often the built-in launcher restarts all ranks after one was lost
    has_mx: bool = False  # whether it multiplies MXFP8 and NVFP4, for plans
    has_fp8: bool = True  # whether the device multiplies matrices in the FP8 format of `precision=fp8`
    # streaming multiprocessors of a rank's device; None as those of the planner's rates.
    num_sms: PositiveInt | None = None
    # how many of them dispatch and combine use, while products leave them free, in jobs of several ranks on NCCL; None:
    # the planner assumes as many as for the rates, and a run leaves none (`EXCHANGE_CTAS`).
    communication_sms: NonNegativeInt | None = None
    # rate of a rank's link to other nodes in each direction; None as for the rates.
    inter_node_bytes_per_second: PositiveFloat | None = None
    # rate of a rank's link within its node in each direction; None as for the rates.
    intra_node_bytes_per_second: PositiveFloat | None = None
    memory_bytes_per_second: PositiveFloat | None = None  # rate of the device's memory; None as for the rates
    dollars_per_gpu_hour: NonNegativeFloat | None = None  # price of a device; None if unknown
    # host memory of a node and its rate, both shared by the node's ranks, and the rate of a rank's link to it in each
    # direction; None: no check, and the time of an update on the host is unknown.
    host_memory_bytes: PositiveInt | None = None
    host_memory_bytes_per_second: PositiveFloat | None = None
    host_link_bytes_per_second: PositiveFloat | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """Way to cut the model's layers into pipeline stages. YAML writes a word or a list."""

    # `auto` gives every rank about equal work, `even` gives stages about equal numbers of layers, `listed` uses the
    # given numbers.
    kind: Literal["auto", "even", "listed"]
    layers: tuple[int, ...] = ()  # number of layers of each stage if `kind` is `listed`, else empty

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a cut from `auto`, `even` or a list of whole numbers; raises ValueError without the key."""
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
    """Axes of the device mesh, pipeline x data x context x tensor; expert divides all but pipeline."""

    pipeline: PositiveInt  # pipeline ranks
    data: PositiveInt  # groups of ranks that read different sequences
    expert: PositiveInt  # ranks that share the experts of a layer
    cut: Cut = Cut("auto")  # layers of each pipeline stage
    context: PositiveInt = 1  # ranks that share each sequence; every one holds an equal part of its tokens
    # ranks that split heads, widths and the rows between layers, as in Megatron-LM with sequence parallelism. Only a
    # plan may have more than one.
    tensor: PositiveInt = 1

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.pipeline * self.stage_ranks

    @property
    def stage_ranks(self) -> int:
        """Number of ranks at one index of the pipeline, data x context x tensor, which hold the same stages."""
        return self.data * self.sequence_ranks

    @property
    def sequence_ranks(self) -> int:
        """Number of ranks that each hold an equal part of a sequence's rows, context x tensor."""
        return self.context * self.tensor

    def axes(self, separator: str = " ") -> str:
        """Returns the axes that multiply to the number of ranks, as in `pipeline 2 x data 4`."""
        sizes = {"pipeline": self.pipeline, "data": self.data}
        sizes |= {name: size for name in ("context", "tensor") if (size := getattr(self, name)) > 1}
        return " x ".join(f"{name}{separator}{size}" for name, size in sizes.items())


Payload = Literal["full", "fp8"]
"""Format of rows that are sent to experts: their own dtype, or e4m3 codes with one power-of-two scale per 128 columns.

Rows that return from experts are never quantized (arXiv:2412.19437, section 3.3).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """Configuration of a dispatcher."""

    kind: str  # name in `comm.dispatch.registry.DISPATCHERS`
    payload: Payload  # format of rows that are sent to experts

    @property
    def num_slots(self) -> int:
        """Copies of other ranks' experts that a rank can hold for one micro-batch of a layer."""
        return 0

    def without_copies(self) -> Self:
        """Returns the configuration of the dispatcher without copies of experts for each micro-batch."""
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedDispatchConfig(DispatchConfig):
    """Configuration of a dispatcher between ranks that limits the nodes of each token."""

    max_nodes: PositiveInt  # maximum number of nodes that hold a token's experts
    # what happens to a token over that limit. `verify` ends the run and names the token. `clip` keeps the experts on
    # its best nodes and renormalizes the weights.
    node_cap: Literal["verify", "clip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDispatchConfig(DispatchConfig):
    """Configuration for all experts on one rank. Nothing is sent; rows are quantized if `payload` is fp8."""

    kind: Literal["local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BalancedDispatchConfig(CappedDispatchConfig):
    """Configuration of a dispatcher that can send rows to copies of hot experts."""

    # where copies may be: nowhere, on the node of their expert, or on any node.
    balance: Literal["none", "node", "exact"] = "none"
    balance_slots: PositiveInt = 4  # copies that a rank can hold of other ranks' experts in one layer

    @property
    def num_slots(self) -> int:
        """Implements `DispatchConfig.num_slots`."""
        return 0 if self.balance == "none" else self.balance_slots

    def without_copies(self) -> Self:
        """Returns the configuration with `balance` none."""
        return replace(self, balance="none")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAllDispatchConfig(BalancedDispatchConfig):
    """Configuration of one all-to-all over the expert group each way, with one copy of a row per expert."""

    kind: Literal["all_to_all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoHopDispatchConfig(BalancedDispatchConfig):
    """Configuration of a dispatch that sends rows once per node, then within it (arXiv:2412.19437, 3.2.2)."""

    kind: Literal["two_hop"]
    # parts of a micro-batch. The hop between nodes of one overlaps the hop within nodes of the previous one.
    chunks: PositiveInt
    # dtype of the partial sum that each node returns to the home node: the rows' own, or float32.
    partial_sums: Literal["rows", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepEPDispatchConfig(CappedDispatchConfig):
    """Configuration of DeepEP's kernels. They need CUDA and the package `deep_ep`."""

    kind: Literal["deepep"]
