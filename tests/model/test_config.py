"""Laws of cutting layers into stages."""

import pytest

from model.config import CutError, cut_layers


def test_cut_covers_every_layer_once_in_order() -> None:
    for layers in range(1, 24):
        for stages in range(1, layers + 1):
            for depth in range(3):
                cut = cut_layers(layers, stages, depth)
                assert [layer for stage in cut for layer in stage] == list(range(layers))
                assert all(cut)
                sizes = [len(stage) for stage in cut]
                assert stages == 1 or max(sizes[:-1]) - min(sizes[:-1]) <= 1


def test_cut_refuses_fewer_layers_than_stages() -> None:
    with pytest.raises(CutError, match=r"model\.num_layers.*3 layers.*4 pipeline stages"):
        cut_layers(3, 4)


def test_cut_names_the_nearest_pipeline_of_two_stages_a_rank() -> None:
    with pytest.raises(CutError, match=r"7 layers.*8 pipeline stages.*num_layers=8 or parallelism\.pipeline=3$"):
        cut_layers(7, 8, stages_per_rank=2)
    with pytest.raises(CutError, match=r"nearest valid: model\.num_layers=2$"):
        cut_layers(1, 2, stages_per_rank=2)
