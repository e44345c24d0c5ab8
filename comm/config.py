"""Where ranks live, how they are laid out, and how tokens are dispatched to experts, as values. No torch here."""

from dataclasses import dataclass
from typing import Literal

from kernels.ranges import NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterConfig:
    """The machines. A node is `ranks_per_node` consecutive ranks; a simulated node shares a machine with others.

    `peak_flops`: dense bf16 floating-point operations per second of a rank, for MFU; None: unknown.
    `memory_bytes`: of a rank's device, which a run must fit before it starts; None: it is not checked.
    `memory_reserve_bytes`: the part of it that the prediction leaves to CUDA, NCCL and the allocator.
    Of ranks that the built-in launcher starts: `grace_seconds` is how long they may take to save when it has to end,
    `max_restarts` how often all of them start again after one was lost.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelismConfig:
    """world = pipeline x data; the expert axis divides the data axis."""

    pipeline: PositiveInt
    data: PositiveInt
    expert: PositiveInt

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self.pipeline * self.data


Payload = Literal["full", "fp8"]
"""How rows are sent to experts: as they are, or as e4m3 codes with a power-of-two scale for every 128 of them. Rows
from experts are never quantized (arXiv:2412.19437, section 3.3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchConfig:
    """How tokens are dispatched. `kind` is a name in `comm.dispatch.registry.DISPATCHERS`, `payload` a form of rows."""

    kind: str
    payload: Payload


@dataclass(frozen=True, kw_only=True, slots=True)
class CappedDispatchConfig(DispatchConfig):
    """A dispatch between ranks, with a cap on the nodes of a token.

    `max_nodes`: among which a token's experts may lie. `node_cap`: what happens to a token over it: `verify` ends the
    run and names it, `clip` keeps its best nodes and renormalises the weights.
    """

    max_nodes: PositiveInt
    node_cap: Literal["verify", "clip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalDispatchConfig(DispatchConfig):
    """All experts on this rank: nothing is sent, and rows change as `payload` would change them."""

    kind: Literal["local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAllDispatchConfig(CappedDispatchConfig):
    """One all-to-all over the expert group each way: a copy of a token's row for each of its experts."""

    kind: Literal["all_to_all"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TwoHopDispatchConfig(CappedDispatchConfig):
    """Each token's row once to every node that it touches, and from there to its experts (arXiv:2412.19437,
    section 3.2.2).

    `chunks`: parts of a micro-batch, so that the hop between nodes of one runs over the hop within nodes of the one
    before. `partial_sums`: the type of a node's sum that returns to the home node: the rows' own, or float32.
    """

    kind: Literal["two_hop"]
    chunks: PositiveInt
    partial_sums: Literal["rows", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepEPDispatchConfig(CappedDispatchConfig):
    """DeepEP's own kernels, on CUDA where the package is installed."""

    kind: Literal["deepep"]
