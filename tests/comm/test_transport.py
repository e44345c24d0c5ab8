import os
import threading
import time
from typing import Literal
from unittest import mock

import pytest
import torch
from torch import Tensor, distributed

from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.transfers import (
    HEADER_BYTES,
    Header,
    LinkLog,
    MessageKey,
    PipelineTransport,
    TransferError,
    _DeviceLink,
)
from comm.watchdog.collective_log import CollectiveLog, CollectiveProgress
from tests.ranks import RanksFailedError, run_ranks


def _transport(rank: int, world_size: int, data: int = 1, log: CollectiveLog | None = None) -> PipelineTransport:
    num_stages = world_size // data
    layout = Layout(ParallelismConfig(pipeline=num_stages, data=data, expert=1), ranks_per_node=1)
    pairs = [(index, index + 1) for index in range(num_stages - 1)]
    return PipelineTransport(layout, pairs, torch.device("cpu"), 20.0, log or CollectiveLog())


def _key(
    source: int, destination: int, micro_batch: int, kind: Literal["activation", "gradient"] = "activation"
) -> MessageKey:
    return MessageKey(
        kind=kind, direction=0, stage=destination, micro_batch=micro_batch, source=source, destination=destination
    )


def _payload(key: MessageKey) -> Tensor:
    """Returns a payload whose shape and dtype differ between messages."""
    generator = torch.Generator().manual_seed(hash((key.kind == "gradient", key.micro_batch, key.source)))
    shape = [(3, 4), (2, 1, 5), (7,), (), (0, 4), (2, 128)][key.micro_batch % 6]
    dtype = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float32][key.micro_batch % 4]
    return torch.randn(shape, generator=generator).to(dtype)


