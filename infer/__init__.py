"""Generation with trained weights."""

from base import share_comm

share_comm()
