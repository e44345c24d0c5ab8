"""Turns text into batches of token sequences."""

from base import share_comm

share_comm()
