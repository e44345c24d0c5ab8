"""A sample of the pairs of layouts; `make any-to-any` runs all of them."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import Cut, ParallelismConfig
from tests.dualpipe.random_schedules import bidirectional, looped, random_schedule
from tests.ranks import run_ranks
from tests.tiny import BATCH, OPTIM, TASK, tiny_config, write_text
from tests.train.any_to_any import (
    PLACES,
    TOLERANCE,
    Place,
    begin,
    compare,
    config_at,
    go_on,
    merged,
    worst_difference,
)
from train.config import PrecisionConfig


def check_pairs(folder: Path, pairs: Sequence[tuple[Place, Place]], num_layers: int) -> None:
    """Checks that each reading layout resumes from the checkpoint of its writing one as if uninterrupted."""
    seen = dict(compare(folder, pairs, steps_after=2, sequences=8, num_layers=num_layers))
    assert len(seen) == len(pairs)
    assert max(seen.values()) <= TOLERANCE, seen


@pytest.mark.slow
def test_any_to_any_sampled_pairs_resume_as_if_uninterrupted(folder: Path) -> None:
    """Among them two whose first and last stage, and so the embedding and its copy, are on different ranks."""
    one_direction, split, two_chunks = PLACES[3], PLACES[4], replace(PLACES[7], micro=1)
    check_pairs(folder, [(one_direction, two_chunks), (two_chunks, split)], num_layers=4)


@pytest.mark.long
def test_any_to_any_ranks_begin_and_cease_to_share_sequences(folder: Path) -> None:
    """From whole sequences, to groups of another size, and back, with other data and expert ranks."""
    two, four = Place(1, 1, 1, "1f1b", 2, context=2), Place(1, 1, 4, "1f1b", context=4)
    check_pairs(folder, [(PLACES[1], two), (two, four), (four, PLACES[0])], num_layers=4)


@pytest.mark.slow
def test_any_to_any_chunks_move_between_one_and_two_directions(folder: Path) -> None:
    """Two chunks for each rank: the same four stages are on one rank each, and then on both."""
    config = config_at(folder, Place(2, 1, 1, "chunks", 2), steps_after=2, sequences=8, num_layers=4)
    schedules = [random_schedule(placement, 4, 0) for placement in (looped(2, 2), bidirectional(2, 2))]
    for writer, reader in (schedules, schedules[::-1]):
        seen = [part for (part,) in run_ranks(2, begin, [config], writer)]
        uninterrupted = merged([part for _, part in seen])
        found = merged([part for (part,) in run_ranks(2, go_on, [(config, seen[0][0])], reader)])
        assert found.samples == uninterrupted.samples
        assert worst_difference(found, uninterrupted) <= TOLERANCE


@pytest.mark.exhaustive
def test_any_to_any_other_cut_resumes_as_if_uninterrupted(folder: Path) -> None:
    """With MTP. The second cut leaves only MTP and the heads in the last stage."""
    places = [Place(2, 1, 1, "dualpipe_split", cut=Cut("listed", sizes)) for sizes in ((3, 1), (4, 0))]
    write_text(folder / "cuts")
    check_pairs(folder / "cuts", [(places[0], places[1]), (places[1], places[0])], num_layers=4)


@pytest.mark.slow
@pytest.mark.parametrize("moments", [pytest.param("float32", marks=pytest.mark.exhaustive), "bf16"])
def test_any_to_any_sharded_bf16_state_moves_from_four_ranks_to_one_and_back(folder: Path, moments: str) -> None:
    configs = {
        size: tiny_config(
            folder,
            out_dir=str(folder / f"{moments}_{size}"),
            parallelism=ParallelismConfig(pipeline=max(size // 2, 1), data=min(size, 2), expert=min(size, 2)),
            batch=replace(BATCH, global_sequences=8, micro_sequences=2),
            task=replace(TASK, steps=4),
            precision=PrecisionConfig(kind="bf16"),
            optim=replace(OPTIM, sharding="zero1", moments=moments),  # type: ignore[arg-type]
        )
        for size in (4, 1)
    }
    for writer, reader in ((4, 1), (1, 4)):
        seen = [part for (part,) in run_ranks(writer, begin, [configs[writer]])]
        uninterrupted = merged([part for _, part in seen])
        found = merged([part for (part,) in run_ranks(reader, go_on, [(configs[reader], seen[0][0])])])
        assert found.samples == uninterrupted.samples
        # The first loss is of the very weights that were saved; bf16 then rounds the sums of another order.
        assert found.losses[0] == pytest.approx(uninterrupted.losses[0], rel=1e-4)
        assert found.losses == pytest.approx(uninterrupted.losses, rel=2e-2)
