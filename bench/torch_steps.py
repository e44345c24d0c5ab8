"""Compares schedules over torch's stages with one process: `python -m bench.torch_steps`.

Prints a line for each kind and size: the largest relative error of a gradient, with the operations of a group in turn
and in threads. Ranks are local processes on gloo, in float64. `sizes=2,4` selects numbers of ranks.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from base.figures import aligned
from dualpipe.api import build
from dualpipe.ir import Schedule, from_json, to_json
from dualpipe.passes import merge_backwards
from dualpipe.registry import SCHEDULES
from dualpipe.runtime.torch import DualPipeStep, Kept, in_threads
from tests.ranks import run_ranks

HIDDEN, TOKENS = 16, 6
CHUNKS = {"dualpipe_interleaved": (2, 3), "interleaved_1f1b": (2,)}
mse = nn.functional.mse_loss


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest errors of one run against one process, relative to the largest value."""

    gradient: float
    norm: float
    loss: float


class Block(nn.Module):
    """Attention with a residual. With slices, it keeps keys and values for later slices of the sequence."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        torch.manual_seed(stage)
        self.norm, self.qkv = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out, self.up = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.double()

    def forward(self, x_BTD: Tensor, *, past: tuple[Tensor, ...] = ()) -> Tensor:
        query, *both = self.qkv(self.norm(x_BTD)).chunk(3, -1)
        late: tuple[list[Tensor], list[Tensor]] = [], []
        both = [Kept.apply(value, gradients) for value, gradients in zip(both, late, strict=True)]
        self.kept = list(zip(both, late, strict=True))
        keys, values = (torch.cat([*past[which::2], both[which]], 1) for which in (0, 1))
        mask = torch.ones(x_BTD.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - x_BTD.shape[1])
        x_BTD = x_BTD + self.out(nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask))
        return self.up(torch.tanh(x_BTD))


def orders_of(size: int) -> dict[str, Schedule]:
    """Returns schedules by name: every kind that the size allows, with chunks, merged backwards and slices."""
    odd = size % 2
    orders = {}
    for kind, spec in SCHEDULES.items():
        count = 3 * size + odd if odd else 2 * size + 2
        for chunks in CHUNKS.get(kind, (None,)):
            if spec.limit(size, count) is None:
                name = kind if chunks is None else f"{kind} x {chunks}"
                orders[name] = build(kind, ranks=size, micro_batches=count, chunks=chunks, exchange=0.5).schedule
    merged = build("dualpipe_split", ranks=size, micro_batches=2 * size, exchange=0.5).schedule
    orders["dualpipe_split, merged"] = merge_backwards(merged)
    for kind, slices in (("1f1b", 2), ("dualpipe_split", 3), ("dualpipe_interleaved", 2)):
        sliced = build(kind, ranks=size, micro_batches=2 * size * slices, slices=slices, exchange=0.5)
        orders[f"{kind}, {slices} slices"] = sliced.schedule
    return orders


def errors_of(schedule: Schedule, *, in_turn: bool, group: Any = None, mesh: Any = None) -> Errors:
    """Runs two steps and an evaluation of this rank's stages, and compares the second step with one process."""
    slices, count = schedule.slices, schedule.num_micro_batches
    sequences = count // slices
    values = torch.randn(
        2, sequences, 2, TOKENS * slices, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    whole = nn.Sequential(*map(Block, range(schedule.num_stages)))
    losses = [mse(whole(inputs), wanted) for inputs, wanted in zip(*values, strict=True)]
    (sum(losses) / sequences).backward()  # type: ignore[union-attr]
    rank = distributed.get_rank(group)
    modules = {stage: Block(stage) for _, stage in schedule.stages_of(rank)}
    for module in modules.values() if mesh else ():
        fully_shard(module, mesh=mesh)
    held = {key: modules[key[1]] for key in schedule.stages_of(rank)}
    for (direction, stage), module in held.items():
        if direction == 1 and schedule.rank_of(0, stage) != rank:
            nn.init.zeros_(_local(module.up.bias))  # until the copies are broadcast
    # Two copies of a stage on one rank share their gradients, so threads may not run them at once.
    is_shared = len(modules) < len(held)
    overlap = None if in_turn or is_shared else in_threads
    step = DualPipeStep(to_json(schedule), held, mse, group=group, overlap=overlap)
    step.broadcast_copies()
    inputs, wanted = (torch.cat([part for value in side for part in value.chunk(slices, 1)]) for side in values)
    step.eval(inputs, target=wanted)
    found: list[Tensor] = []
    for _ in range(2):
        for module in modules.values():
            module.zero_grad()
        step.step(inputs, target=wanted, losses=found)
    pairs = [
        (_whole(mine.grad), _whole(theirs.grad))
        for stage, module in modules.items()
        for mine, theirs in zip(module.parameters(), whole[stage].parameters(), strict=True)
    ]
    expected = torch.stack([weight.grad.square().sum() for weight in whole.parameters()]).sum().sqrt()  # type: ignore[union-attr]
    parts = torch.stack([loss.detach() for loss in losses])
    held_losses = torch.stack(found).view(-1, slices).mean(1) if found else parts
    wanted_losses = _of_directions(schedule, parts, rank) if found else parts
    return Errors(
        gradient=max(float((mine - theirs).abs().max() / theirs.abs().max()) for mine, theirs in pairs),
        norm=abs(float(step.gradient_norm() / expected) - 1),
        loss=float((held_losses - wanted_losses).abs().max()),
    )


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _of_directions(schedule: Schedule, losses: Tensor, rank: int) -> Tensor:
    """Returns the losses of the directions with a last stage on this rank."""
    first = len(schedule.micro_batches_of(0)) // schedule.slices
    last = schedule.num_stages - 1
    sides = (losses[:first], losses[first:])
    return torch.cat([side for direction, side in enumerate(sides) if (direction, last) in schedule.stages_of(rank)])


def compare(rank: int, world_size: int, orders: list[str]) -> list[tuple[Errors, Errors]]:
    """Returns the errors of each schedule, in turn and in threads."""
    read = [from_json(order) for order in orders]
    return [(errors_of(order, in_turn=True), errors_of(order, in_turn=False)) for order in read]


def compare_sharded(rank: int, world_size: int, orders: list[str]) -> list[Errors]:
    """Returns the errors of schedules for half of the ranks, with FSDP over pairs of ranks."""
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("pipeline", "data"))
    group = mesh["pipeline"].get_group()
    return [errors_of(from_json(order), in_turn=True, group=group, mesh=mesh["data"]) for order in orders]


def main(arguments: Sequence[str]) -> int:
    sizes = [int(size) for text in arguments for size in text.removeprefix("sizes=").split(",")] or [1, 2, 3, 4, 5]
    rows = [["kind", "P", "M", "stages", "groups of several", "gradient, in turn", "in threads", "norm", "loss"]]
    for size in sizes:
        orders = orders_of(size)
        ranks = run_ranks(size, compare, [to_json(order) for order in orders.values()], timeout_seconds=600)
        for index, (name, order) in enumerate(orders.items()):
            both = [[rank[index][way] for rank in ranks] for way in (0, 1)]
            several = sum(len(group) > 1 for groups in order.ranks for group in groups)
            worst = [max(errors.gradient for errors in way) for way in both]
            others = [max(getattr(errors, name) for way in both for errors in way) for name in ("norm", "loss")]
            numbers = [size, order.num_micro_batches, order.num_stages, several]
            rows.append([name, *map(str, numbers), *(f"{value:.1e}" for value in (*worst, *others))])
    print("\n".join(aligned(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
