"""Verifies a job on all of its ranks: `verify_job` runs every check and writes the certificate."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import distributed as dist

from comm.agreement import broadcast_first
from comm.exits import EXIT_PREEMPTED, EXIT_UNVERIFIED
from comm.groups import start
from comm.watchdog.collective_log import cuda_mark
from train.config import TrainConfig
from train.errors import PreemptedError
from train.files.run_files import write_end
from train.run import JoinedRank, run_in_job
from verify.cap import check_cap
from verify.certificate import Certificate
from verify.checks import CheckEntry, Verification, run_checks
from verify.equality import check_copies, check_equality, check_overlap
from verify.layouts import Trial
from verify.places import check_order, check_peers, check_versions
from verify.rates import check_rates
from verify.resuming import check_checkpoint

_SAME = ("peers", "versions")

CHECKS = (
    CheckEntry(name="peers", about="ranks see each other, each on its device, with equal clocks", run=check_peers),
    CheckEntry(
        name="versions",
        about="configuration, sources and packages are equal on all ranks",
        run=check_versions,
        needs=("peers",),
    ),
    CheckEntry(name="equality", about="steps of many ranks equal those of one rank", run=check_equality, needs=_SAME),
    CheckEntry(name="copies", about="copies of a weight are equal on all ranks", run=check_copies, needs=_SAME),
    CheckEntry(
        name="overlap",
        about="overlapped groups equal sequential ones",
        run=check_overlap,
        needs=(*_SAME, "equality"),
    ),
    CheckEntry(
        name="checkpoint",
        about="a damaged checkpoint is refused, a whole one resumes, in another layout if there are several",
        run=check_checkpoint,
        needs=(*_SAME, "equality"),
    ),
    CheckEntry(
        name="node cap",
        about="a token over the cap of nodes raises an error on all ranks",
        run=check_cap,
        needs=(*_SAME, "equality"),
    ),
    CheckEntry(name="rates", about="no link or rank is slow; times for the planner", run=check_rates, needs=_SAME),
    CheckEntry(name="order", about="ranks agree on the order of collectives", run=check_order, needs=_SAME),
)
"""All checks, in their order. A new check is one entry."""


def verify_job(config: TrainConfig, trials: Sequence[Trial], *, reports_on_stderr: bool = False) -> int:
    """Runs all checks on this rank of the job. Every rank calls it.

    Returns the exit code: 0 if all checks passed, 3 if one failed, 75 if it was preempted. A rank that is lost or does
    not respond ends all ranks with 78 or 76, as in training.
    """

    def verify(joined: JoinedRank) -> int:
        try:
            return _verify(joined, replace(config, resume=None), trials)
        except PreemptedError as error:  # on all ranks, between two steps
            joined.lines.say(f"preempted: {error}; exit code {EXIT_PREEMPTED}")
            if dist.get_rank() == 0:
                write_end(Path(config.out_dir), "preempted", EXIT_PREEMPTED, str(error))
            return EXIT_PREEMPTED

    return run_in_job(config, verify, reports_on_stderr=reports_on_stderr)


def _verify(joined: JoinedRank, config: TrainConfig, trials: Sequence[Trial]) -> int:
    device = start(config.cluster, joined.job.store)
    folder = Path(broadcast_first(config.out_dir))
    joined.crash_reporter.out_dir = folder
    if device.type == "cuda":
        joined.log.follow_streams(cuda_mark(device))
    verification = Verification(
        config=config,
        device=device,
        log=joined.log,
        trials=trials,
        folder=folder,
        preemption=joined.preemption,
    )
    certificate = Certificate(verification, CHECKS) if dist.get_rank() == 0 else None
    outcomes = []
    for outcome in run_checks(CHECKS, verification):
        outcomes.append(outcome)
        if certificate is not None:
            certificate.add(outcome)
    if certificate is not None:
        certificate.close()
    failed = [outcome for outcome in outcomes if outcome.verdict == "failed"]
    if failed and dist.get_rank() == 0:
        write_end(folder, "stopped", EXIT_UNVERIFIED, f"{failed[0].check}: {failed[0].summary}")
    dist.barrier()
    return 0 if all(outcome.verdict == "passed" for outcome in outcomes) else EXIT_UNVERIFIED
