"""Agreements between the ranks of an evaluation."""

from collections.abc import Collection, Mapping

from torch import distributed as dist

from train.world import World


def share_done(world: World, done: Mapping[str, Collection[str | int]] | None) -> Mapping[str, Collection[str | int]]:
    """Returns on every rank the samples that rank 0 has records of. All ranks call it.

    Args:
        done: ids by task; only those of rank 0 matter.
    """
    shared = [done if world.rank == 0 else None]
    with world.phase("samples that have a record"):
        dist.broadcast_object_list(shared, src=0, group=world.groups.world)
    return shared[0] or {}
