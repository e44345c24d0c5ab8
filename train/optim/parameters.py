"""Groups a rank's parameters for the optimizer by the process group that holds the same ones."""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model.experts import RoutedExperts
from model.transformer import Transformer
from train.checkpoint.state import Slice

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReductionGroups:
    """The process groups over which gradients are summed and optimizer state is sharded.

    Attributes:
        dense: ranks that hold the same stages (mirror x data).
        embedding: ranks that hold the embedding, if MTP modules on ranks with other stages hold a copy; else `dense`.
        experts: the ranks of `dense` that hold the same routed experts.
        expert: ranks over which the experts of one data replica are sharded.
        world: all ranks.
    """

    dense: ProcessGroup
    embedding: ProcessGroup
    experts: ProcessGroup
    expert: ProcessGroup
    world: ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroups:
    """The parameters of a rank by name and group, in the same order on all replicas.

    Attributes:
        matrices: matrices outside routed experts, without those in `embedding`.
        embedding: the embedding, if ranks with other stages hold a copy; otherwise it is one of `matrices`.
        vectors: weights of norms, which have no weight decay.
        experts: stacked weights of routed experts.
        held: the routed experts of every layer that are stacked in `experts`.
        num_experts: routed experts of a layer in the whole job.
    """

    matrices: dict[str, nn.Parameter]
    embedding: dict[str, nn.Parameter]
    vectors: dict[str, nn.Parameter]
    experts: dict[str, nn.Parameter]
    held: range
    num_experts: int

    def all(self) -> dict[str, nn.Parameter]:
        """Returns all parameters by name."""
        return self.matrices | self.embedding | self.vectors | self.experts

    def place(self, name: str, first: int, values: Tensor) -> Slice:
        """Returns values for consecutive elements of a parameter as a slice of the whole job's parameter.

        Args:
            name: of the parameter.
            first: index, in this rank's parameter, of the element of the first value.
            values: flat tensor with one value for each of the consecutive elements.
        """
        num_elements = self.all()[name].numel()
        if name not in self.experts:
            return Slice(num_elements, first, values)
        size = num_elements // len(self.held)
        return Slice(size * self.num_experts, size * self.held.start + first, values)


def group_parameters(model: Transformer, *, shares_embedding: bool) -> ParameterGroups:
    """Sorts a model's parameters into groups.

    Args:
        model: this rank's part.
        shares_embedding: whether ranks with other stages hold a copy of this rank's embedding.
    """
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, RoutedExperts)}
    routed = {
        f"{path}.{name}": parameter for path, module in stacks.items() for name, parameter in module.named_parameters()
    }
    dense = {name: parameter for name, parameter in model.named_parameters() if name not in routed}
    shared = {EMBEDDING: dense.pop(EMBEDDING)} if shares_embedding and EMBEDDING in dense else {}
    return ParameterGroups(
        matrices={name: parameter for name, parameter in dense.items() if parameter.ndim > 1},
        embedding=shared,
        vectors={name: parameter for name, parameter in dense.items() if parameter.ndim == 1},
        experts=routed,
        held=next((module.experts for module in stacks.values()), range(0)),
        num_experts=model.config.num_routed_experts,
    )
