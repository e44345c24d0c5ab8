"""Assembles a training run and runs it."""

from base import share_comm

share_comm()
