"""Permutes numbers by a key in constant memory, for orders of billions of sequences. Imports no torch.

A Feistel network over an even number of bits is a bijection of its range for any round function. Numbers that it maps
beyond the size are mapped again until they are within (cycle walking), at most four times on average.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64


class KeyedPermutation:
    """A permutation of 0..size-1 that is the same on every machine. It holds no table."""

    def __init__(self, size: int, key: str) -> None:
        """Derives the permutation of `size` numbers, at least 1 and at most 2^62, from any text."""
        self.size = size
        self._half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.sha512(key.encode()).digest()
        self._keys = np.frombuffer(digest, "<u8", _ROUNDS)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the images of numbers from 0 to size - 1."""
        images = self._rounds(numbers.astype(np.uint64))
        while (outside := np.flatnonzero(images >= self.size)).size:
            images[outside] = self._rounds(images[outside])
        return images.astype(np.int64)

    def _rounds(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left = numbers >> self._half_bits
        right = numbers & self._mask
        for key in self._keys:
            mixed = right + key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _FACTORS[0]
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _FACTORS[1]
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self._mask)
        images: NDArray[np.uint64] = (left << self._half_bits) | right
        return images
