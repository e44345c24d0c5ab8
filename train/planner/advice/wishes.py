"""Lists what better hardware could change for a run, as what-ifs. No torch here.

The wishes are those of arXiv:2412.19437, section 3.5, and of arXiv:2505.09343.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import RECOMPUTED
from train.config import TrainConfig
from train.planner.advice.balance import link_rate
from train.planner.config import KernelRates, KernelTimes, PassTimes, RateReference, Rates
from train.planner.rows import rows_per_token
from train.planner.scaling import REFERENCE_MEMORY_BYTES_PER_SECOND

_FP8_SHARE = 0.75
"""Share of the peak of the computing SMs that FP8 products reach in the wish."""
_FP8_OVER_BF16 = 2.0
_UNLIMITED = 1000
_LINKS = (0.25, 0.5, 2, 4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Better or worse hardware, as a what-if.

    Attributes:
        name: what changes.
        change: the what-if.
        note: what the row assumes; empty if the change says it.
        has_memory: whether the what-if also predicts the memory of the change.
    """

    name: str
    change: str
    note: str = ""
    has_memory: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class UnknownWish:
    """A wish that cannot be computed.

    Attributes:
        name: what changes.
        needs: what would have to be known.
    """

    name: str
    needs: str


Wishes = Iterator[Wish | UnknownWish]


def wishes(config: TrainConfig, rates: Rates) -> Wishes:
    """Yields what hardware could change for a run.

    Args:
        rates: measured times that apply to it.
    """
    if isinstance(rates, KernelRates):
        yield from _computation(config, rates)
        yield from _multiprocessors(config, rates)
        yield from _links(config, rates)
        yield from _network(config, rates)
        yield from _routing(config)
        yield _scaled("HBM twice as fast", "cluster.memory_bytes_per_second", *_memory_rate(config), 2)
    else:
        yield from _measured_links(config)
        name = "FP8, casts, SMs of communication, HBM rate, routing, recomputation, combine in the network"
        yield UnknownWish(name=name, needs="times of kernels, as in rates=h800_trace; these rates are of layers")
    if config.parallelism.pipeline > 1:
        yield Wish(name="pipeline transfers without latency", change="rates.latency_seconds=0")
        yield Wish(name="pipeline transfers with 4 x the latency", change="rates.latency_seconds*4")
    yield from _memory(config, rates)
    yield from _host_and_failures(config)
    needs = "time and price of each endpoint of the network, an input"
    yield UnknownWish(name="multi-plane network", needs=needs)


def fp8_share(rates: KernelRates) -> float:
    """Returns the share of the FP8 peak of the computing SMs that the products of the reference reach.

    Args:
        rates: measured with FP8 products.
    """
    reference = rates.reference
    experts = 3 * reference.hidden_size * reference.active_expert_width
    # F, I and W each multiply by all weights of a token, and I computes some products of F again.
    weights = 3 * (reference.attention_parameters + experts) + reference.recomputed_parameters
    flops = 2 * reference.tokens * weights
    passes: list[PassTimes] = [rates.attention, rates.experts]
    seconds = sum(kernels.products for part in passes for kernels in _kernels(part))
    return flops / seconds / _fp8_peak(reference) if seconds else math.inf


def _kernels(part: PassTimes) -> tuple[KernelTimes, KernelTimes, KernelTimes]:
    return part.forward, part.backward_input, part.backward_weight


def _fp8_peak(reference: RateReference) -> float:
    """Returns the FP8 FLOP/s of the SMs that do not communicate."""
    computing = 1 - reference.communication_sms / reference.num_sms
    return _FP8_OVER_BF16 * reference.peak_flops * computing


def _computation(config: TrainConfig, rates: KernelRates) -> Wishes:
    if config.precision.kind != "fp8":
        whole = f"precision.kind=fp8 + recompute=[{','.join(RECOMPUTED)}]"
        yield Wish(name="FP8 in place of bf16", change=whole)
        yield UnknownWish(name="FP8 units, fused casts", needs="a run in FP8: precision=fp8")
        return
    share = fp8_share(rates)
    faster = f"rates.*.*.products*{_number(share / _FP8_SHARE)}"
    casts = "rates.*.*.casts=0"
    yield Wish(name="casts and transposes fused with copies", change=casts)
    name = f"FP8 products at {100 * _FP8_SHARE:.0f} % of peak: precise accumulation, block scales"
    if share < _FP8_SHARE:
        note = f"{100 * share:.0f} % of the peak of the computing SMs in these rates"
        yield Wish(name=name, change=faster, note=note)
        yield Wish(name="both: FP8 products and fused casts", change=f"{faster} + {casts}")
    else:
        yield UnknownWish(name=name, needs=f"nothing: these rates reach {100 * share:.0f} %")
    yield Wish(name="bf16 in place of FP8", change="precision.kind=bf16")


def _multiprocessors(config: TrainConfig, rates: KernelRates) -> Wishes:
    used = config.cluster.communication_sms
    used = rates.reference.communication_sms if used is None else used
    if config.parallelism.expert == 1 or used == 0:
        needs = "experts that several ranks share, or SMs that communicate; this run has none"
        yield UnknownWish(name="communication co-processor", needs=needs)
        return
    if used > 1:
        yield Wish(name="half the SMs for communication", change=f"cluster.communication_sms={used // 2}")
    yield Wish(name="no SMs for communication: co-processor", change="cluster.communication_sms=0")


