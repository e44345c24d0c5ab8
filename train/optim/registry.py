"""Names optimizers, and divides whole matrices among ranks. No torch here.

An optimizer is AdamW, or a rule for whole matrices next to AdamW for all other weights. A file outside the checkout can
register one more (docs/extend.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from base.registry import Registry
from train.optim.learning_rate import OptimConfig

if TYPE_CHECKING:
    from torch import Tensor

Stack = tuple[int, int, int]
"""Number, rows and columns of equal matrices: one weight, or those of a layer's routed experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixRule:
    """How an optimizer moves whole matrices; embeddings, heads, routers and norms are AdamW's.

    `update(weights, gradients, buffers, config)` returns the move of each matrix in a stack (N matrices x rows x
    columns), which is multiplied by the learning rate and subtracted. It changes `buffers` in place: one tensor of
    the stack's shape for each name in `buffers`, in float32 (float64 for such weights) or, with `moments: bf16`, in
    bf16. Gradients are clipped and have the same type. `flops` counts the operations for a matrix of rows x columns.
    """

    buffers: tuple[str, ...]
    update: Callable[[Tensor, Tensor, Mapping[str, Tensor], Any], Tensor]
    flops: Callable[[int, int], float] = lambda rows, columns: 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerSpec:
    """An optimizer that `optim.kind` can name: its keys, and its rule for matrices, if any.

    The test suites run it with the keys of `example`, which are those that `config` adds.
    """

    summary: str
    config: type[OptimConfig]
    matrices: MatrixRule | None = None
    example: Mapping[str, object] = field(default_factory=dict)


OPTIMIZERS = Registry[OptimizerSpec]("optim.kind", (__name__, "train.optim.muon"))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    """The configuration of AdamW for all weights.

    `offload`: true keeps the shard in host memory and updates it there by DeepSpeed's CPU Adam, `torch` by torch's.
    """

    offload: Literal[False, True, "torch"] = False


OPTIMIZERS.register("adamw", OptimizerSpec(summary="AdamW for all weights", config=AdamWConfig))

_ELEMENTWISE = ("embed_tokens", "lm_head", "score", "gate")


def is_updated_whole(name: str) -> bool:
    """Returns whether the rule for matrices updates a weight of two or three axes, by its name."""
    return not any(part in _ELEMENTWISE for part in name.split(".")[-2:])


def divide_matrices(stacks: Sequence[Stack], num_ranks: int) -> list[list[int]]:
    """Returns the number of matrices of each stack that each rank owns.

    Each rank owns an equal number of a stack. Those that are left go, the largest first, to the ranks that own the
    fewest elements; ranks are equal on all callers.
    """
    loads = [0] * num_ranks
    counts: list[list[int]] = [[]] * len(stacks)
    for index in sorted(range(len(stacks)), key=lambda index: -stacks[index][1] * stacks[index][2]):
        number, rows, columns = stacks[index]
        share, left = divmod(number, num_ranks)
        chosen = set(sorted(range(num_ranks), key=loads.__getitem__)[:left])
        counts[index] = [share + (rank in chosen) for rank in range(num_ranks)]
        loads = [load + count * rows * columns for load, count in zip(loads, counts[index], strict=True)]
    return counts


def most_owned(stacks: Sequence[Stack], num_ranks: int, size: Callable[[int, int], float]) -> float:
    """Returns the sum of the sizes of the matrices of the rank that owns most."""
    owned = divide_matrices(stacks, num_ranks)
    sizes = [size(rows, columns) for _, rows, columns in stacks]
    return max((sum(n * s for n, s in zip(rank, sizes, strict=True)) for rank in zip(*owned, strict=True)), default=0.0)
