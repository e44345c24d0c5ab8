"""Defines the network as phases."""

from base import share_comm

share_comm()
