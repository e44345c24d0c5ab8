"""Names of the implementations of attention. No torch here: configurations hold them."""

from typing import Literal

AttentionKind = Literal["auto", "sdpa", "flash_attention", "flex"]
"""As asked for; `auto`: the best for the device that is installed."""

FusedKind = Literal["sdpa", "flash_attention", "flex"]
"""As used."""
