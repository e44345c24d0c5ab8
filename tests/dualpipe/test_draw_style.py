"""Colors are distinct for color-blind readers, and numbers have enough contrast."""

from itertools import combinations
from math import dist

import pytest

from dualpipe.draw import style


def linear(color: str) -> list[float]:
    values = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]


def lightness_and_hue(rgb: list[float]) -> tuple[float, float, float]:
    """Converts to CIE L*a*b* under D65."""
    red, green, blue = (min(1.0, max(0.0, value)) for value in rgb)
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    roots = [value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z)]
    return 116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])


# Machado, Oliveira and Fernandes 2009, severity 1: deuteranopia, protanopia, tritanopia.
EYES = {
    "any": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("eye", EYES)
def test_colors_are_distinct_with_color_blindness(eye: str) -> None:
    colors = [*style.LIGHT.values(), *style.DARK.values(), *style.COPIES.values()]
    seen = [
        lightness_and_hue([sum(a * b for a, b in zip(row, linear(color), strict=True)) for row in EYES[eye]])
        for color in colors
    ]
    assert min(dist(one, two) for one, two in combinations(seen, 2)) >= 20


def test_numbers_have_contrast_to_their_cells() -> None:
    def luminance(color: str) -> float:
        red, green, blue = linear(color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert all(
        (luminance(color) + 0.05) / (luminance("#16181b") + 0.05) >= 4.5
        for color in (style.LIGHT | style.COPIES).values()
    )
    # 4.3 for the lightest of the dark ones: a darker olive would be too similar to the brown next to it.
    assert all(1.05 / (luminance(color) + 0.05) >= 4.3 for color in style.DARK.values())
