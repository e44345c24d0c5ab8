"""A sample of the pairs of layouts; `make any-to-any` runs all of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import Cut, ParallelismConfig
from tests.dualpipe.random_schedules import bidirectional, looped, random_schedule
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, OPTIM, TASK, tiny_config, write_text
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


@pytest.mark.slow
def test_any_to_any_sampled_pairs_resume_as_if_uninterrupted(folder: Path) -> None:
    """Among them two whose first and last stage, and so the embedding and its copy, are on different ranks."""
    places = [replace(PLACES[number], micro=1) if number == 7 else PLACES[number] for number in range(len(PLACES))]
    pairs = [(0, 6), (6, 8), (3, 7), (7, 4)]
    chosen = [(places[writer], places[reader]) for writer, reader in pairs]
    seen = dict(compare(folder, chosen, steps_after=2, sequences=8))
    assert len(seen) == len(pairs)
    assert max(seen.values()) <= TOLERANCE, seen


@pytest.mark.long
def test_any_to_any_ranks_begin_and_cease_to_share_sequences(folder: Path) -> None:
    """To whole sequences, to groups of another size, and back, with other data and expert ranks."""
    pairs = [(1, 12), (12, 6), (12, 13), (13, 0)]
    seen = dict(compare(folder, [(PLACES[a], PLACES[b]) for a, b in pairs], steps_after=2, sequences=8))
    assert len(seen) == len(pairs)
    assert max(seen.values()) <= TOLERANCE, seen


@pytest.mark.slow
def test_any_to_any_chunks_move_between_one_and_two_directions(folder: Path) -> None:
    """Two chunks for each rank: the same four stages are on one rank each, and then on both."""
    config = config_at(folder, Place(2, 1, 1, "chunks", 2), steps_after=2, sequences=8)
    config = replace(config, model=replace(MODEL, num_layers=4))
    schedules = [random_schedule(placement, 4, 0) for placement in (looped(2, 2), bidirectional(2, 2))]
    for writer, reader in (schedules, schedules[::-1]):
        seen = [part for (part,) in run_ranks(2, begin, [config], writer)]
        uninterrupted = merged([part for _, part in seen])
        found = merged([part for (part,) in run_ranks(2, go_on, [(config, seen[0][0])], reader)])
        assert found.samples == uninterrupted.samples
        assert worst_difference(found, uninterrupted) <= TOLERANCE


@pytest.mark.slow
def test_any_to_any_other_cut_resumes_as_if_uninterrupted(folder: Path) -> None:
    """With MTP. The second cut leaves only MTP and the heads in the last stage."""
    places = [Place(2, 1, 1, "dualpipe_split", cut=Cut("listed", sizes)) for sizes in ((5, 3), (8, 0))]
    write_text(folder / "cuts")
    seen = dict(compare(folder / "cuts", [(places[0], places[1]), (places[1], places[0])], steps_after=2, sequences=4))
    assert len(seen) == 2
    assert max(seen.values()) <= TOLERANCE, seen


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
