"""What a step minimizes. The model calls `Objective.loss` for every head and knows no loss by itself.

Losses are sums over a micro-batch, scaled by counts over the whole job. Source: arXiv:2412.19437, sections 2.1.2, 2.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.attention.documents import Documents
from model.head import score_tokens
from model.precision.linear import WeightSink

MAIN, BALANCE = "main", "balance"


def depth_name(depth: int) -> str:
    """Returns the name under which the loss of a depth is reported."""
    return f"mtp_{depth}" if depth else MAIN


def loss_names(mtp_depth: int) -> tuple[str, ...]:
    """Returns the names of a cross-entropy's losses: those of every depth and the balance loss."""
    return (*(depth_name(depth) for depth in range(mtp_depth + 1)), BALANCE)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """One micro-batch as the ends of the model see it.

    inputs_BT: per depth k = 0 (main), 1, ... the token embedded at each position (shifted by k).
    targets_BT: per depth the token to predict (shifted by k + 1), -100 where there is none.
    All int64 [B, T]. documents: which tokens see each other; None: each those before it.
    extras: what else an objective needs to know of the main targets, by name, each [B, T, ...]: weights, advantages,
    log-probabilities under another model.
    """

    inputs_BT: tuple[Tensor, ...]
    targets_BT: tuple[Tensor, ...]
    documents: Documents | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Freezes the extras.

        Raises:
            ValueError: an extra does not have a value for each token.
        """
        shape = self.inputs_BT[0].shape
        for name, extra in self.extras.items():
            if extra.shape[:2] != shape:
                raise ValueError(
                    f"extras: {name} must begin with the shape of the tokens, {list(shape)}, is {list(extra.shape)}"
                )
        object.__setattr__(self, "extras", MappingProxyType(dict(self.extras)))


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output head: its matrix, and the depth whose hidden state it reads, 0 for the main one."""

    depth: int
    weight_VD: Tensor


@dataclass(frozen=True, slots=True)
class TaskLoss:
    """What an objective found in one micro-batch at one depth.

    Attributes:
        loss: its part of the step's loss, a scalar with its graph.
        sums: what is reported, undivided, by name; scalars without graph.
        log_probs_BT: of the targets, without graph, 0 where there is none; None if the objective scores no tokens.
    """

    loss: Tensor
    sums: Mapping[str, Tensor]
    log_probs_BT: Tensor | None = None


class Objective(Protocol):
    """What is minimized: cross-entropy, or later distillation, policy gradient, preference or ranking."""

    @property
    def balance(self) -> float:
        """The factor of the sequence-wise balance loss, summed over sequences and layers."""
        ...

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes a micro-batch's loss at the depth of the head.

        Args:
            hidden_BTD: the head's input, the state after the final norm.
            head: that reads it.
            batch: with targets of every depth.
            sink: takes weight gradients, as of `linear.linear`.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Next-token prediction at every depth.

    Attributes:
        factors: of the summed cross-entropy of each depth; 1 / (targets of that depth in the global batch) for the
            main head, with MTP's weight over its depth for the others.
        balance: the balance loss's weight over the global batch's sequences.
        weights: the name among a micro-batch's extras of the weight of each main target; None: all weigh 1.
    """

    factors: tuple[float, ...]
    balance: float
    weights: str | None = None

    def loss(self, hidden_BTD: Tensor, head: OutputHead, batch: MicroBatch, sink: WeightSink | None) -> TaskLoss:
        """Computes the depth's summed cross-entropy in nats, times its factor."""
        weights_N = None if self.weights is None else depth_weights(batch.extras[self.weights], head.depth).flatten()

        def nats_of(log_probs_N: Tensor) -> Tensor:
            return -(log_probs_N if weights_N is None else weights_N.to(log_probs_N.dtype) * log_probs_N).sum()

        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        nats, log_probs_BT = score_tokens(
            hidden_BTD,
            head.weight_VD,
            batch.targets_BT[head.depth],
            sink,
            value=nats_of,
            slopes=None if weights_N is None else weights_N.to(wide),
        )
        return TaskLoss(self.factors[head.depth] * nats, {depth_name(head.depth): nats.detach()}, log_probs_BT)


def depth_weights(weights_BT: Tensor, depth: int) -> Tensor:
    """Returns the weights of a depth's targets: those of the main targets that are the same tokens, BT."""
    kept = weights_BT[:, depth:]
    return functional.pad(kept, (0, weights_BT.shape[1] - kept.shape[1]))


@dataclass(slots=True)
class LossSums:
    """Sums of losses that one rank finds in one step, undivided; added up over ranks they give the step's losses.

    Attributes:
        names: of all losses, in an order that is the same on every rank.
        log_probs: the main targets' log-probabilities by (direction, micro-batch), if they are wanted.
    """

    names: tuple[str, ...]
    log_probs: dict[tuple[int, int], Tensor] | None = None
    _pending: list[tuple[str, Tensor]] = field(default_factory=list)
    _sums: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: Tensor) -> None:
        """Adds a sum of one micro-batch, a scalar; it is read on the host only by `settle`."""
        assert name in self.names, f"{name} is not among the losses {self.names}"
        self._pending.append((name, total.detach()))

    def add_task(self, found: TaskLoss, head: OutputHead, place: tuple[int, int]) -> None:
        """Adds what an objective found at one depth of the micro-batch at (direction, micro-batch)."""
        for name, total in found.sums.items():
            self.add(name, total)
        if self.log_probs is not None and head.depth == 0 and found.log_probs_BT is not None:
            self.log_probs[place] = found.log_probs_BT

    def settle(self) -> Tensor:
        """Returns all sums in the order of their names, float64 on the host."""
        for name, total in self._pending:
            self._sums[name] = self._sums.get(name, 0.0) + float(total)
        self._pending.clear()
        return torch.tensor([self._sums.get(name, 0.0) for name in self.names], dtype=torch.float64)
