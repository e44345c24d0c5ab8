"""Measures links, products and copies of ranks, names slow ones, and saves times of the model."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import gather_present
from comm.config import ClusterConfig
from comm.layout import Layout
from train.run import write_probe
from train.start.plan import plan
from train.start.probe import measure
from verify.checks import Failure, Findings, Verification

_LINK_BYTES = {"cpu": 2**20, "cuda": 2**26}
_PRODUCT_SIZE = {"cpu": 192, "cuda": 8192}
_COPY_BYTES = {"cpu": 2**22, "cuda": 2**28}
_REPEATS = 5
_SLOWEST = {"cpu": 1 / 8, "cuda": 1 / 1.5}
"""Least rate over the median of all ranks. Ranks on a CPU share its cores, so that only large differences count."""
_LEAST_OF_PRESET = 0.5
_ATTEMPTS = 4  # a rank or link is slow if it is in each of them
_ALL_PAIRS = 16  # ranks up to which every pair is measured

Rates = dict[tuple[int, ...], float]
"""Rates per second by rank, or by pair of ranks."""


def check_rates(verification: Verification) -> Findings:
    """Measures ranks, links and the parts of the configured model, for `launch.plan rates=DIR`."""
    measured: dict[str, Rates] = {}
    slow: dict[str, dict[tuple[int, ...], float]] = {}
    for name, run in (("product", _product), ("copy", _copy), ("link", _links)):
        measured[name], slow[name] = _measure(run, verification.device)
    layout = Layout(verification.config.parallelism, verification.config.cluster.ranks_per_node)
    failures = [_slow_failure(name, place, share) for name, found in slow.items() for place, share in found.items()]
    failures += below_preset(measured, verification.config.cluster, layout)
    medians = {name: median(rates.values()) for name, rates in measured.items() if rates}
    verification.rates |= {
        f"{name} {' to '.join(map(str, place))}": f"{rate / 1e9:.4g} {_UNITS[name]}"
        for name, rates in measured.items()
        for place, rate in rates.items()
    }
    _save_times(verification)
    return Findings(
        summary=", ".join(f"{name} {rate / 1e9:.3g} {_UNITS[name]}" for name, rate in medians.items())
        + " as medians; times of the model's parts are saved for launch.plan rates=out_dir",
        failures=failures,
        tolerance=_SLOWEST[verification.device.type],
        measured=min((rate / medians[name] for name, rates in measured.items() for rate in rates.values()), default=1),
    )


_UNITS = {"product": "GFLOP/s", "copy": "GB/s", "link": "GB/s"}


def _measure(run: Callable[[torch.device], Rates], device: torch.device) -> tuple[Rates, dict[tuple[int, ...], float]]:
    """Returns the best rates of all ranks and, with their share of the median, those that stay slow."""
    best: Rates = {}
    for _ in range(_ATTEMPTS):
        for rates in gather_present(run(device) or None):
            for place, rate in rates.items():
                best[place] = max(rate, best.get(place, 0.0))
        slow = slow_places(best, _SLOWEST[device.type])
        if not slow:
            break
    return best, slow


def slow_places(rates: Rates, least: float) -> dict[tuple[int, ...], float]:
    """Returns places with a rate below a share of the median, and that share.

    A rank all of whose links are slow is one place. Of two ranks, the median is the faster one's.
    """
    if len(rates) < 2:
        return {}
    middle = sorted(rates.values())[len(rates) // 2]
    slow = {place: rate / middle for place, rate in rates.items() if rate < least * middle}
    ranks = {rank for place in rates for rank in place}
    for rank in sorted(ranks):
        own = [place for place in rates if rank in place and len(place) > 1]
        if len(own) > 1 and all(place in slow for place in own) and len(own) < len(rates):
            share = max(slow[place] for place in own)
            slow = {place: rate for place, rate in slow.items() if rank not in place} | {(rank,): share}
    return slow


def _slow_failure(name: str, place: tuple[int, ...], share: float) -> Failure:
    causes = {
        "product": "another process uses this device or core, or it is throttled",
        "copy": "another process uses this memory, or a slower bus",
        "link": "a slower cable or network interface, or a path over another one (NCCL_SOCKET_IFNAME, NCCL_IB_HCA)",
    }
    subject = f"link between ranks {place[0]} and {place[1]}" if len(place) > 1 else f"{name} rate"
    if name == "link" and len(place) == 1:
        subject = "all links of the rank"
    return Failure(
        rank=place[0], subject=subject, difference=f"reaches {share:.2g} times the median", cause=causes[name]
    )


def below_preset(measured: Mapping[str, Rates], cluster: ClusterConfig, layout: Layout) -> Iterator[Failure]:
    """Yields what reaches less than half of what the cluster's preset says, if it says it."""
    for name, rates in measured.items():
        for place, rate in rates.items():
            key, preset = "memory_bytes_per_second", cluster.memory_bytes_per_second
            if name == "product":
                key, preset = "peak_flops", cluster.peak_flops
            elif name == "link":
                is_near = len({layout.node_of(rank) for rank in place}) == 1
                key = "intra_node_bytes_per_second" if is_near else "inter_node_bytes_per_second"
                preset = getattr(cluster, key)
            if preset is not None and rate < _LEAST_OF_PRESET * preset:
                difference = f"is {rate / preset:.2g} of cluster.{key}={preset:g}"
                cause = "another device than the cluster's preset describes, or a wrong setup of drivers and network"
                yield Failure(
                    rank=place[0], subject=f"{name} rate of {list(place)}", difference=difference, cause=cause
                )


