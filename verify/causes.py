"""Explains why a small run differs from one rank: by ratios, by the ranks concerned, by its axis.

No rule is a proof. Each one compares what ranks hold with what they would hold after a known mistake.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose

from comm.config import ParallelismConfig
from model.objective import BALANCE
from model.transformer import BIAS
from verify.checks import Failure
from verify.layouts import Trial
from verify.steps import Difference

_NEAR = 1e-4  # relative difference up to which a ratio counts as a number
_EXPERTS = ".experts."


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A rank's part of a gradient, compared with what the sequences of each rank contribute."""

    rank: int
    name: str
    error: float
    ratio: float | None
    like_rank: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What ranks know together about the first step of a trial that differs; equal on all ranks.

    Attributes:
        step: number of the step, from 1; 0 before the first one.
        totals: gradients that differ in their sum over ranks.
        by_rank: values of ranks that differ.
        shares: parts of `totals` by rank, if each rank computes the gradient of whole sequences.
        sums: the group over which a rank's first wrong sum was computed, if one fits.
        count_ratios: targets of the job over those of a rank, by rank and loss.
        holders: ranks that hold a tensor of `totals`.
    """

    trial: Trial
    step: int
    totals: Sequence[Difference]
    by_rank: Mapping[int, Sequence[Difference]]
    shares: Sequence[Share] = ()
    sums: Mapping[int, str] = field(default_factory=dict)
    count_ratios: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    holders: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[tuple[int, Difference]]:
        """Returns the differences of one kind with their ranks."""
        return [(rank, one) for rank, found in self.by_rank.items() for one in found if one.kind == kind]

    def failure(self, rank: int | None, difference: Difference | Share, cause: str) -> Failure:
        """Returns a failure of this trial."""
        kind = "gradient" if isinstance(difference, Share) else difference.kind
        factor = "" if difference.ratio is None else f", it is {difference.ratio:.6g} times the expected value"
        when = f"in step {self.step}" if self.step else "before the first step"
        return Failure(
            rank=rank,
            subject=f"{kind} of {difference.name}",
            difference=f"differs from one rank's by {difference.error:.3g} {when} of {self.trial}{factor}",
            cause=f"{cause} ({self.trial.name})",
        )


def explain(evidence: Evidence) -> list[Failure]:
    """Returns the failures of a trial, those of the first rule that applies."""
    for rule in _RULES:
        failures = rule(evidence)
        if failures:
            return failures
    return []


def axis_of(ratio: float, mesh: ParallelismConfig, axis: str, *, is_experts: bool) -> str:
    """Returns the axis of a ratio's size, preferably the one that was added; empty if there is none."""
    sizes = {"expert": mesh.expert} if is_experts else {}
    sizes |= {"data": mesh.data, "pipeline": mesh.pipeline, "context": mesh.context, "expert": mesh.expert}
    if axis in sizes and not is_experts:
        sizes = {axis: sizes[axis], **sizes}
    return next((name for name, size in sizes.items() if size > 1 and _is_near(ratio, size)), "")


def factor_cause(ratio: float | None, evidence: Evidence, *, is_everywhere: bool, is_experts: bool) -> str:
    """Returns what a factor says about a gradient."""
    mesh = evidence.trial.config.parallelism
    if ratio is None:
        return ""
    if abs(ratio) < _NEAR:
        return "this part of the gradient is missing from the sum"
    if is_everywhere or is_experts:
        for number, verb in ((ratio, "scaled"), (1 / ratio, "divided")):
            axis = axis_of(number, mesh, evidence.trial.axis, is_experts=is_experts)
            if axis:
                subject = "the gradient of routed experts is " if is_experts else "the loss is "
                return f"{subject}{verb} by the size of the {axis} axis"
    if _is_near(ratio, 2):
        return "this part of the gradient is added twice"
    return f"this part of the gradient is scaled by {ratio:.6g}"


def _is_near(number: float, expected: float) -> bool:
    return isclose(number, expected, rel_tol=_NEAR)


def _initial(evidence: Evidence) -> list[Failure]:
    if evidence.step:
        return []
    cause = "this rank drew its initial weights from another seed, or by another version"
    return [evidence.failure(rank, one, cause) for rank, one in evidence.of_kind("weight")]


def _local_counts(evidence: Evidence) -> list[Failure]:
    failures = []
    for rank, one in evidence.of_kind("loss"):
        wanted = evidence.count_ratios.get(rank, {}).get(one.name)
        if wanted is not None and one.ratio is not None and wanted > 1 and _is_near(one.ratio, wanted):
            counted = "sequences" if one.name == BALANCE else "targets"
            cause = f"it is divided by this rank's own number of {counted}, {wanted:.6g} times fewer than the job's"
            failures.append(evidence.failure(rank, one, cause))
    return failures