def _exchange_all(rank: int, world_size: int, data: int, log: CollectiveLog | None = None) -> int:
    """Sends 12 messages on every link.

    Receives are posted and awaited link by link, in another order than sends.
    """
    index = rank // data
    with _transport(rank, world_size, data, log) as transport:
        peers = [peer for peer in (index - 1, index + 1) if 0 <= peer < world_size // data]
        kinds: list[Literal["activation", "gradient"]] = ["activation", "gradient"]
        for micro_batch in range(12):
            for peer in peers:
                for kind in kinds:
                    key = _key(index, peer, micro_batch, kind)
                    transport.send(key, _payload(key))
        receipts = []
        for peer in reversed(peers):
            for kind in reversed(kinds):
                for micro_batch in range(12):
                    key = _key(peer, index, micro_batch, kind)
                    like = _payload(key)
                    receipts.append((like, transport.post_receive(key, like.shape, like.dtype)))
        for like, receipt in reversed(receipts):
            got = receipt.wait()
            assert got.dtype == like.dtype
            assert got.shape == like.shape
            assert torch.equal(
                got.view(torch.uint8) if got.dim() else got, like.view(torch.uint8) if like.dim() else like
            )
        transport.flush()
    return len(receipts)


def test_transport_delivers_every_message_in_the_order_of_its_link() -> None:
    assert run_ranks(3, _exchange_all, 1) == [24, 48, 24]


def test_transport_links_the_pipeline_of_each_data_index_separately() -> None:
    assert run_ranks(4, _exchange_all, 2) == [24, 24, 24, 24]


def _log_all(rank: int, world_size: int) -> tuple[dict[str, str], dict[str, CollectiveProgress]]:
    log = CollectiveLog()
    _exchange_all(rank, world_size, 1, log)
    assert log.awaited() == []
    return log.order_hashes(), log.progress()


def test_transport_logs_every_message_equally_at_both_ends() -> None:
    ends = run_ranks(3, _log_all)
    links = {(kind, *ways) for kind in ("activation", "gradient") for ways in ((0, 1), (1, 0), (1, 2), (2, 1))}
    for kind, source, destination in links:
        name = f"{kind} {source}->{destination}"
        assert {rank for rank, (hashes, _) in enumerate(ends) if name in hashes} == {source, destination}
        assert ends[source][0][name] == ends[destination][0][name]
        assert ends[source][1][name] == ends[destination][1][name] == CollectiveProgress(started=12, finished=11)
    assert len({hashes[name] for hashes, _ in ends for name in hashes}) == len(links)


def _await_nobody(rank: int, world_size: int) -> str:
    log = CollectiveLog()
    transport = _transport(rank, world_size, log=log)
    receipt = transport.post_receive(_key(1, 0, 5, "gradient"), (2, 3), torch.float32) if rank == 0 else None
    waits: list[str] = []
    if receipt is not None:
        waiter = threading.Thread(target=receipt.wait)
        waiter.start()
        while not waits:
            waits = [str(operation) for operation, _ in log.awaited()]
    distributed.barrier()
    if rank == 1:
        transport.send(_key(1, 0, 5, "gradient"), torch.zeros(2, 3))
    else:
        waiter.join()
    transport.close()
    return "".join(waits)


def test_transport_logs_its_waits() -> None:
    assert run_ranks(2, _await_nobody)[0] == (
        "transfer of gradient 1->0 of direction 0, stage 0, micro-batch 5 (number 0 of group gradient 1->0)"
    )


def _send_before_receive(rank: int, world_size: int) -> tuple[float, Tensor]:
    big = torch.arange(1_000_000, dtype=torch.float32).view(1000, 1000).requires_grad_()
    seconds = 0.0
    out = big.T
    with _transport(rank, world_size) as transport:
        if rank == 0:
            begun = time.monotonic()
            for micro_batch in range(3):
                transport.send(_key(0, 1, micro_batch), big.T)
            seconds = time.monotonic() - begun
            distributed.barrier()
        else:
            distributed.barrier()  # the sender has finished before a receive is posted
            for micro_batch in range(3):
                out = transport.post_receive(_key(0, 1, micro_batch), (1000, 1000), torch.float32).wait()
    return seconds, out.detach()[:2].clone()


def test_transport_sends_strided_tensors_without_waiting_for_the_receiver() -> None:
    sent, received = run_ranks(2, _send_before_receive)
    assert sent[0] < 5
    assert torch.equal(sent[1], received[1])
    assert received[1][1, 0] == 1


_SMALL, _LARGE = (2, 3), (128, 64)  # of float32: one is sent with its header, the other follows it


def _disagree(
    rank: int, world_size: int, sent: tuple[int, ...], due: tuple[int, ...], micro_batch: int
) -> tuple[str, str, str]:
    """Sends from rank 0 another shape or micro-batch than rank 1 expects."""
    transport = _transport(rank, world_size)
    error = ("", "", "")
    if rank == 0:
        transport.send(_key(0, 1, micro_batch), torch.zeros(sent))
        transport.send(_key(0, 1, micro_batch + 1), torch.zeros(sent))
    else:
        receipt = transport.post_receive(_key(0, 1, 3), due, torch.float32)
        transport.post_receive(_key(0, 1, 4), due, torch.float32)
        try:
            receipt.wait()
        except TransferError as caught:
            error = (caught.place, caught.expected, caught.got)
    distributed.barrier()
    return error


@pytest.mark.parametrize("sent", [_SMALL, _LARGE])
@pytest.mark.parametrize("due", [_SMALL, _LARGE])
def test_transport_detects_an_unexpected_message(sent: tuple[int, ...], due: tuple[int, ...]) -> None:
    for micro_batch in (3, 4) if sent != due else (4,):
        place, expected, got = run_ranks(2, _disagree, sent, due, micro_batch)[1]
        assert place == "pipeline rank 1"
        assert f"micro-batch 3, float32{list(due)}" in expected
        assert f"micro-batch {micro_batch}, float32{list(sent)}" in got


def _lose_a_peer(rank: int, world_size: int) -> None:
    transport = _transport(rank, world_size)
    if rank == 1:
        distributed.barrier()
        os._exit(7)
    # Posted while the peer is alive: the error of an ended peer may be raised before the wait.
    receive = transport.post_receive(_key(1, 0, 0), (2, 3), torch.float32)
    distributed.barrier()
    receive.wait()


def test_transport_raises_if_a_peer_has_ended() -> None:
    with pytest.raises(RanksFailedError) as caught:
        run_ranks(2, _lose_a_peer)
    assert "rank 1 of 2: died with exit code 7" in str(caught.value)
    assert "rank 0 of 2: Traceback" in str(caught.value)
    assert "in _lose_a_peer" in str(caught.value)
    assert "in wait" in str(caught.value)


def _drop_at_once(rank: int, world_size: int, shape: tuple[int, ...]) -> bool:
    """Checks that a tensor arrives intact if its sender drops its reference before it has been sent."""
    whole = True
    with _transport(rank, world_size) as transport:
        if rank == 0:
            transport.send(_key(0, 1, 0), torch.full(shape, 5.0))
            others = [torch.full(shape, -1.0) for _ in range(20)]  # would reuse the freed memory
            distributed.barrier()
            transport.flush()
            del others
        else:
            distributed.barrier()
            whole = bool((transport.post_receive(_key(0, 1, 0), shape, torch.float32).wait() == 5).all())
    return whole


@pytest.mark.parametrize("shape", [_SMALL, _LARGE])
def test_transport_keeps_a_tensor_until_it_has_been_sent(shape: tuple[int, ...]) -> None:
    assert run_ranks(2, _drop_at_once, shape) == [True, True]


def _use_unknown_link(rank: int, world_size: int) -> str:
    with _transport(rank, world_size) as transport:
        try:
            transport.send(_key(rank, 2 - rank, 0), torch.zeros(1))
        except ValueError as error:
            return str(error)
    return ""


def test_transport_rejects_unknown_links() -> None:
    first, middle, last = run_ranks(3, _use_unknown_link)
    assert first.startswith("pipeline rank 0: a message must use one of the links 0->1 activation")
    assert first.endswith("is 0->2 activation")
    assert "is 1->1" in middle
    assert "is 2->0" in last


def test_header_survives_its_encoding() -> None:
    for micro_batch in range(12):
        key = _key(3, 2, micro_batch, "gradient")
        like = _payload(key)
        header = Header(key, like.dtype, tuple(like.shape))
        assert Header.decode(header.encode()) == header
        assert len(header.encode()) == HEADER_BYTES


class _FailedWork:
    """Send that has ended with an error, which only a wait raises."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        raise RuntimeError("NCCL: connection closed by remote peer")


def test_failed_send_between_devices_is_raised_by_the_next_send_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "send", lambda *args, **kwargs: None)
    monkeypatch.setattr(distributed, "isend", lambda *args, **kwargs: _FailedWork())
    log = CollectiveLog()
    link_log = LinkLog(log, "activation", (0, 1))
    link = _DeviceLink(mock.Mock(), 1, torch.device("cpu"), link_log, is_source=True)
    link.send(_key(0, 1, 0), torch.zeros(2))
    with pytest.raises(RuntimeError, match="connection closed"):
        link.send(_key(0, 1, 1), torch.zeros(2))
    assert [str(collective) for collective, _ in log.failed()] == [
        "transfer of activation 0->1 of direction 0, stage 1, micro-batch 0 (number 1 of group activation 0->1)"
    ]
