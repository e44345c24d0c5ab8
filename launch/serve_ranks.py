"""Starts the ranks of a server that share experts, and passes signals to the one with the HTTP server."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from comm.config import ParallelismConfig
from comm.exits import EXIT_LOST
from dualpipe.registry import FALLBACK, ScheduleConfig
from infer.placement import Placement, PlacementError
from launch.job import (
    PRELOADED,
    DeadRankError,
    Device,
    Dtype,
    Send,
    WeightsSource,
    open_ranks,
    run_on_local_ranks,
    spread_over_ranks,
)
from launch.machine import apply_rank_environment, is_torchrun
from model.hf.files import read_json
from train.config import InferenceConfig
from train.errors import broken

if TYPE_CHECKING:
    from infer.continuous import ContinuousEngine
    from infer.serve.engine import ServingEngine

_GRACE_SECONDS = 10.0  # after a rank is lost, for the answers that say so


BuildEngine = Callable[..., "ContinuousEngine"]
"""Builds the engine of a rank for a model, given `build_decoder`."""

Serve = Callable[["ServingEngine"], int]
"""Serves with an engine, and returns the exit code."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RanksConfig:
    """Ranks that serve a model together.

    Attributes:
        num_reading: first ranks that read all prompts, for the others to decode; 0 if all ranks do both.
        place_again_seconds: seconds between two placements of experts by their loads; None keeps the first one.
    """

    network: InferenceConfig
    placement: Placement
    num_reading: int
    place_again_seconds: float | None


def check_ranks(
    source: WeightsSource,
    computation: tuple[Dtype, Device],
    ranks: int,
    *,
    placement: str | None,
    prefill_ranks: int,
    place_again_seconds: float | None,
) -> RanksConfig | None:
    """Returns how ranks share the experts of a model, checked, or None for one rank."""
    if prefill_ranks >= ranks and prefill_ranks:
        raise broken("prefill_ranks", f"must be less than ranks={ranks}", prefill_ranks, ranks - 1)
    if ranks == 1 and (placement is not None or place_again_seconds is not None):
        raise broken("ranks", "must be at least 2 if experts are placed", ranks, "the ranks of the placement")
    mesh = ParallelismConfig(pipeline=1, data=ranks, expert=ranks)
    schedule = ScheduleConfig(kind=FALLBACK, chunks=None, pairing="sequential")
    network = spread_over_ranks(source, *computation, mesh, schedule)
    if network is None:
        return None
    num_experts = source.model.num_routed_experts
    places = Placement.in_order(num_experts, ranks)
    if placement is not None:
        places = Placement.read(read_json(Path(placement).expanduser()), "placement")
        sizes = (places.shape.num_ranks, places.shape.num_experts)
        if sizes != (ranks, num_experts):
            rule = f"must be for ranks={ranks} and {num_experts} experts"
            near = f"python -m launch.place ranks={ranks} format=json"
            raise PlacementError.broken("placement", rule, f"for {sizes[0]} and {sizes[1]}", near)
    return RanksConfig(
        network=network, placement=places, num_reading=prefill_ranks, place_again_seconds=place_again_seconds
    )


def serve_on_ranks(config: RanksConfig, build_engine: BuildEngine, serve: Serve | None) -> int:
    """Serves on rank 0 with an engine over all ranks, and returns the exit code. Other ranks pass None."""
    function = partial(_serve_as_rank, config, build_engine, serve)
    cluster = config.network.cluster
    if is_torchrun(os.environ):
        apply_rank_environment(cluster)
        return function(lambda *message: None)
    num_ranks = config.network.parallelism.world_size
    preloaded = [*PRELOADED, "infer.serve.ranks", "infer.serve.http"]
    try:
        code = run_on_local_ranks(
            function, cluster, num_ranks, preloaded, _pass_signals_to, grace_seconds=_GRACE_SECONDS
        )
    except DeadRankError as error:
        print(f"ranks: {error}", file=sys.stderr, flush=True)
        return EXIT_LOST
    assert isinstance(code, int)
    return code


def _pass_signals_to(process: int) -> None:
    """Lets a process handle the signals that end a server."""

    def handle(number: int, frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(process, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handle)


def _serve_as_rank(config: RanksConfig, build_engine: BuildEngine, serve: Serve | None, send: Send) -> int:
    """Serves as one rank until rank 0 ends; returns the exit code."""
    from infer.serve.ranks import LostRankError, RankDecoder, RanksEngine, ServingRank, open_group
    from infer.serve.roles import SequenceTransfers

    rank = int(os.environ["RANK"])
    if rank:
        # Rank 0 decides when the others end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    seconds = config.network.cluster.timeout_seconds
    with open_ranks(config.network) as pipeline:
        num_ranks = config.network.parallelism.world_size
        pipeline.place_experts(config.placement)
        engine = build_engine(pipeline.model, build_decoder=partial(RankDecoder, open_group(seconds)))
        transfers = SequenceTransfers(engine, rank, num_ranks, config.num_reading, seconds)
        serving = ServingRank(engine, config.placement, pipeline.place_experts, transfers)
        if rank == 0:
            assert serve is not None
            # Ctrl-C in a terminal goes to the whole group; only the parent passes it on. Ranks of torchrun lead one.
            if os.getpgid(0) != os.getpid():
                os.setpgid(0, 0)
            send(os.getpid())
            ranks = RanksEngine(
                serving, prefill_ranks=config.num_reading, place_again_seconds=config.place_again_seconds
            )
            code = serve(ranks)
        else:
            try:
                serving.follow()
                code = 0
            except LostRankError:
                code = EXIT_LOST
        if code:
            sys.exit(code)  # without the end of the job, in which all ranks take part
    return code
