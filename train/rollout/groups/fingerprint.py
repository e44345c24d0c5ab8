"""Computes a fingerprint of the weights, so that rollouts of other weights are noticed.

It reads some elements of each tensor and depends on their bits, not on the layout.

Shape legend: N tensors of the whole network.
"""

import hashlib

import torch
from torch import Tensor
from torch import distributed as dist

from model.hf.names import weights
from model.transformer import named_tensors
from train.replica import Replica

_ELEMENTS = 1024
_ABSENT = torch.iinfo(torch.int64).min
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(replica: Replica) -> str:
    """Returns the fingerprint of the weights of the whole network. All ranks call it.

    Args:
        replica: the network, after all updates of its weights.
    """
    world = replica.world
    names = [name for name, _ in weights(replica.config.model)]
    numbers = {name: number for number, name in enumerate(names)}
    # Replicas hold equal tensors, so the largest value is that of any rank that holds the tensor.
    sums_N = torch.full((len(names),), _ABSENT)
    for name, tensor in named_tensors(replica.model).items():
        sums_N[numbers[name]] = _sum_of_bits(tensor)
    sums_N = world.reduce(sums_N, "fingerprint of the weights", dist.ReduceOp.MAX)
    sums = {name: value for name, value in zip(names, sums_N.tolist(), strict=True) if value != _ABSENT}
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]


def _sum_of_bits(tensor: Tensor) -> int:
    """Returns a sum of the bits of evenly spaced elements, each times its odd position, modulo 2^64."""
    flat = tensor.detach().flatten()
    chosen = flat[:: max(1, len(flat) // _ELEMENTS)].contiguous()
    if chosen.element_size() > 1:
        chosen = chosen.view(_INTEGERS[chosen.element_size()])
    factors = torch.arange(len(chosen), device=chosen.device) * 2 + 1
    return int((chosen.to(torch.int64) * factors).sum())  # host sync
