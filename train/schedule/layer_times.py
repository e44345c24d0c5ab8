"""Computes the costs of stages from measured or estimated times of the model's parts. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace

from dualpipe.simulate.costs import CostModel, StageCosts
from kernels.ranges import NonNegativeFloat
from model.size import count_work
from train.config import TrainConfig
from train.schedule.stage_work import LaneWork, ModelWork


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """The seconds of one micro-batch in one part of the model, with computation and exchange separate."""

    forward: NonNegativeFloat = 0.0
    backward_input: NonNegativeFloat = 0.0
    backward_weight: NonNegativeFloat = 0.0
    forward_exchange: NonNegativeFloat = 0.0
    backward_exchange: NonNegativeFloat = 0.0

    def __add__(self, other: "PartTimes") -> "PartTimes":
        """Returns the times of both parts, one after the other."""
        return part_times(sum(both) for both in zip(astuple(self), astuple(other), strict=True))

    def __mul__(self, factor: float) -> "PartTimes":
        """Returns the times of several equal parts, or of a share of one."""
        return part_times(factor * seconds for seconds in astuple(self))

    def without_overlap(self) -> "PartTimes":
        """Returns the times if nothing hides the exchange, which then counts as computation."""
        return PartTimes(
            forward=self.forward + self.forward_exchange,
            backward_input=self.backward_input + self.backward_exchange,
            backward_weight=self.backward_weight,
        )

    @property
    def work(self) -> LaneWork:
        """Forward and backward together."""
        return LaneWork(
            self.forward + self.backward_input + self.backward_weight, self.forward_exchange + self.backward_exchange
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """The times of a model's parts: layers, embedding, main head, and all MTP modules with heads.

    Parts that the model does not have take 0 s, and so does `latency`, from a pipeline rank to the next, without one.
    """

    dense: PartTimes
    moe: PartTimes
    embedding: PartTimes
    head: PartTimes
    mtp: PartTimes
    latency: float


def nominal_times(config: TrainConfig) -> LayerTimes:
    """Returns the configured costs of all ranks, divided among the parts by estimated work.

    Exchange takes time only if experts are sharded, and only in MoE layers.
    """
    model = config.model
    costs = config.costs
    work = count_work(
        model,
        config.batch.sequence_length_tokens,
        is_fp8=config.precision.kind == "fp8",
        context=config.parallelism.context,
    )
    exchanging = model.num_layers - model.num_dense_layers + model.mtp_depth
    whole = config.parallelism.pipeline / work.total(model)
    exchange = 0.0
    if exchanging and config.parallelism.expert > 1:
        exchange = costs.exchange * config.parallelism.pipeline / exchanging

    def times(part: float, exchanges: int = 0) -> PartTimes:
        return PartTimes(
            forward=costs.forward * part * whole,
            backward_input=costs.backward_input * part * whole,
            backward_weight=costs.backward_weight * part * whole,
            forward_exchange=exchange * exchanges,
            backward_exchange=exchange * exchanges,
        )

    return LayerTimes(
        dense=times(work.dense),
        moe=times(work.moe, 1),
        embedding=times(work.embedding),
        head=times(work.head),
        mtp=times(work.mtp, model.mtp_depth),
        latency=costs.latency,
    )


def stage_costs(times: LayerTimes, config: TrainConfig, cut: Sequence[range]) -> CostModel:
    """Returns the costs of each stage of the run's model, in the unit of the times.

    Activations are in units of model/P: each of P equal stages keeps 1. MTP modules count as layers. If groups run
    sequentially, the time of an exchange is added to computation, because nothing hides it. Copies to host memory are
    not measured: they take the configured multiple of computation.
    """
    model = config.model
    weight_of_all = model.num_layers + model.mtp_depth
    stages = []
    for stage, layers in enumerate(cut):
        is_last = stage == len(cut) - 1
        parts = [times.dense if layer < model.num_dense_layers else times.moe for layer in layers]
        parts += [times.embedding] * (stage == 0) + [times.head, times.mtp] * is_last
        share = config.parallelism.pipeline * (len(layers) + model.mtp_depth * is_last) / weight_of_all
        whole = as_paired(sum(parts, PartTimes()), config)
        stages.append(
            StageCosts(
                forward=whole.forward,
                backward_input=whole.backward_input,
                backward_weight=whole.backward_weight,
                forward_exchange=whole.forward_exchange,
                backward_exchange=whole.backward_exchange,
                activation=share,
            )
        )
    return CostModel(stages=_with_copies(stages, config), latency=times.latency)


def _with_copies(stages: Sequence[StageCosts], config: TrainConfig) -> tuple[StageCosts, ...]:
    """Returns the stages with the time of a copy to host memory, in the configured ratio to computation."""
    costs = config.costs
    if costs.offload is None:
        return tuple(stages)
    measured = sum(stage.forward + stage.backward_input + stage.backward_weight for stage in stages)
    unit = measured / config.parallelism.pipeline / (costs.forward + costs.backward_input + costs.backward_weight)
    return tuple(replace(stage, offload=unit * costs.offload * stage.activation) for stage in stages)


def model_work(times: LayerTimes, config: TrainConfig) -> ModelWork:
    """Returns the work of the model's parts, by which a cut is balanced."""
    model = config.model
    return ModelWork(
        num_dense=model.num_dense_layers,
        num_moe=model.num_layers - model.num_dense_layers,
        embedding=as_paired(times.embedding, config).work,
        dense=as_paired(times.dense, config).work,
        moe=as_paired(times.moe, config).work,
        heads=as_paired(times.head + times.mtp, config).work,
    )


def as_paired(times: PartTimes, config: TrainConfig) -> PartTimes:
    """Returns the times of a part in groups of the run, in which exchange may count as computation."""
    return times if config.schedule.pairing == "overlapped" else times.without_overlap()


def part_times(seconds: Iterable[float]) -> PartTimes:
    """Builds `PartTimes` from the values of its fields, in order."""
    names = [field.name for field in fields(PartTimes)]
    return PartTimes(**dict(zip(names, seconds, strict=True)))
