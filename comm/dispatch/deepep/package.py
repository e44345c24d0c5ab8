"""Checks that DeepEP (deep_ep 2.1.0) is installed and supports given sizes. Does not import torch."""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

from comm.config import EXCHANGE_CTAS

PACKAGE = "deep_ep"
_HIDDEN_MULTIPLE = 256
_MOST_CHOICES = 32
_NCCL = (2, 30, 4)  # first version that the package supports


class DeepEPError(ValueError):
    """Raised if DeepEP is missing or its kernels do not support a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BufferShape:
    """Sizes for which DeepEP's kernels are compiled, equal on all ranks; raises DeepEPError."""

    max_tokens: int  # maximum number of tokens of a rank in a micro-batch
    hidden_size: int  # width of a row
    num_choices: int  # experts per token
    timeout_seconds: float  # time after which a kernel stops waiting for another rank
    num_sms: int = EXCHANGE_CTAS  # most SMs that the kernels occupy

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
    except (ImportError, AssertionError) as error:  # it asserts that the loaded NCCL is the one that it was built with
        raise DeepEPError(_missing(f"does not load ({error})")) from error
    if not hasattr(package, "ElasticBuffer"):
        version = getattr(package, "__version__", "of an unknown version")
        raise DeepEPError(_missing(f"{version} has no ElasticBuffer, as 2.1.0 has"))
    from torch.cuda import is_available, nccl

    if is_available() and (loaded := nccl.version()) < _NCCL:
        need, have = (".".join(map(str, numbers)) for numbers in (_NCCL, loaded))
        raise DeepEPError(_missing(f"needs NCCL {need} or later, and torch has loaded {have}"))
    return package


def _missing(what: str) -> str:
    return (
        f"dispatch: deepep needs the package {PACKAGE} (github.com/deepseek-ai/DeepEP) and CUDA, "
        f"but {PACKAGE} {what}; nearest valid: dispatch=two_hop"
    )
