"""Computes a fingerprint of the weights, so that rollouts of other weights are noticed.

It reads some elements of each tensor and depends on their bits, not on the layout.
"""

import hashlib

import torch
from torch import Tensor
from torch import distributed as dist

from model.transformer import named_tensors
from train.replica import Replica

_ELEMENTS = 1024
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(replica: Replica) -> str:
    """Returns the fingerprint of the weights of the whole network. All ranks call it.

    Args:
        replica: the network, after all updates of its weights.
    """
    world = replica.world
    own = {name: _sum_of_bits(tensor) for name, tensor in named_tensors(replica.model).items()}
    found: list[dict[str, int]] = [own] * len(world.ranks)
    with world.log.collective("world", world.groups.world, "fingerprint of the weights"):
        dist.all_gather_object(found, own, group=world.groups.world)
    sums = {name: value for each in found for name, value in each.items()}
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def _sum_of_bits(tensor: Tensor) -> int:
    """Returns a sum of the bits of evenly spaced elements, each times its odd position, modulo 2^64."""
    flat = tensor.detach().flatten()
    chosen = flat[:: max(1, len(flat) // _ELEMENTS)].contiguous()
    if chosen.element_size() > 1:
        chosen = chosen.view(_INTEGERS[chosen.element_size()])
    factors = torch.arange(len(chosen), device=chosen.device) * 2 + 1
    return int((chosen.to(torch.int64) * factors).sum())  # host sync
