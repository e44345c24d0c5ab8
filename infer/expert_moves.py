"""Moves the weights of routed experts between ranks, to the slots of a placement.

Shape legend: E experts, R ranks, K slots of a rank, C copies of an expert at most, N experts that are sent or arrive,
W numbers of an expert, S shared experts, M their columns, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from infer.placement import Experts, Placement, PlacementShape
from model.block import ExpertCopies, Moe
from model.config import ModelConfig
from model.transformer import Transformer, routers

Exchange = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
"""Sends rows of bytes in order, so many to each rank, and returns so many from each rank, in order."""


@torch.no_grad()
def place_experts(model: Transformer, before: Placement, after: Placement, rank: int, exchange: Exchange) -> None:
    """Moves the experts of all MoE layers, one layer after the other. All ranks of the experts call it.

    The dispatcher of the model must have the placement's number of slots before the next pass. Counts of tokens start
    again.
    """
    for layer in sorted(routers(model)):
        moe = model.block(layer).moe
        assert moe is not None
        before_RK = before.slots(layer)
        after_RK = after.slots(layer)
        if not np.array_equal(before_RK, after_RK):
            _move(moe, before_RK, after_RK, rank, exchange)
        num_shared = after.shape.num_experts - model.config.num_routed_experts
        moe.copies = _copies(after_RK, rank, num_shared, moe.gate.weight.device)


@torch.no_grad()
def route_shared_experts(model: Transformer) -> None:
    """Turns the shared experts of all MoE layers into routed ones, which follow the others on this rank."""
    config = model.config
    for layer in routers(model):
        moe = model.block(layer).moe
        assert moe is not None
        assert moe.shared_experts is not None
        # Columns of the network of all shared experts are those of one expert after the other: S experts of M columns.
        shape = (config.num_shared_experts, config.expert_intermediate_size, config.hidden_size)
        gate_SMD = moe.shared_experts.gate_proj.weight.view(shape)
        up_SMD = moe.shared_experts.up_proj.weight.view(shape)
        down_SDM = moe.shared_experts.down_proj.weight.T.reshape(shape).mT
        experts = moe.experts
        experts.gate_up_proj = nn.Parameter(torch.cat((experts.gate_up_proj, torch.cat((gate_SMD, up_SMD), 1))))
        experts.down_proj = nn.Parameter(torch.cat((experts.down_proj, down_SDM)))
        experts.experts = (*experts.experts, *_shared_numbers(config))
        moe.shared_experts = None


def loaded_placement(config: ModelConfig, held: Sequence[Sequence[int]], after: PlacementShape) -> Placement:
    """Returns the placement before the first one, given the routed experts that each rank has loaded.

    Each rank also has the shared experts, if those are placed.
    """
    shared = _shared_numbers(config) if after.num_experts > config.num_routed_experts else ()
    slots_S = np.array([expert for experts in held for expert in (*experts, *shared)])
    shape = replace(after, num_groups=1, num_nodes=1, policy="global", num_redundant=len(slots_S) - after.num_experts)
    return Placement(shape=shape, layers=dict.fromkeys(range(config.num_layers + config.mtp_depth), slots_S))


def _shared_numbers(config: ModelConfig) -> range:
    return range(config.num_routed_experts, config.num_routed_experts + config.num_shared_experts)


def expert_loads(model: Transformer) -> dict[int, Tensor]:
    """Returns the tokens of each expert on this rank since the experts were placed, by layer."""
    copies = {layer: moe.copies for layer in sorted(routers(model)) if (moe := model.block(layer).moe) is not None}
    return {layer: table.load_E for layer, table in copies.items() if table is not None}


def _copies(experts_RK: Experts, rank: int, num_shared: int, device: torch.device) -> ExpertCopies:
    """Returns the slots of each expert. Rows of experts with fewer copies repeat the first slot."""
    slots = [np.flatnonzero(experts_RK.ravel() == expert) for expert in range(int(experts_RK.max()) + 1)]
    widest = max(map(len, slots))
    slots_EC = np.stack([np.pad(slots_C, (0, widest - len(slots_C)), constant_values=slots_C[0]) for slots_C in slots])
    return ExpertCopies(
        slots_EC=torch.from_numpy(slots_EC).to(device),
        copies_E=torch.tensor([len(slots_C) for slots_C in slots], device=device),
        load_E=torch.zeros(len(slots), dtype=torch.int64, device=device),
        first=rank,
        num_shared=num_shared,
    )


def _move(moe: Moe, before_RK: Experts, after_RK: Experts, rank: int, exchange: Exchange) -> None:
    """Replaces this rank's experts of a layer. The first rank that has one sends it to others."""
    experts = moe.experts
    first_with_E = [int((before_RK == expert).any(1).argmax()) for expert in range(int(before_RK.max()) + 1)]
    source_RK = np.array(
        [
            [number if expert in before_K else first_with_E[expert] for expert in after_K]
            for number, (before_K, after_K) in enumerate(zip(before_RK.tolist(), after_RK.tolist(), strict=True))
        ]
    )
    # The indices of the experts that this rank sends, by destination, then by slot there: N.
    index = {expert: position for position, expert in enumerate(before_RK[rank].tolist())}
    sent_N = torch.tensor([index[expert] for expert in after_RK[source_RK == rank].tolist()], dtype=torch.int64)
    sent_N = sent_N.to(experts.down_proj.device)
    parts = (experts.gate_up_proj, experts.down_proj)
    rows_NW = torch.cat([weights[sent_N].flatten(1) for weights in parts], 1)
    sent_counts = (source_RK == rank).sum(1).tolist()
    source_K = source_RK[rank]
    arrived_NB = exchange(
        rows_NW.view(torch.uint8), sent_counts, np.bincount(source_K, minlength=len(after_RK)).tolist()
    )
    # They arrive by source, then by slot.
    order_K = torch.from_numpy(np.argsort(source_K, kind="stable")).argsort().to(arrived_NB.device)
    widths = [weights[0].numel() for weights in parts]
    gate_up, down = arrived_NB.view(rows_NW.dtype)[order_K].split(widths, 1)
    for name, weights, moved in zip(("gate_up_proj", "down_proj"), parts, (gate_up, down), strict=True):
        shape = (len(order_K), *weights.shape[1:])
        setattr(experts, name, nn.Parameter(moved.reshape(shape), requires_grad=weights.requires_grad))
    experts.experts = tuple(after_RK[rank].tolist())
