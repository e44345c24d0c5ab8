"""Balances experts: sums the loads of a step, updates the router bias, and writes `loads.jsonl`.

Shape legend: L layers with routers, in order; E experts; S statistics of a bias (minimum, maximum, standard deviation);
V = E + S.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from model.transformer import routers
from train.replica import Replica

_BIAS = ("bias_least", "bias_most", "bias_std")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Balance:
    """The loads and biases of all routers after a step's update, equal on all ranks.

    `layers` has MTP modules last. `load_LE` are tokens of the step, and `bias_LS` are minimum, maximum and deviation of
    the new biases. Both are float64 on the host.
    """

    layers: Sequence[int]
    load_LE: Tensor
    bias_LS: Tensor

    @property
    def violations(self) -> list[float]:
        """MaxVio of each layer: its largest load divided by the mean load, minus 1."""
        found: list[float] = (self.load_LE.amax(1) / self.load_LE.mean(1) - 1).tolist() if self.layers else []
        return found

    def metrics(self) -> dict[str, object]:
        """Returns `max_violation` of the worst layer and, under `router`, the values and bias of each layer."""
        return {
            "max_violation": max(self.violations, default=0.0),
            "router": {
                f"layer_{layer}": {"max_violation": violation, **dict(zip(_BIAS, bias, strict=True))}
                for layer, violation, bias in zip(self.layers, self.violations, self.bias_LS.tolist(), strict=True)
            },
        }

    def loads(self) -> dict[str, list[int]]:
        """Returns the tokens per expert of each layer."""
        rows = self.load_LE.to(torch.int64).tolist()
        return {f"layer_{layer}": row for layer, row in zip(self.layers, rows, strict=True)}


def update_router_bias(replica: Replica, rate: float) -> Balance:
    """Updates every router's bias by `rate` for the load of the whole global batch. All ranks call it."""
    world = replica.world
    shape = replica.config.model
    gates = routers(replica.network)
    # MTP modules are counted after the main layers.
    layers = range(shape.num_dense_layers, shape.num_layers + shape.mtp_depth)
    rows = [layers.index(layer) for layer in gates]
    load_LE = torch.zeros(len(layers), shape.num_routed_experts, dtype=torch.int64, device=world.device)
    # Rows of layers that this rank does not hold stay -inf, so a maximum over all ranks fills every row.
    bias_LS = torch.full((len(layers), len(_BIAS)), -torch.inf, dtype=torch.float64, device=world.device)
    if gates:
        load_LE[rows] = torch.stack([gate.load for gate in gates.values()])
    # A sum over all ranks, because the process group of the stages may still be gathering weights.
    load_LE = world.reduce(load_LE, "sum of router loads")
    if gates:
        for gate, load_E in zip(gates.values(), load_LE[rows].to(world.device), strict=True):
            gate.update_bias(load_E, rate)
            gate.load.zero_()
        bias_LE = torch.stack([gate.e_score_correction_bias for gate in gates.values()]).double()
        bias_LS[rows] = torch.stack([bias_LE.amin(1), bias_LE.amax(1), bias_LE.std(1, correction=0)], dim=1)
    bias_LS = world.reduce(bias_LS, "router biases of all layers", dist.ReduceOp.MAX)
    return Balance(layers=layers, load_LE=load_LE.double(), bias_LS=bias_LS)
