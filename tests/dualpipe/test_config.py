"""Costs of stages as the command reads them: factors, costs by name, and any other number of stages."""

from typing import Any

import pytest

from dualpipe.config import ModelCosts, StageEntry
from dualpipe.ir import ScheduleError
from dualpipe.simulate.costs import uniform


def model_costs(*stages: Any, weights: float = 0.0, offload: float | None = None) -> ModelCosts:
    """Returns costs whose stages are written as in YAML."""
    entries = tuple(map(StageEntry.from_plain, stages))
    return ModelCosts(
        forward=1,
        backward_input=2,
        backward_weight=3,
        exchange=4,
        latency=0.5,
        offload=offload,
        stages=entries,
        weights=weights,
    )


def test_stages_share_the_time_of_a_copy_to_host_memory() -> None:
    assert [stage.offload for stage in model_costs(1, 2, offload=3).of_stages(2, 2).stages] == [3, 6]
    assert [stage.offload for stage in model_costs(1, 2, offload=3).of_stages(2, 4).stages] == [1.5, 1.5, 3, 3]
    assert not model_costs(1, 2).of_stages(2, 4).can_offload


@pytest.mark.parametrize("num_stages", [4, 8, 12])
def test_stages_without_entries_are_equal(num_stages: int) -> None:
    costs = model_costs()
    assert costs.of_stages(4, num_stages) == uniform(costs, 4, num_stages)
    assert model_costs(1, 1, 1, 1).of_stages(4, 4) == costs.of_stages(4, 4)


def test_stage_with_a_factor_scales_every_cost() -> None:
    first, last = model_costs(1, 1.5).of_stages(2, 2).stages
    assert last.forward == 1.5 * first.forward == 1.5
    assert last.backward_weight == 4.5
    assert last.forward_exchange == last.backward_exchange == 6
    assert last.activation == 1.5


def test_stage_with_named_costs_keeps_the_others() -> None:
    first, last = model_costs(1, {"forward": 7, "activation": 0}).of_stages(2, 2).stages
    assert (last.forward, last.activation) == (7, 0)
    assert last.backward_input == first.backward_input


def test_stages_of_another_number_are_parts_of_the_same_model() -> None:
    costs = model_costs(1, 1, 1, 3)
    for num_stages in (2, 4, 8):
        stages = costs.of_stages(2, num_stages).stages
        assert len(stages) == num_stages
        assert sum(stage.forward for stage in stages) == pytest.approx(sum((0.5, 0.5, 0.5, 1.5)))
        assert sum(stage.activation for stage in stages) == pytest.approx(3)
    assert [stage.forward for stage in costs.of_stages(2, 2).stages] == [1, 2]


@pytest.mark.parametrize("value", [1.5, {"forward": 2.0}, {"activation": 0.5, "forward_exchange": 0.0}])
def test_stage_entry_is_written_as_it_is_read(value: Any) -> None:
    assert StageEntry.from_plain(value).to_plain() == value


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (-1, ["a number, or costs by name", "at least 0", "-1"]),
        ("fast", ["'fast'"]),
        (True, ["True"]),
        (float("nan"), ["nan"]),
        ([1], ["[1]"]),
        ({"forwards": 1}, ["forwards", "nearest: forward,"]),
        ({"forward": None}, ["forward must be a number", "None"]),
    ],
)
def test_stage_entry_rejects(value: Any, parts: list[str]) -> None:
    with pytest.raises(ScheduleError) as refused:
        StageEntry.from_plain(value)
    for part in parts:
        assert part in str(refused.value)


def test_number_of_stages_must_be_a_multiple_of_the_ranks() -> None:
    with pytest.raises(
        ScheduleError, match=r"costs.stages: .*multiple of num_ranks=4, has 6; nearest: 4 or 8, or \[\]"
    ):
        model_costs(*[1] * 6).of_stages(4, 4)
