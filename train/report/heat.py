"""Heat maps: a grid of numbers as a small PNG of its own, set into SVG with an axis of steps."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Load over the mean, from a quarter (or less) to four times (or more), by its logarithm.
_COLD, _EVEN, _HOT = (33, 99, 201), (240, 240, 236), (178, 34, 0)
_SHADES = 65
_OCTAVES = 2.0


def relative_shades(share_RC: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Palette numbers for loads over their mean; NaN is the mean's."""
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.log2(share_RC)
    octaves = np.clip(np.nan_to_num(octaves, nan=0.0, neginf=-_OCTAVES, posinf=_OCTAVES), -_OCTAVES, _OCTAVES)
    shades: NDArray[np.uint8] = np.rint((octaves + _OCTAVES) / (2 * _OCTAVES) * (_SHADES - 1)).astype(np.uint8)
    return shades


def palette() -> list[tuple[int, int, int]]:
    """Blue for little, nearly white for the mean, red for much."""
    middle = (_SHADES - 1) // 2
    below = [_mixed(_COLD, _EVEN, place / middle) for place in range(middle)]
    return [*below, *(_mixed(_EVEN, _HOT, place / middle) for place in range(middle + 1))]


def legend_gradient() -> str:
    """The palette for CSS, from left to right."""
    return "linear-gradient(to right," + ",".join(f"rgb({red},{green},{blue})" for red, green, blue in palette()) + ")"


def png(shades_RC: NDArray[np.uint8], colours: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette image, one pixel for a number."""
    rows, columns = shades_RC.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(shades_RC))
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(value for colour in colours for value in colour)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def image(shades_RC: NDArray[np.uint8], x: float, y: float, width: float, height: float) -> str:
    """An SVG `<image>` that holds the grid, each number a rectangle with sharp edges."""
    content = base64.b64encode(png(shades_RC, palette())).decode()
    return (
        f'<image x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{content}"/>'
    )


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _mixed(start: tuple[int, int, int], end: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(one + (other - one) * share) for one, other in zip(start, end, strict=True))
    return red, green, blue
