"""Compares exchange with computation, and finds the link rate at which they are equal. No torch here."""

from dataclasses import dataclass, replace

from train.config import TrainConfig
from train.planner.config import KernelRates, Rates
from train.planner.rows import rows_per_token
from train.planner.timing import part_seconds

_SLOWER = 1e-6
_EQUAL = 1 - 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkBalance:
    """Exchange next to computation of one MoE layer, for one F overlapped with one full backward.

    Attributes:
        exchange_seconds: dispatch and combine of both.
        compute_seconds: computation of both.
        link_bytes_per_second: rate of the link between nodes; None if it is unknown.
        break_even_bytes_per_second: rate of that link below which exchange is longer than computation; None if the
            link is unknown or not used, or if the link within a node is slower than computation by itself.
        limit: what limits the exchange.
    """

    exchange_seconds: float
    compute_seconds: float
    link_bytes_per_second: float | None
    break_even_bytes_per_second: float | None
    limit: str

    @property
    def ratio(self) -> float:
        """Exchange over computation."""
        return self.exchange_seconds / self.compute_seconds if self.compute_seconds else 0.0

    @property
    def hidden(self) -> str:
        """The side that the other one hides."""
        if not self.exchange_seconds:
            return "none: there is no exchange"
        return "exchange" if self.exchange_seconds <= self.compute_seconds else "computation"

    @property
    def margin(self) -> float | None:
        """Factor by which the link is faster than the break-even rate; below 1, it is slower."""
        if self.link_bytes_per_second is None or self.break_even_bytes_per_second is None:
            return None
        return self.link_bytes_per_second / self.break_even_bytes_per_second


def link_balance(config: TrainConfig, rates: Rates) -> LinkBalance:
    """Returns the balance of a run's MoE layers.

    Args:
        rates: measured times that apply to it.
    """
    moe, link = part_seconds(rates, config).moe.work, link_rate(config, rates)
    even, limit = None, "nothing is exchanged"
    if moe.exchange:
        across, within = moe.exchange, 0.0
        if not rows_per_token(config).across_nodes:
            across = 0.0
        elif isinstance(rates, KernelRates) and link is not None:
            # On a link this slow, nothing within a node is a limit, and time is inversely proportional to its rate.
            across = _moe_exchange(config, rates, link * _SLOWER) * _SLOWER
            within = _moe_exchange(config, rates, link / _SLOWER)
        limit = "link between nodes" if across >= moe.exchange * _EQUAL else "link within a node"
        if link is not None and within < moe.compute:
            even = link * across / moe.compute or None
    return LinkBalance(
        exchange_seconds=moe.exchange,
        compute_seconds=moe.compute,
        link_bytes_per_second=link,
        break_even_bytes_per_second=even,
        limit=limit,
    )


def _moe_exchange(config: TrainConfig, rates: Rates, link: float) -> float:
    """Returns the exchange of a MoE layer with another link between nodes."""
    cluster = replace(config.cluster, inter_node_bytes_per_second=link)
    return part_seconds(rates, replace(config, cluster=cluster)).moe.work.exchange


def link_rate(config: TrainConfig, rates: Rates) -> float | None:
    """Returns the rate of the link between nodes that a plan uses; None if it is unknown."""
    rate = config.cluster.inter_node_bytes_per_second
    if rate is None and isinstance(rates, KernelRates):
        rate = rates.reference.inter_node_bytes_per_second
    return rate