def _own_parts(evidence: Evidence) -> list[Failure]:
    """Explains the parts of ranks that compute gradients of whole sequences."""
    ranks = {share.rank for share in evidence.shares}
    num_ranks = evidence.trial.config.parallelism.world_size
    failures = []
    moved = [share for share in evidence.shares if share.like_rank is not None]
    for share in moved or evidence.shares:
        is_experts = all(_EXPERTS in one.name for one in evidence.totals)
        cause = factor_cause(share.ratio, evidence, is_everywhere=len(ranks) == num_ranks, is_experts=is_experts)
        if share.like_rank is not None:
            cause = f"it is that of rank {share.like_rank}: this rank read the sequences of another one"
        cause = cause or _axis_cause(evidence.trial.axis, has_losses=bool(evidence.of_kind("loss")))
        failures.append(evidence.failure(share.rank, share, cause))
    return failures


def _totals(evidence: Evidence) -> list[Failure]:
    """Explains sums of gradients by a common factor, by their holder, or by the axis that was added."""
    totals = evidence.totals
    is_experts = bool(totals) and all(_EXPERTS in one.name for one in totals)
    is_common = len({None if one.ratio is None else round(one.ratio, 4) for one in totals}) == 1
    has_losses = bool(evidence.of_kind("loss"))
    failures = []
    for one in totals:
        cause = factor_cause(one.ratio, evidence, is_everywhere=is_common and len(totals) > 4, is_experts=is_experts)
        if not cause:
            cause = _axis_cause(evidence.trial.axis, has_losses=has_losses)
        holders = evidence.holders.get(one.name, ())
        for rank in holders if len(holders) <= 2 else (None,):
            failures.append(evidence.failure(rank, one, cause))
    return failures


def _axis_cause(axis: str, *, has_losses: bool) -> str:
    causes = {
        "pipeline": "messages between stages are swapped: a stage pairs values of two micro-batches"
        if has_losses
        else "gradients between stages are swapped or belong to other micro-batches",
        "directions": "the second direction of the pipeline: its messages, sequences, or sums over mirror ranks",
        "slices": "slices of a sequence, or the gradients of their keys and values, are mixed up",
        "optimizer": "the configured optimizer: shards, offload or types of its state",
        "context": "keys, values or their gradients of other parts of a sequence are missing or misplaced",
        "expert": "rows or their gradients reach other experts or other tokens than chosen",
        "MTP": "an MTP module, its inputs or its part of a shared weight",
        "micro-batch": "the gradients of a step's micro-batches are not added up",
        "data": "ranks do not compute what one rank does for their sequences",
    }
    return causes.get(axis, "a combination of axes, as each of them alone agrees")


def _sums(evidence: Evidence) -> list[Failure]:
    wrong = evidence.of_kind("reduced gradient")
    return [
        evidence.failure(rank, one, evidence.sums.get(rank, "the gradient is summed over a wrong group of ranks"))
        for rank, one in wrong
    ]


def _updates(evidence: Evidence) -> list[Failure]:
    failures = []
    for rank, one in evidence.of_kind("weight"):
        cause = "the update of the weights differs from AdamW's"
        if one.ratio is not None and abs(one.ratio) < _NEAR:
            cause = "this copy of the weight was not updated, while others were"
        elif one.ratio is not None and _is_near(one.ratio, 2):
            what = "the router bias" if one.name.endswith(BIAS) else "the weight"
            cause = f"{what} is updated twice in a step, for one after each of two micro-batches"
        elif one.name.endswith(BIAS):
            cause = "the router bias is updated for other loads than those of the whole batch"
        failures.append(evidence.failure(rank, one, cause))
    return failures


def _consecutive(evidence: Evidence) -> list[Failure]:
    causes = {
        "late weight": "a pass does not wait for the update of its weights, or a training step differs from its parts",
        "average": "the moving average does not follow each update, or reads weights too early",
    }
    return [
        evidence.failure(rank, one, cause) for kind, cause in causes.items() for rank, one in evidence.of_kind(kind)
    ]


def _losses(evidence: Evidence) -> list[Failure]:
    cause = _axis_cause(evidence.trial.axis, has_losses=True)
    return [evidence.failure(rank, one, f"only the reported loss; {cause}") for rank, one in evidence.of_kind("loss")]


def _norm(evidence: Evidence) -> list[Failure]:
    cause = "the norm counts parameters that several ranks hold more than once, or not at all"
    return [evidence.failure(rank, one, cause) for rank, one in evidence.of_kind("gradient norm")]


_RULES: tuple[Callable[[Evidence], list[Failure]], ...] = (
    _initial,
    _local_counts,
    _own_parts,
    _totals,
    _sums,
    _norm,
    _updates,
    _losses,
    _consecutive,
)
"""From the first value of a step that differs to the last one, because later values follow from earlier ones."""
