"""Weights of every rank by formula against models built on the meta device."""

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from launch.config.run_config import compose_run
from model.config import cut_layers
from model.size import held_parameters, stage_shapes
from model.transformer import Part, Transformer


@pytest.mark.parametrize(
    ("name", "pipeline", "expert"), [("quickstart", 2, 2), ("moonlight_16b", 4, 8), ("v3_671b", 16, 64)]
)
def test_weights_of_a_rank_are_those_of_the_built_model(name: str, pipeline: int, expert: int) -> None:
    config = compose_run([f"model={name}"]).model
    shapes = stage_shapes(cut_layers(config.num_layers, pipeline, config.mtp_depth))
    for rank in {0, pipeline // 2}:
        stages = sorted({rank, pipeline - 1 - rank})
        held = held_parameters(config, [shapes[stage] for stage in stages], config.num_routed_experts // expert)
        layers = [layer for stage in stages for layer in shapes[stage].layers]
        has_ends = pipeline - 1 in stages
        layers += range(config.num_layers, config.num_layers + config.mtp_depth) if has_ends else ()
        part = Part(
            layers=tuple(layers),
            experts=range(config.num_routed_experts // expert),
            embedding=has_ends,
            head=has_ends,
        )
        with torch.device("meta"):
            model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.bfloat16, part)
        assert held.total == sum(parameter.numel() for parameter in model.parameters()), (name, rank)


def test_deepseek_v3_on_2048_ranks() -> None:
    config = compose_run(["model=v3_671b"]).model
    shapes = stage_shapes(cut_layers(config.num_layers, 16, config.mtp_depth))
    ends, middle = ([shapes[stage] for stage in stages] for stages in ((0, 15), (7, 8)))
    assert held_parameters(config, ends, 4).total == 5_343_227_904
    assert held_parameters(config, middle, 4).total == 3_273_261_056
