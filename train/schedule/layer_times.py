"""Computes the costs of pipeline stages from the times of the model's parts. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace

from dualpipe.simulate.costs import CostModel, StageCosts
from model.config import cut_layers
from train.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """The seconds of one micro-batch in one part of the model, with computation and exchange separate."""

    forward: float = 0.0
    backward_input: float = 0.0
    backward_weight: float = 0.0
    forward_exchange: float = 0.0
    backward_exchange: float = 0.0

    def __add__(self, other: "PartTimes") -> "PartTimes":
        """Returns the times of both parts, one after the other."""
        return part_times(sum(both) for both in zip(astuple(self), astuple(other), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """The times of a dense layer, a MoE layer, the embedding, and the heads with all MTP modules.

    Times of a kind of layer that the model does not have are 0. `latency` is the time in seconds that an activation
    takes from one pipeline rank to the next; it is 0 if the pipeline has one rank.
    """

    dense: PartTimes
    moe: PartTimes
    embedding: PartTimes
    head: PartTimes
    latency: float


def stage_costs(times: LayerTimes, config: TrainConfig, num_stages: int) -> CostModel:
    """Returns the costs of each stage of the run's model, in seconds.

    Activations are in units of model/P: each of P equal stages keeps 1. MTP modules count as layers. If groups run
    sequentially, the time of an exchange is added to computation, because nothing hides it. Copies to host memory are
    not measured: they take the configured multiple of computation.

    Args:
        times: of the model's parts.
        config: of the run.
        num_stages: number of stages of the model.
    """
    model = config.model
    weight_of_all = model.num_layers + model.mtp_depth
    stages = []
    for stage, layers in enumerate(cut_layers(model.num_layers, num_stages, model.mtp_depth)):
        is_last = stage == num_stages - 1
        parts = [times.dense if layer < model.num_dense_layers else times.moe for layer in layers]
        parts += [times.embedding] * (stage == 0) + [times.head] * is_last
        share = config.parallelism.pipeline * (len(layers) + model.mtp_depth * is_last) / weight_of_all
        hides_exchange = config.schedule.pairing == "overlapped"
        stages.append(_stage_costs(sum(parts, PartTimes()), share, hides_exchange=hides_exchange))
    return CostModel(stages=_with_copies(stages, config), latency=times.latency)


def _with_copies(stages: Sequence[StageCosts], config: TrainConfig) -> tuple[StageCosts, ...]:
    """Returns the stages with the time of a copy to host memory, in the configured ratio to computation."""
    costs = config.costs
    if costs.offload is None:
        return tuple(stages)
    measured = sum(stage.forward + stage.backward_input + stage.backward_weight for stage in stages)
    unit = measured / config.parallelism.pipeline / (costs.forward + costs.backward_input + costs.backward_weight)
    return tuple(replace(stage, offload=unit * costs.offload * stage.activation) for stage in stages)


def _stage_costs(times: PartTimes, activation: float, *, hides_exchange: bool) -> StageCosts:
    return StageCosts(
        forward=times.forward + (0.0 if hides_exchange else times.forward_exchange),
        backward_input=times.backward_input + (0.0 if hides_exchange else times.backward_exchange),
        backward_weight=times.backward_weight,
        forward_exchange=times.forward_exchange if hides_exchange else 0.0,
        backward_exchange=times.backward_exchange if hides_exchange else 0.0,
        activation=activation,
    )


def part_times(seconds: Iterable[float]) -> PartTimes:
    """Builds `PartTimes` from the values of its fields, in order."""
    names = [field.name for field in fields(PartTimes)]
    return PartTimes(**dict(zip(names, seconds, strict=True)))
