"""What a dispatcher holds for one layer and micro-batch, in bytes, if every expert receives equally many rows.

Row counts that depend on the routing are taken at their largest: a token that goes to K experts reaches K ranks, and
as many nodes as the dispatcher allows.
"""

from typing import assert_never

from kernels.quantize import num_tiles
from model.account.activations import MicroBatchShape
from model.account.sizes import ExchangeBytes
from train.config import TrainConfig

_INDEX_BYTES = 8


def exchange_bytes(config: TrainConfig, shape: MicroBatchShape) -> ExchangeBytes:
    """Returns the bytes of one exchange.

    Args:
        config: of the run.
        shape: of a micro-batch; `expert_rows` is what arrives at a rank.
    """
    assert shape.expert_rows is not None
    model, arrived = config.model, shape.expert_rows
    copies = shape.num_tokens * model.num_experts_per_token
    full = model.hidden_size * shape.value_bytes
    is_fp8 = config.precision.kind == "fp8" or config.dispatch.payload == "fp8"
    sent = model.hidden_size + 4 * num_tiles(model.hidden_size) if is_fp8 else full
    order = 3 * _INDEX_BYTES * copies
    match config.dispatch.kind:
        case "local":
            return ExchangeBytes(routing=order, to_experts=0, from_experts=0)
        case "all_to_all":
            # Rows of several experts arrive by source and are sorted: two more index tensors, and a copy.
            is_sorted = config.parallelism.expert > 1 and model.num_routed_experts > config.parallelism.expert
            routing = order + (2 * _INDEX_BYTES * arrived if is_sorted else 0)
            copied = arrived if is_sorted else 0
            return ExchangeBytes(
                routing=routing,
                to_experts=(copies + copied) * sent,
                from_experts=(copies + copied) * full,
            )
        case "two_hop":
            return _two_hop(config, shape, sent, full)
        case "deepep":
            # DeepEP's own buffer holds a row for each token and rank that may send, and a copy is sorted by expert.
            reached = shape.num_tokens * min(model.num_experts_per_token, config.parallelism.expert)
            return ExchangeBytes(
                routing=order + 2 * _INDEX_BYTES * arrived,
                to_experts=2 * reached * sent,
                from_experts=2 * reached * full,
            )
        case _ as other:
            assert_never(other)


def _two_hop(config: TrainConfig, shape: MicroBatchShape, sent: int, full: int) -> ExchangeBytes:
    assert config.dispatch.kind == "two_hop"
    assert shape.expert_rows is not None
    parallelism, choices, tokens = config.parallelism, config.model.num_experts_per_token, shape.num_tokens
    per_node = min(parallelism.expert, config.cluster.ranks_per_node)
    num_nodes = -(-parallelism.expert // per_node)
    # A token's row crosses to the other nodes that it touches, and reaches every rank that it touches.
    crossing = tokens * min(config.dispatch.max_nodes, num_nodes - 1, choices)
    reached = tokens * min(choices, parallelism.expert)
    places = tokens * (num_nodes - 1 + per_node)
    numbers = 2 * places + reached + reached + crossing * per_node + 2 * shape.expert_rows + reached * choices
    chunk = -(-crossing // config.dispatch.chunks)
    return ExchangeBytes(
        routing=_INDEX_BYTES * numbers + 2 * tokens * choices,
        to_experts=(reached + 3 * chunk) * sent,
        from_experts=(reached + 3 * chunk) * full,
    )
