"""Registers the dispatcher that uses DeepEP's kernels (deep_ep 2.1.0), and checks that they support a run's sizes.

Does not import torch.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from comm.config import DeepEPDispatchConfig
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

PACKAGE = "deep_ep"
_HIDDEN_MULTIPLE = 256
_MOST_CHOICES = 32


class DeepEPError(ValueError):
    """Raised if DeepEP is missing or its kernels do not support a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferShape:
    """Sizes for which DeepEP's kernels are compiled, equal on all ranks; raises DeepEPError."""

    max_tokens: int  # maximum number of tokens of a rank in a micro-batch
    hidden_size: int  # width of a row
    num_choices: int  # experts per token
    timeout_seconds: float  # time after which a kernel stops waiting for another rank

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise DeepEPError(f"dispatch: deepep needs at least 1 token, has {self.max_tokens}")
        if self.hidden_size < 1 or self.hidden_size % _HIDDEN_MULTIPLE:
            below = self.hidden_size // _HIDDEN_MULTIPLE * _HIDDEN_MULTIPLE
            nearest = f"{below} or {below + _HIDDEN_MULTIPLE}" if below > 0 else f"{_HIDDEN_MULTIPLE}"
            raise DeepEPError(
                f"dispatch: deepep needs a hidden size that is a multiple of {_HIDDEN_MULTIPLE}, "
                f"has {self.hidden_size}; nearest valid: {nearest}, or dispatch=two_hop"
            )
        if not 1 <= self.num_choices <= _MOST_CHOICES:
            raise DeepEPError(
                f"dispatch: deepep needs 1 to {_MOST_CHOICES} experts per token, has {self.num_choices}; "
                f"nearest valid: {min(max(self.num_choices, 1), _MOST_CHOICES)}, or dispatch=two_hop"
            )


def check_available() -> None:
    """Raises DeepEPError if the package is not installed, without importing it."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise DeepEPError(_missing("is not installed"))


def load_package() -> Any:
    """Imports the package, which initializes CUDA; raises DeepEPError if that is not possible."""
    check_available()
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError as error:
        raise DeepEPError(_missing(f"does not load ({error})")) from error
    if not hasattr(package, "ElasticBuffer"):
        version = getattr(package, "__version__", "of an unknown version")
        raise DeepEPError(_missing(f"{version} has no ElasticBuffer, as 2.1.0 has"))
    return package


def _missing(what: str) -> str:
    return (
        f"dispatch: deepep needs the package {PACKAGE} (github.com/deepseek-ai/DeepEP) and CUDA, "
        f"but {PACKAGE} {what}; nearest valid: dispatch=two_hop"
    )


def _build(config: DeepEPDispatchConfig, parts: "DispatcherParts") -> "Dispatcher":
    from comm.dispatch.deepep.dispatcher import DeepEPDispatcher

    shape = _shape(parts.tokens, parts.timeout_seconds)
    max_nodes = config.max_nodes if config.node_cap == "verify" else None
    return DeepEPDispatcher(parts.group, parts.num_experts, parts.layout, parts.lane, parts.observers, shape, max_nodes)


def _require_kernels(config: DeepEPDispatchConfig, site: DispatchSite) -> None:
    """Requires CUDA, NCCL, bf16 rows, the package `deep_ep`, and sizes that its kernels support."""
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
        check_available()
        _shape(site.tokens, cluster.timeout_seconds)
    except DeepEPError as error:
        raise DispatchRequirementError(str(error)) from error


def _shape(tokens: TokenSizes, timeout_seconds: float) -> BufferShape:
    return BufferShape(
        max_tokens=tokens.max_tokens,
        hidden_size=tokens.hidden_size,
        num_choices=tokens.num_choices,
        timeout_seconds=timeout_seconds,
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
