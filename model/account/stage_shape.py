"""Which part of the model a stage is. No torch here."""

from dataclasses import dataclass

from model.config import ModelConfig, cut_layers


@dataclass(frozen=True, kw_only=True, slots=True)
class StageShape:
    """The layers of a stage, and whether the embedding or the heads are in it."""

    layers: range
    is_first: bool
    is_last: bool


def stage_shapes(config: ModelConfig, num_stages: int) -> tuple[StageShape, ...]:
    """Returns the stages that the model is cut into.

    Raises:
        CutError: fewer layers than stages.
    """
    cut = cut_layers(config.num_layers, num_stages, config.mtp_depth)
    return tuple(
        StageShape(layers=layers, is_first=number == 0, is_last=number == num_stages - 1)
        for number, layers in enumerate(cut)
    )
