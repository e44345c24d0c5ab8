"""Objectives that a step minimizes. The model calls `Objective.loss` for every head.

Losses are sums over a micro-batch, scaled by counts over the global batch (arXiv:2412.19437, sections 2.1.2, 2.2).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.documents import Documents
from kernels.cross_entropy.reference import IGNORE
from model.head import score_tokens
from model.linear import WeightSink
from model.slices import SharedGradient

MAIN = "main"
BALANCE = "balance"
_LARGEST_TARGET_SHARE = 0.9


def depth_name(depth: int) -> str:
    """Returns the name of a depth's loss in reports."""
    return f"mtp_{depth}" if depth else MAIN


def loss_names(mtp_depth: int) -> tuple[str, ...]:
    """Returns the names of the losses of cross-entropy: one per depth, and the balance loss."""
    return (*(depth_name(depth) for depth in range(mtp_depth + 1)), BALANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch as both ends of the model read it.

    Attributes:
        inputs_BT: for each depth k = 0 (main), 1, ... the token embedded at each position (shifted by k), int64.
        targets_BT: for each depth the token to predict (shifted by k + 1), -100 if there is none, int64.
        documents: documents of packed sequences; None: each token sees all tokens before it.
        extras: further values of the main targets that an objective needs, by name, each [B, T, ...].
        target_rows: for each depth the ascending numbers of the rows of the flattened targets that have one, so that
            the head reads no others; None, or no entry: it reads all rows. Made on the host (`find_target_rows`).
    """

    inputs_BT: tuple[Tensor, ...]
    targets_BT: tuple[Tensor, ...]
    documents: Documents | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    target_rows: tuple[Tensor | None, ...] = ()

    def __post_init__(self) -> None:
        shape = self.inputs_BT[0].shape
        for name, extra in self.extras.items():
            if extra.shape[:2] != shape:
                raise ValueError(
                    f"extras: {name} must begin with the shape of the tokens, {list(shape)}, is {list(extra.shape)}"
                )
        object.__setattr__(self, "extras", MappingProxyType(dict(self.extras)))

    def to(self, device: torch.device) -> "MicroBatch":
        """Returns the micro-batch on a device."""
        return MicroBatch(
            inputs_BT=tuple(_copy_to(tensor, device) for tensor in self.inputs_BT),
            targets_BT=tuple(_copy_to(tensor, device) for tensor in self.targets_BT),
            documents=None if self.documents is None else self.documents.to(device),
            extras={name: _copy_to(extra, device) for name, extra in self.extras.items()},
            target_rows=tuple(None if tensor is None else _copy_to(tensor, device) for tensor in self.target_rows),
        )

    def rows(self, depth: int) -> Tensor | None:
        """Returns the rows that the head of a depth reads; None: all."""
        return self.target_rows[depth] if self.target_rows else None


def _copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, the host does not wait for work that is queued on the device.
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def find_target_rows(targets_BT: Tensor) -> Tensor | None:
    """Returns the rows with a target, or None if most have one. Reads the targets on the host."""
    # Selecting rows copies them, which pays only if many have no target.
    rows = (targets_BT.flatten() != IGNORE).nonzero().flatten()
    return rows if len(rows) <= _LARGEST_TARGET_SHARE * targets_BT.numel() else None


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output head: its matrix, and the depth of the hidden state that it reads, 0 for the main one.

    Slices add to the `shared` gradient of the matrix.
    """

    depth: int
    weight_VD: Tensor
    shared: SharedGradient | None = None


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """Result of an objective for one micro-batch at one depth.

    Attributes:
        loss: its part of the step's loss, a scalar with its graph.
        sums: reported sums, undivided, by name; scalars without graph.
        log_probs_BT: log-probabilities of the targets, without graph, 0 if there is none; for a score head, the
            scores of all tokens; None if the objective computes neither.
    """

    loss: Tensor
    sums: Mapping[str, Tensor]
    log_probs_BT: Tensor | None = None


class Objective(Protocol):
    """Function to minimize."""

    @property
    def balance(self) -> float:
        """Factor of the sequence-wise balance loss, which is summed over sequences and layers."""

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes a micro-batch's loss at the head's depth from the states after the final norm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Next-token prediction at every depth.

    Attributes:
        factors: factor of the summed cross-entropy of each depth: 1 / (targets of that depth in the global batch) for
            the main head, and that times MTP's weight divided by the depth for the others.
        balance: weight of the balance loss divided by the sequences in the global batch.
        weights: name of the extra that holds the weights of the targets of each depth, [B, T, depths]
            (`weights_of_depths`); None: all weigh 1.
    """

    factors: tuple[float, ...]
    balance: float
    weights: str | None = None

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the depth's summed cross-entropy in nats, times its factor."""
        # One weight for each target of this depth, in the order of flattened rows: N = B T.
        weights_N = None if self.weights is None else batch.extras[self.weights][..., head.depth].flatten()

        def nats_of(log_probs_N: Tensor) -> Tensor:
            return -(log_probs_N if weights_N is None else weights_N.to(log_probs_N.dtype) * log_probs_N).sum()

        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        # The derivative of weight x nats in -log p is the weight, so the weights are the slopes.
        nats, log_probs_BT = score_tokens(
            hidden_BTD,
            head.weight_VD,
            batch.targets_BT[head.depth],
            sink,
            value=nats_of,
            slopes=None if weights_N is None else weights_N.to(wide),
            rows=batch.rows(head.depth),
            shared=head.shared,
        )
        return TaskLoss(self.factors[head.depth] * nats, {depth_name(head.depth): nats.detach()}, log_probs_BT)


def depth_weights(weights_BT: Tensor, depth: int) -> Tensor:
    """Returns the weights of a depth's targets, BT, from those of the same tokens among the main targets."""
    # Depth k predicts the token k further, so a position takes the weight k to its right.
    later_BT = weights_BT[:, depth:]
    return functional.pad(later_BT, (0, weights_BT.shape[1] - later_BT.shape[1]))


def weights_of_depths(weights_BT: Tensor, num_depths: int) -> Tensor:
    """Returns the weights of each depth's targets, [B, T, depths], from those of whole sequences."""
    return torch.stack([depth_weights(weights_BT, depth) for depth in range(num_depths)], -1)


@dataclass(slots=True)
class LossSums:
    """Undivided sums of losses of one rank in one step, and log-probabilities by micro-batch if recorded."""

    names: tuple[str, ...]
    log_probs: dict[tuple[int, int], Tensor] | None = None
    _pending: list[tuple[str, Tensor]] = field(default_factory=list)
    _totals: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, total: Tensor) -> None:
        """Adds a sum of one micro-batch, a scalar; only `settle` reads it on the host."""
        assert name in self.names, f"{name} is not among the losses {self.names}"
        # No host sync here: the step reads all sums at its end.
        self._pending.append((name, total.detach()))

    def add_task(self, result: TaskLoss, head: OutputHead, place: tuple[int, int]) -> None:
        """Adds an objective's result at one depth of the micro-batch at (direction, micro-batch)."""
        for name, total in result.sums.items():
            self.add(name, total)
        if self.log_probs is not None and head.depth == 0 and result.log_probs_BT is not None:
            self.log_probs[place] = result.log_probs_BT

    def settle(self) -> Tensor:
        """Returns all sums in the order of their names, float64 on the host, for any order of micro-batches."""
        # Exact sums (fsum), so the order in which schedules run micro-batches does not matter.
        if self._pending:
            totals = torch.stack([total.double() for _, total in self._pending]).tolist()  # host sync
            for (name, _), total in zip(self._pending, totals, strict=True):
                self._totals.setdefault(name, []).append(total)
        self._pending.clear()
        return torch.tensor([math.fsum(self._totals.get(name, ())) for name in self.names], dtype=torch.float64)