def _save_times(verification: Verification) -> None:
    """Writes `probe.json` into the folder: the parts of the configured model, on the configured layout."""
    config = replace(verification.config, resume=None)
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    planned = plan(config, layout, verification.device)
    if planned.times is None:  # schedule=auto has measured them
        planned = replace(planned, times=measure(config, layout, verification.device))
    write_probe(replace(config, out_dir=str(verification.folder)), planned, verification.device)


def _best(device: torch.device, run: Callable[[], object]) -> float:
    """Returns the least seconds of several runs, without the first."""
    seconds = []
    for _ in range(1 + _REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _product(device: torch.device) -> Rates:
    size = _PRODUCT_SIZE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    factor = torch.ones(size, size, dtype=dtype, device=device)
    return {(dist.get_rank(),): 2 * size**3 / _best(device, lambda: factor @ factor)}


def _copy(device: torch.device) -> Rates:
    size = _COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # A copy reads and writes.
    return {(dist.get_rank(),): 2 * size / _best(device, lambda: target.copy_(source))}


def _links(device: torch.device) -> Rates:
    """Measures pairs of ranks, in rounds with one partner each; the lower rank returns the rate."""
    rank = dist.get_rank()
    on_device = device if dist.get_backend() == "nccl" else torch.device("cpu")
    rows = torch.zeros(_LINK_BYTES[device.type], dtype=torch.uint8, device=on_device)
    rates: Rates = {}
    for partner in partners(rank, dist.get_world_size()):
        dist.barrier()
        if partner is not None:
            seconds = _best(device, partial(_ping_pong, rows, partner, rank))
            if rank < partner:
                rates[rank, partner] = 2 * rows.numel() / seconds
    return rates


def _ping_pong(rows: Tensor, partner: int, rank: int) -> None:
    for is_sending in (True, False) if rank < partner else (False, True):
        if is_sending:
            dist.send(rows, partner)
        else:
            dist.recv(rows, partner)


def partners(rank: int, world_size: int) -> Sequence[int | None]:
    """Returns the partner of a rank in each round: all ranks, or in large jobs at powers of two."""
    if world_size <= _ALL_PAIRS:
        # Two ranks meet in the round that their sum has modulo the number of rounds.
        rounds = [(number - rank) % world_size for number in range(world_size)]
        return [None if other == rank else other for other in rounds]
    others: list[int | None] = []
    distance = 1
    while distance < world_size:
        for parity in (0, 1):
            is_lower = rank // distance % 2 == parity
            other = rank + distance if is_lower else rank - distance
            others.append(other if 0 <= other < world_size else None)
        distance *= 2
    return others
