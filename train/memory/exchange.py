"""Predicts the bytes that a dispatcher holds for one layer and micro-batch, with equal expert loads."""

from comm.dispatch.registry import DISPATCHERS, RowBytes
from kernels.quantize import num_tiles
from model.account.activations import MicroBatchShape
from model.account.sizes import ExchangeBytes
from train.config import TrainConfig


def exchange_bytes(config: TrainConfig, shape: MicroBatchShape) -> ExchangeBytes:
    """Returns the bytes of one exchange.

    Args:
        shape: of a micro-batch; `expert_rows` is the number of rows that arrive at a rank.
    """
    assert shape.expert_rows is not None
    hidden_size = config.model.hidden_size
    full = hidden_size * shape.value_bytes
    is_fp8 = config.precision.kind == "fp8" or config.dispatch.payload == "fp8"
    rows = RowBytes(
        num_tokens=shape.num_tokens,
        num_arrived=shape.expert_rows,
        to_experts=hidden_size + 4 * num_tiles(hidden_size) if is_fp8 else full,
        from_experts=full,
    )
    held = DISPATCHERS.get(config.dispatch.kind).memory(config.dispatch, config.dispatch_site, rows)
    return ExchangeBytes(routing=held.routing, to_experts=held.to_experts, from_experts=held.from_experts)
