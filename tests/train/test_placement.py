"""Which pipeline ranks hold the same parameters, for any placement."""

import pytest

from dualpipe.ir import Placement, Schedule, ScheduleError, mirrored_placement, straight_placement, v_placement
from train.schedule.placement import embedding_ranks, is_mirrored


def placed(placement: Placement, num_ranks: int) -> Schedule:
    return Schedule(kind="any", num_ranks=num_ranks, num_micro_batches=2, placement=placement, ranks=((),) * num_ranks)


@pytest.mark.parametrize("num_ranks", range(1, 6))
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_mirror_pairs_hold_the_same_stages_for_any_number_of_chunks(num_ranks: int, chunks: int) -> None:
    schedule = placed(mirrored_placement(num_ranks, chunks), num_ranks)
    assert is_mirrored(schedule)
    held = [{stage for _, stage in schedule.stages_of(rank)} for rank in range(num_ranks)]
    assert held == held[::-1]
    assert not is_mirrored(placed(straight_placement(num_ranks, chunks), num_ranks))


@pytest.mark.parametrize("up", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_is_mirrored_rejects_directions_that_share_stages_otherwise(up: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match="rank P-1-r"):
        is_mirrored(placed(((0, 1, 2), up), 3))


@pytest.mark.parametrize(
    ("placement", "num_ranks", "without_mtp", "with_mtp"),
    [
        (straight_placement(1), 1, (0,), (0,)),
        (straight_placement(4), 4, (0,), (0, 3)),
        (straight_placement(4, 2), 4, (0,), (0, 3)),
        (v_placement(4), 4, (0,), (0,)),
        (mirrored_placement(4), 4, (0, 3), (0, 3)),
        (mirrored_placement(3, 2), 3, (0, 2), (0, 2)),
        (((1, 0, 2, 3), (2, 3, 1, 0)), 4, (1, 2), (0, 1, 2, 3)),
    ],
)
def test_embedding_is_on_the_first_stage_and_with_mtp_on_the_last(
    placement: Placement, num_ranks: int, without_mtp: tuple[int, ...], with_mtp: tuple[int, ...]
) -> None:
    schedule = placed(placement, num_ranks)
    assert embedding_ranks(schedule, 0) == without_mtp
    assert embedding_ranks(schedule, 2) == with_mtp
