"""Laws of cutting layers into stages."""

import pytest

from model.cut import CutError, cut_layers


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
