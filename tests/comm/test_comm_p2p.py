import time
from typing import Literal

import torch
from torch import Tensor, distributed

from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.message import HEADER_BYTES, Header, MessageKey, TransferError
from comm.p2p import Transport, adjacent_pairs
from tests.ranks import run_ranks


def _transport(rank: int, world_size: int, data: int = 1) -> Transport:
    num_stages = world_size // data
    layout = Layout(ParallelismConfig(pipeline=num_stages, data=data, expert=1), ranks_per_node=1)
    return Transport(layout, adjacent_pairs(num_stages), torch.device("cpu"), timeout_seconds=20.0)


def _key(
    source: int, destination: int, micro_batch: int, kind: Literal["activation", "gradient"] = "activation"
) -> MessageKey:
    return MessageKey(
        kind=kind, direction=0, stage=destination, micro_batch=micro_batch, source=source, destination=destination
    )


def _payload(key: MessageKey) -> Tensor:
    """Of a shape and type that differ from message to message."""
    generator = torch.Generator().manual_seed(hash((key.kind == "gradient", key.micro_batch, key.source)))
    shape = [(3, 4), (2, 1, 5), (7,), (), (0, 4), (2, 128)][key.micro_batch % 6]
    dtype = [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.float32][key.micro_batch % 4]
    return torch.randn(shape, generator=generator).to(dtype)


def _exchange_all(rank: int, world_size: int, data: int) -> int:
    """Every link carries 12 messages; receives are posted and awaited link by link, unlike the order of sends."""
    index = rank // data
    with _transport(rank, world_size, data) as transport:
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


def test_transport_links_each_data_index_s_pipeline_by_itself() -> None:
    assert run_ranks(4, _exchange_all, 2) == [24, 24, 24, 24]


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
            distributed.barrier()  # the sender is through before anything is posted here
            for micro_batch in range(3):
                out = transport.post_receive(_key(0, 1, micro_batch), (1000, 1000), torch.float32).wait()
    return seconds, out.detach()[:2].clone()


def test_transport_sends_strided_tensors_without_waiting_for_the_receiver() -> None:
    sent, received = run_ranks(2, _send_before_receive)
    assert sent[0] < 5
    assert torch.equal(sent[1], received[1])
    assert received[1][1, 0] == 1


def _disagree(rank: int, world_size: int) -> list[tuple[str, str, str]]:
    """Rank 0 sends what rank 1 does not expect: another micro-batch, a larger shape, another type."""
    transport = _transport(rank, world_size)
    sends = [(_key(0, 1, 4), torch.zeros(2, 3)), (_key(0, 1, 5, "gradient"), torch.zeros(64, 64))]
    if rank == 0:
        for key, tensor in sends:
            transport.send(key, tensor)
        transport.send(_key(0, 1, 6), torch.zeros(3))
        distributed.barrier()
        return []
    receipts = [
        transport.post_receive(_key(0, 1, 3), (2, 3), torch.float32),
        transport.post_receive(_key(0, 1, 5, "gradient"), (2, 3), torch.float32),
    ]
    errors = []
    for receipt in receipts:
        try:
            receipt.wait()
        except TransferError as error:
            errors.append((error.place, error.expected, error.got))
    distributed.barrier()
    return errors


def test_transport_detects_a_message_that_is_not_the_one_due() -> None:
    wrong_batch, wrong_shape = run_ranks(2, _disagree)[1]
    assert wrong_batch[0] == "pipeline rank 1"
    assert "micro-batch 3" in wrong_batch[1]
    assert "micro-batch 4" in wrong_batch[2]
    assert "float32[2, 3]" in wrong_shape[1]
    assert "float32[64, 64]" in wrong_shape[2]


def _use_unknown_link(rank: int, world_size: int) -> str:
    with _transport(rank, world_size) as transport:
        try:
            transport.send(_key(rank, 2 - rank, 0), torch.zeros(1))
        except ValueError as error:
            return str(error)
    return ""


def test_transport_refuses_links_it_does_not_have() -> None:
    first, middle, last = run_ranks(3, _use_unknown_link)
    assert first.startswith("pipeline rank 0: a message must take one of the links 0->1 activation")
    assert first.endswith("got 0->2 activation")
    assert "got 1->1" in middle
    assert "got 2->0" in last


def test_header_survives_its_encoding() -> None:
    for micro_batch in range(12):
        key = _key(3, 2, micro_batch, "gradient")
        like = _payload(key)
        header = Header(key, like.dtype, tuple(like.shape))
        assert Header.decode(header.encode()) == header
        assert len(header.encode()) == HEADER_BYTES
