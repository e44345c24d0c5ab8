"""Registers the dispatcher that uses DeepEP's kernels. Does not import torch."""

from typing import TYPE_CHECKING

from comm.config import EXCHANGE_CTAS, DeepEPDispatchConfig
from comm.dispatch.deepep.package import PACKAGE, BufferShape, DeepEPError
from comm.dispatch.registry import (
    DISPATCHERS,
    INDEX_BYTES,
    Contract,
    ContractSetting,
    DispatcherEntry,
    DispatchMemory,
    DispatchRequirementError,
    DispatchSite,
    RowBytes,
    TokenSizes,
    order_bytes,
    require_node_cap,
)

if TYPE_CHECKING:
    from comm.dispatch.build import DispatcherParts
    from comm.protocol import Dispatcher


def _build(config: DeepEPDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.deepep.dispatcher import DeepEPDispatcher

    shape = _shape(parts.tokens, parts.timeout_seconds, parts.kernels.max_ctas)
    max_nodes = config.max_nodes if config.node_cap == "verify" else None
    return DeepEPDispatcher(parts.group, parts.num_experts, parts.layout, parts.lane, parts.observers, shape, max_nodes)


def _require_kernels(config: DeepEPDispatchConfig, site: DispatchSite) -> None:
    """Requires CUDA, NCCL, bf16 rows and sizes of its kernels; `launch.ranks.machine` finds the package."""
    cluster = site.cluster
    if (cluster.device, cluster.backend) != ("cuda", "nccl"):
        raise DispatchRequirementError(
            f"dispatch: {config.kind} needs cluster.device=cuda and cluster.backend=nccl, is {config.kind} with "
            f"cluster.device={cluster.device} and cluster.backend={cluster.backend}; nearest valid: dispatch=two_hop"
        )
    if site.precision not in ("bf16", "fp8"):
        raise DispatchRequirementError(
            f"dispatch: {config.kind} moves bf16 rows and needs precision=bf16 or fp8, is {config.kind} with "
            f"precision={site.precision}; nearest valid: dispatch=two_hop"
        )
    try:
        _shape(site.tokens, cluster.timeout_seconds)
    except DeepEPError as error:
        raise DispatchRequirementError(str(error)) from error


def _shape(tokens: TokenSizes, timeout_seconds: float, num_sms: int = EXCHANGE_CTAS) -> BufferShape:
    return BufferShape(
        max_tokens=tokens.max_tokens,
        hidden_size=tokens.hidden_size,
        num_choices=tokens.num_choices,
        timeout_seconds=timeout_seconds,
        num_sms=num_sms,
    )


def _memory(config: DeepEPDispatchConfig, site: DispatchSite, rows: RowBytes) -> DispatchMemory:
    # DeepEP's buffer holds a row for each token and rank that may send, and a copy is sorted by expert.
    reached = rows.num_tokens * min(site.tokens.num_choices, site.parallelism.expert)
    return DispatchMemory(
        routing=order_bytes(site, rows) + 2 * INDEX_BYTES * rows.num_arrived,
        to_experts=2 * reached * rows.to_experts,
        from_experts=2 * reached * rows.from_experts,
    )


DISPATCHERS.register(
    "deepep",
    DispatcherEntry(
        name="deepep",
        summary="DeepEP's kernels, on CUDA and with the package deep_ep",
        config=DeepEPDispatchConfig,
        build=_build,
        requirements=(_require_kernels, require_node_cap),
        memory=_memory,
        contract=Contract(
            settings={
                "1": ContractSetting(nodes=(0,), is_slow=True),
                "1+1": ContractSetting(nodes=(0, 1)),
                "4": ContractSetting(nodes=(0, 0, 0, 0), is_slow=True),
                "2+2": ContractSetting(nodes=(0, 0, 1, 1), is_slow=True),
            },
            row_types=("bfloat16",),
            weights_type="float32",
            hidden_size=256,
            package=PACKAGE,
        ),
    ),
)
