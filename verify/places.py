"""Checks devices, hosts, clocks and versions of ranks, and the order of their collectives."""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from statistics import median

import torch
from torch import distributed as dist

from comm.agreement import gather_present
from comm.config import ClusterConfig
from train.start.startup import compare_ranks
from verify.checks import Failure, Findings, Place, Verification
from verify.layouts import CONFIGURED
from verify.nccl.calls import run_calls
from verify.nccl.check import check_streams
from verify.runs import opened_world

_ROUNDS = 5
_MOST_CLOCK_SECONDS = 2.0


def place_of(device: torch.device) -> Place:
    """Returns where this rank runs."""
    index = device.index or 0
    name = "cpu"
    if device.type == "cuda":
        name = str(torch.cuda.get_device_properties(device).uuid)
    return Place(
        rank=dist.get_rank(),
        local_rank=int(os.environ.get("LOCAL_RANK", dist.get_rank())),
        host=socket.gethostname(),
        device_type=device.type,
        device_index=index,
        device=name,
    )


def misplaced(places: Sequence[Place], cluster: ClusterConfig) -> Iterator[Failure]:
    """Yields ranks on the wrong device or host. Ranks on gloo may share GPUs."""
    seen: dict[tuple[str, str], int] = {}
    hosts: dict[int, tuple[int, str]] = {}
    for place in places:
        expected = place.local_rank if cluster.backend == "nccl" else place.device_index
        if place.device_type != cluster.device:
            difference = f"is {place.device_type}, must be {cluster.device}"
            yield Failure(rank=place.rank, subject="device", difference=difference, cause="cluster.device on this rank")
        elif place.device_index != expected:
            yield Failure(
                rank=place.rank,
                subject="device",
                difference=f"has index {place.device_index}, must have that of LOCAL_RANK={place.local_rank}",
                cause="the device was chosen before LOCAL_RANK was read, or CUDA_VISIBLE_DEVICES differs",
            )
        other = seen.setdefault((place.host, place.device), place.rank)
        if cluster.backend == "nccl" and other != place.rank:
            yield Failure(
                rank=place.rank,
                subject="device",
                difference=f"is that of rank {other} on host {place.host}",
                cause="CUDA_VISIBLE_DEVICES or LOCAL_RANK is the same on two ranks",
            )
        node = place.rank // cluster.ranks_per_node
        first, host = hosts.setdefault(node, (place.rank, place.host))
        if host != place.host:
            yield Failure(
                rank=place.rank,
                subject="host",
                difference=f"is {place.host}, that of rank {first} on the same node is {host}",
                cause=f"cluster.ranks_per_node={cluster.ranks_per_node} is not the number of ranks of a host",
            )


def check_peers(verification: Verification) -> Findings:
    """Checks that all ranks see each other, each on its device, with equal clocks."""
    places = gather_present(place_of(verification.device))
    failures = list(misplaced(places, verification.config.cluster))
    offsets = _clock_offsets()
    own = offsets[dist.get_rank()]
    if abs(own) > _MOST_CLOCK_SECONDS:
        difference = f"is {own:+.1f} s from the median of all ranks, at most {_MOST_CLOCK_SECONDS:g}"
        failures.append(
            Failure(rank=dist.get_rank(), subject="clock", difference=difference, cause="the host's clock is not set")
        )
    verification.places = places
    hosts = len({place.host for place in places})
    return Findings(
        summary=f"{len(places)} ranks on {hosts} hosts see each other, clocks differ by {max(map(abs, offsets)):.2g} s",
        failures=failures,
        measured=max(map(abs, offsets)),
        tolerance=_MOST_CLOCK_SECONDS,
    )


def _clock_offsets() -> list[float]:
    """Returns each rank's clock minus the median, the least of several rounds, as barriers end late."""
    rounds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        clocks = gather_present(time.time())
        rounds.append([clock - median(clocks) for clock in clocks])
    return [min(offsets, key=abs) for offsets in zip(*rounds, strict=True)]


def check_versions(verification: Verification) -> Findings:
    """Compares configuration, sources and packages as each training run does at its start."""
    difference = compare_ranks(verification.config)
    failure = Failure(
        rank=None, subject="versions", difference=difference, cause="another command, checkout or environment"
    )
    failures = [failure] if difference and dist.get_rank() == 0 else []
    return Findings(summary="configuration, sources and packages are equal on all ranks", failures=failures)


def check_order(verification: Verification) -> Findings:
    """Compares the order of each group's collectives between its ranks, over all earlier checks.

    Rank 0 also looks for ranks that can wait for each other in a step of the run on NCCL.
    """
    hashes = verification.log.order_hashes()
    progress = verification.log.progress()
    # The lowest rank of each group decides.
    gathered = gather_present((dist.get_rank(), hashes))
    expected: dict[str, tuple[int, str]] = {}
    for rank, of_rank in gathered:
        for group, digest in of_rank.items():
            expected.setdefault(group, (rank, digest))
    failures = []
    for group, digest in hashes.items():
        first, wanted = expected[group]
        if digest != wanted:
            difference = f"the order of its {progress[group].started} collectives differs from that of rank {first}"
            cause = "a branch on this rank alone, or lanes that share a group; NCCL would wait forever"
            failures.append(Failure(rank=dist.get_rank(), subject=f"group {group}", difference=difference, cause=cause))
    count = sum(one.started for one in progress.values())
    summary = f"ranks agree on the order of collectives in {len(expected)} groups ({count} on rank 0)"
    configured = next(trial.config for trial in verification.trials if trial.name == CONFIGURED)
    with opened_world(verification, configured) as (world, _):
        calls = run_calls(configured, world)
    if dist.get_rank() == 0 and verification.config.parallelism.world_size > 1:
        streams = check_streams(verification.config, calls, os.environ)
        summary += f"; no cycle on NCCL: {streams.size}"
        if streams.problem:
            cause = "ranks can wait for each other under the rules of docs/nccl.md"
            failures.append(Failure(rank=None, subject=streams.size, difference=streams.problem, cause=cause))
    return Findings(
        summary=summary,
        failures=failures,
    )
