"""An exchange reads numbers from the device once, in its plan.

Every other read would stall the lane on a GPU.

The test needs no GPU: it searches the operations on a CPU for those that would make the host wait for a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.permute.reference
from comm.lane import InlineLane
from tests.comm.backends import Setting, maker, watching
from tests.host_reads import Reads
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def _permute(rows_ND: Tensor, source_A: Tensor, out_AD: Tensor | None = None) -> Tensor:
    """Permutes rows like the GPU kernel, which does not read the indices on the host."""
    rows_AD = rows_ND.index_select(0, source_A.clamp(min=0)).masked_fill(source_A[:, None] < 0, 0)
    return rows_AD if out_AD is None else out_AD.copy_(rows_AD)


def _unpermute(rows_AD: Tensor, places_TK: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    rows_KND = torch.stack([_permute(rows_AD, places_N) for places_N in places_TK.unbind(1)])
    return rows_KND.sum(0).to(dtype or rows_AD.dtype)


def _count_reads(rank: int, world_size: int, setting: Setting) -> tuple[list[str], list[int]]:
    """Counts the reads in the exchanges of one handle, and the numbers that plans read."""
    kernels.permute.reference.permute, kernels.permute.reference.unpermute = _permute, _unpermute
    read: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: Any) -> Any:
        read.append(tensor.numel())
        return tolist(tensor)

    generator = torch.Generator().manual_seed(rank)
    ids_TK = torch.rand(20, 12, generator=generator).topk(4, -1).indices.masked_fill(torch.rand(20, 4) < 0.2, -1)
    rows_TD, weights_TK = torch.rand(20, 6, generator=generator), torch.rand(20, 4, generator=generator)
    dispatcher = maker(setting, 12, watching())(InlineLane())
    reads = Reads()
    setattr(Tensor, "tolist", counted)  # noqa: B010
    with reads:
        handle = dispatcher.plan(ids_TK)
        arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
        dispatcher.combine(arrived.rows_AD, handle).wait()
        dispatcher.combine_backward(rows_TD, handle).wait()
        dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A, handle).wait()
    assert reads.num_seen > 100
    return reads.found, read


@pytest.mark.parametrize("backend", ["all_to_all", "two_hop"])
def test_exchange_reads_from_the_device_once(backend: str) -> None:
    for found, read in run_ranks(4, _count_reads, Setting(backend, (0, 0, 1, 1), {"chunks": 2}, max_nodes=2)):
        assert found == []
        assert len(read) == 1


def test_reads_are_found() -> None:
    marked, lengths = torch.tensor([True, False]), torch.tensor([1, 2])
    reading: list[Callable[[], object]] = [
        lambda: lengths[marked],
        lambda: marked.nonzero(),
        lambda: lengths.max().item(),
        lambda: bool(marked.any()),
        lambda: lengths.repeat_interleave(lengths),
    ]
    for read in reading:
        with Reads() as reads:
            read()
        assert reads.found
    with Reads() as reads:
        lengths.repeat_interleave(lengths, output_size=3)
    assert not reads.found
