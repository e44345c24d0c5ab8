"""A rank's parameters as the optimiser groups them, and who else holds them."""

from dataclasses import dataclass

from torch import nn
from torch.distributed import ProcessGroup

from model.experts import RoutedExperts
from model.transformer import Transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Replicas:
    """Process groups over which gradients are summed and optimiser state is sharded.

    dense: ranks that hold the same stages (mirror x data). experts: of those, the ones that hold the
    same routed experts. expert: the ranks that share out the experts of one data replica. world: all.
    """

    dense: ProcessGroup
    experts: ProcessGroup
    expert: ProcessGroup
    world: ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroups:
    """Named parameters: matrices, vectors (norms: no weight decay), routed experts; in one order on all replicas."""

    matrices: dict[str, nn.Parameter]
    vectors: dict[str, nn.Parameter]
    experts: dict[str, nn.Parameter]

    def all(self) -> dict[str, nn.Parameter]:
        """All of them."""
        return self.matrices | self.vectors | self.experts


def group_parameters(model: Transformer) -> ParameterGroups:
    """Sorts a model's parameters into groups."""
    routed = {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for name, parameter in module.named_parameters()
    }
    dense = {name: parameter for name, parameter in model.named_parameters() if name not in routed}
    return ParameterGroups(
        matrices={name: parameter for name, parameter in dense.items() if parameter.ndim > 1},
        vectors={name: parameter for name, parameter in dense.items() if parameter.ndim == 1},
        experts=routed,
    )
