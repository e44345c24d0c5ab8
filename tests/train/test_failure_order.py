"""Ranks of a group agree on the order of what they do together: NCCL would hang where gloo only happens not to."""

from dataclasses import replace
from pathlib import Path

import pytest

from comm.config import DispatchConfig, ParallelismConfig, TwoHopDispatchConfig
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.config import ScheduleConfig
from tests.ranks import run_ranks
from tests.tiny import VALIDATION, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader
from train.config import TrainConfig
from train.listeners.validation import validate
from train.step import train_step

TWO_HOP = TwoHopDispatchConfig(
    kind="two_hop", payload="full", max_nodes=4, node_cap="verify", chunks=2, partial_sums="rows"
)
Seen = tuple[dict[str, str], dict[str, tuple[int, ...]], set[str]]


def _steps(rank: int, world_size: int, config: TrainConfig) -> Seen:
    """Hashes and members of every group after two steps and a validation, and the names of what was done."""
    learner, loader = open_job(config), open_loader(config)
    for step in range(2):
        train_step(learner, config.task, loader, step)
    validate(learner.replica, config.task, loader, config.validation.sequences)
    close_job(learner)
    log = learner.world.log
    recent = [operation for _, operation in log.recent()]
    return log.order_hashes(), {each.group: each.ranks for each in recent}, {each.name for each in recent}


def _check_order(seen: list[Seen]) -> set[str]:
    """The groups, each with one hash on all its ranks."""
    members = {group: ranks for _, groups, _ in seen for group, ranks in groups.items()}
    for group, ranks in members.items():
        held = {rank for rank, (hashes, _, _) in enumerate(seen) if group in hashes}
        assert held == set(ranks), group
        assert len({seen[rank][0][group] for rank in ranks}) == 1, group
    return set(members)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "dispatch"), [(2, None), (4, TWO_HOP)], ids=["all_to_all", "two_hop"])
def test_operations_of_every_group_have_one_order_on_all_its_ranks(
    tmp_path: Path, data: int, dispatch: DispatchConfig | None
) -> None:
    write_text(tmp_path)
    config = tiny_config(
        tmp_path,
        parallelism=ParallelismConfig(pipeline=2, data=data, expert=data),
        schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
        validation=replace(VALIDATION, sequences=16),
    )
    config = replace(config, data=replace(config.data, validation_fraction=0.5))  # enough for a validation pass
    seen = run_ranks(2 * data, _steps, config if dispatch is None else replace(config, dispatch=dispatch))
    groups, names = _check_order(seen), set().union(*(names for _, _, names in seen))
    world = list(range(2 * data))
    links = {(0, data), (data - 1, 2 * data - 1), (data, 0), (2 * data - 1, data - 1)}
    assert {f"{kind} {source}->{end}" for kind in ("activation", "gradient") for source, end in links} <= groups
    assert {f"world {world}", f"stage {world}"} <= groups
    assert {"transfer", "sum of targets", "sum of losses", "update of the weights", "sum of router loads"} <= names
    assert len([group for group in groups if "->" not in group]) > 2  # those of the experts' exchange


def test_order_hashes_detect_a_rank_with_another_order() -> None:
    seen: list[Seen] = []
    for names in (("one", "other"), ("other", "one")):
        log = CollectiveLog()
        for name in names:
            log.start("world", (0, 1), name)
        seen.append((log.order_hashes(), {"world": (0, 1)}, set(names)))
    with pytest.raises(AssertionError, match="world"):
        _check_order(seen)
