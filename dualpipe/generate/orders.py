"""Known orders, cut to any number of ranks and micro-batches: where the search for a better one begins.

Both are bidirectional and of an even number of ranks and of micro-batches: the mirror image of ZB-V, which needs as few
as one micro-batch per direction and no more than P activations, and the published DualPipe with W taken out of every
B. An odd number of ranks is an even one less a rank (its lower bound is the same, floor((P-1)/2) of equal F, I
and W), an odd number of micro-batches an even one less a micro-batch.
"""

from collections.abc import Iterator
from dataclasses import replace

from dualpipe.costs import CostModel
from dualpipe.generate.dualpipe import dualpipe
from dualpipe.generate.shrink import without_micro_batch, without_rank
from dualpipe.generate.zero_bubble import zb_v
from dualpipe.ir import Schedule
from dualpipe.memory import peak_memory
from dualpipe.mirror import mirror
from dualpipe.passes import split_backwards
from dualpipe.weights import place_weights

_PATIENCE = (0.0, 0.5)


def known_orders(
    kind: str, num_ranks: int, num_micro_batches: int, costs: CostModel, memory_cap: float
) -> Iterator[Schedule]:
    """Candidates, none of them fused, within the memory cap; the likeliest first.

    Args:
        kind: what they are called.
        num_ranks: at least 1.
        num_micro_batches: at least 1.
        costs: by which W is placed.
        memory_cap: in the unit of `StageCosts.activation`.
    """
    even_ranks, even_count = num_ranks + num_ranks % 2, num_micro_batches + num_micro_batches % 2
    bases = [mirror(zb_v(even_ranks // 2, even_count // 2))]
    if even_count >= 2 * even_ranks:
        bases.insert(0, split_backwards(dualpipe(even_ranks, even_count)))
    for base in bases:
        for order in _cut(replace(base, kind=kind), num_ranks, num_micro_batches):
            if max(peak_memory(order, costs)) <= memory_cap + 1e-9:
                yield order
            for patience in _PATIENCE:
                yield from filter(None, [place_weights(order, costs, memory_cap, patience)])


def _cut(base: Schedule, num_ranks: int, num_micro_batches: int) -> Iterator[Schedule]:
    """Less an outer or a middle rank, less the last, the first or the middle micro-batch of direction 1."""
    half, share = base.num_ranks // 2, base.num_micro_batches // 2
    ranks = sorted({0, half - 1}) if base.num_ranks > num_ranks else [None]
    left_out = (
        sorted({0, share // 2, share - 1}, reverse=True) if base.num_micro_batches > num_micro_batches else [None]
    )
    for micro_batch in left_out:
        for rank in ranks:
            order = base if rank is None else without_rank(base, rank)
            yield order if micro_batch is None else without_micro_batch(order, 1, micro_batch)