def _links(config: TrainConfig, rates: KernelRates) -> Wishes:
    """Yields faster and slower links, if tokens cross them."""
    if config.parallelism.expert == 1:
        yield UnknownWish(name="faster links", needs="experts that several ranks share; this run exchanges nothing")
        return
    across, within = "cluster.inter_node_bytes_per_second", "cluster.intra_node_bytes_per_second"
    given, reference = config.cluster.intra_node_bytes_per_second, rates.reference.intra_node_bytes_per_second
    if not rows_per_token(config).across_nodes:
        for factor in (*_LINKS, _UNLIMITED):
            yield _scaled(f"link within a node {_times(factor)}", within, given, reference, factor)
        needs = "experts that ranks of several nodes share; this run exchanges within nodes"
        yield UnknownWish(name="faster links between nodes", needs=needs)
        return
    both = _scaled("both", within, given, reference, _UNLIMITED).change
    given, known = config.cluster.inter_node_bytes_per_second, link_rate(config, rates) or 0.0
    for factor in _LINKS:
        yield _scaled(f"link between nodes {_times(factor)}", across, given, known, factor)
    unlimited = _scaled("", across, given, known, _UNLIMITED).change
    note = "the link within a node may then limit the exchange"
    yield Wish(name="link between nodes unlimited", change=unlimited, note=note)
    yield Wish(name="both links unlimited", change=f"{unlimited} + {both}")


def _times(factor: float) -> str:
    return "unlimited" if factor == _UNLIMITED else f"x {factor:g}"


def _measured_links(config: TrainConfig) -> Wishes:
    if config.parallelism.expert == 1:
        return
    note = "all of the measured exchange scales with the link"
    for factor in _LINKS:
        change = f"rates.*.*_exchange*{_number(1 / factor)}"
        yield Wish(name=f"link between nodes x {factor:g}", change=change, note=note)
    yield Wish(name="links unlimited", change="rates.*.*_exchange=0", note=note)


def _network(config: TrainConfig, rates: KernelRates) -> Wishes:
    if config.parallelism.expert == 1:
        return
    combine = "rates.exchange.combine*0.5 + rates.exchange.dispatch_backward*0.5"
    yield Wish(name="combine in the network", change=combine, note="half the bytes of both sums over experts")
    name = "adaptive routing: rows spread evenly over links"
    if rates.receive_imbalance > 1:
        yield Wish(name=name, change="rates.receive_imbalance=1")
    else:
        needs = "rates.receive_imbalance, most rows that a rank receives over the mean; it is 1, balanced"
        yield UnknownWish(name=name, needs=needs)


def _routing(config: TrainConfig) -> Wishes:
    if config.parallelism.expert == 1 or not rows_per_token(config).across_nodes:
        return
    if config.dispatch.kind in ("two_hop", "deepep"):
        yield Wish(name="no forwarding: a copy for each expert", change="dispatch.kind=all_to_all")
    else:
        yield Wish(name="forwarding: a copy for each node", change="dispatch.kind=two_hop")
    model, nodes = config.model, math.ceil(config.parallelism.expert / config.cluster.ranks_per_node)
    if model.num_limited_groups < model.num_expert_groups:
        change = f"model.num_limited_groups={model.num_expert_groups} + dispatch.max_nodes={nodes}"
        yield Wish(name="routing to any number of nodes", change=change)


def _memory(config: TrainConfig, rates: Rates) -> Wishes:
    """Yields what twice the memory could be spent on."""
    room = "" if config.cluster.memory_bytes is None else " + cluster.memory_bytes*2"
    if config.parallelism.pipeline % 2 == 0:
        halved = "parallelism.pipeline/2 + parallelism.data*2"
        yield Wish(name="twice the HBM, for half the pipeline ranks", change=halved + room)
    name = "more HBM, for no recomputation"
    if not config.recompute or not isinstance(rates, KernelRates):
        return
    if config.precision.kind == "fp8":
        yield Wish(name=name, change=_stored(rates), note="its memory is unknown", has_memory=False)
    else:
        yield Wish(name=f"twice the HBM{name.removeprefix('more HBM')}", change=f"recompute=[]{room}")


def _stored(rates: KernelRates) -> str:
    """Returns the what-if of an FP8 run that recomputes nothing, which the trainer does not have."""
    attention, experts, saved = rates.attention.backward_input, rates.experts.backward_input, rates.recomputed
    values = {
        "attention.backward_input.products": attention.products - saved.mla_up,
        "attention.backward_input.other": attention.other - saved.norm,
        "experts.backward_input.other": experts.other - saved.swiglu,
    }
    return " + ".join(f"rates.{key}={_number(max(0.0, value))}" for key, value in values.items())


def _host_and_failures(config: TrainConfig) -> Wishes:
    if config.costs.offload is None:
        needs = "the time of a copy to host memory: costs.offload, with memory_cap"
        yield UnknownWish(name="faster link to host memory, for offload", needs=needs)
    else:
        yield Wish(name="link to host memory x 2", change="costs.offload/2")
    needs = "the time by which copies for the average of weights delay a step"
    yield UnknownWish(name="faster link to host memory, for EMA", needs=needs)
    if config.cost.gpu_mtbf_hours is None:
        needs = "cost.gpu_mtbf_hours, cost.checkpoint_seconds and cost.restart_seconds"
        yield UnknownWish(name="half the failures", needs=needs)
    else:
        yield Wish(name="half the failures", change="cost.gpu_mtbf_hours*2")


def _memory_rate(config: TrainConfig) -> tuple[float | None, float]:
    return config.cluster.memory_bytes_per_second, REFERENCE_MEMORY_BYTES_PER_SECOND


def _scaled(name: str, key: str, given: float | None, known: float, factor: float) -> Wish:
    """Returns a wish that multiplies a key, or sets it if the run leaves it to the rates."""
    change = f"{key}*{factor:g}" if given is not None else f"{key}={_number(known * factor)}"
    return Wish(name=name, change=change)


def _number(value: float) -> str:
    return f"{value:.6g}"
