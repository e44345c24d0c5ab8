"""Costs of stages: the same model cut into another number of stages."""

import pytest

from dualpipe.simulate.costs import CostModel, StageCosts, resampled

NAMES = ("forward", "backward_input", "backward_weight", "forward_exchange", "backward_exchange", "activation")


def model_of(num_stages: int) -> CostModel:
    """Returns stages of which each costs more than the one before."""
    stages = (StageCosts(**dict.fromkeys(NAMES, 1.0 + stage)) for stage in range(num_stages))
    return CostModel(stages=tuple(stages), latency=0.5)


@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (4, 4), (4, 6), (6, 4)])
def test_resampled_costs_are_those_of_the_same_model(old: int, new: int) -> None:
    before, after = model_of(old), resampled(model_of(old), new)
    assert len(after.stages) == new
    assert after.latency == before.latency
    for name in NAMES:
        total = sum(getattr(stage, name) for stage in before.stages)
        assert sum(getattr(stage, name) for stage in after.stages) == pytest.approx(total)
    assert [stage.forward for stage in after.stages] == sorted(stage.forward for stage in after.stages)


def test_resampled_costs_halve_and_add_whole_stages() -> None:
    assert [stage.forward for stage in resampled(model_of(2), 4).stages] == [0.5, 0.5, 1.0, 1.0]
    assert [stage.forward for stage in resampled(model_of(4), 2).stages] == [3.0, 7.0]
