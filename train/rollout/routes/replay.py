"""Replays the experts of a rollout's tokens in training, and keeps their records for a resumed run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from model.router import RouteError
from train.errors import UnsavedError
from train.replica import Replica
from train.rollout.groups.journal import FOLDER_NAME
from train.rollout.groups.records import RolledAnswer, RolledGroup, RolloutHeader, RolloutRoutes, ScoredRollout
from train.rollout.pack import AnswerPlace
from train.rollout.routes.exchange import TrainedRoutes, exchange_routes
from train.rollout.routes.files import read_routes, write_routes
from train.rollout.routes.plan import PlacedAnswer, assign_homes, held_records

GroupAnswer = tuple[RolledGroup, RolledAnswer]


def replay_answers(
    replica: Replica, routes: RolloutRoutes, answers: Sequence[GroupAnswer], places: Sequence[AnswerPlace]
) -> TrainedRoutes:
    """Returns the experts of the tokens that this rank trains. All ranks call it.

    Args:
        answers: that are trained, each with its group.
    """
    placed = [
        PlacedAnswer(
            prompt=group.prompt,
            sample=answer.sample,
            prompt_tokens=len(group.tokens),
            answer_tokens=len(answer.tokens),
            batch=place.batch,
            row=place.row,
            start=place.start,
        )
        for (group, answer), place in zip(answers, places, strict=True)
    ]
    return exchange_routes(replica, routes.sampled, assign_homes(replica, routes.requests), placed)


def save_rollout_routes(replica: Replica, out_dir: Path, rollout: ScoredRollout) -> None:
    """Writes this rank's records of a rollout. All ranks call it, before the journal is written.

    Raises:
        UnsavedError: on every rank, if one of them could not write.
    """
    assert rollout.routes is not None
    world, problem = replica.world, ""
    try:
        write_routes(
            out_dir / FOLDER_NAME, rollout.header.step, world.files, rollout.routes.sampled, _origin(rollout.header)
        )
    except OSError as error:
        problem = f": {error}"
    failed = int(world.reduce(torch.tensor(int(bool(problem))), "records of experts that were not written"))
    if failed:
        raise UnsavedError(f"{out_dir}: takes no records of experts from {failed} of {len(world.ranks)} ranks{problem}")


def load_rollout_routes(replica: Replica, out_dir: Path, rollout: ScoredRollout) -> RolloutRoutes | None:
    """Reads the records of a rollout that this rank would have if it had sampled it. All ranks call it.

    Args:
        replica: the policy, whose layout may differ from that of the run that sampled.

    Returns:
        None on every rank, if a record is missing on one of them.
    """
    world, requests = replica.world, (tuple(group.prompt for group in rollout.groups),)
    lengths = [
        (each.prompt, len(each.tokens), [len(answer.tokens) for answer in each.answers]) for each in rollout.groups
    ]
    held = held_records(replica, assign_homes(replica, requests), lengths)
    found = None
    try:
        folder, header = out_dir / FOLDER_NAME, rollout.header
        sampled = read_routes(folder, header.step, world.files, held, _origin(header))
        found = RolloutRoutes(sampled=sampled, requests=requests)
    except RouteError:
        found = None
    missing = int(world.reduce(torch.tensor(int(found is None)), "records of experts that are missing"))
    return None if missing else found


def _origin(header: RolloutHeader) -> str:
    """Returns what identifies the weights and settings that sampled a rollout."""
    return f"{header.weights} {header.settings}"
