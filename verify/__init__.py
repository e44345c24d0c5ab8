"""Verifies a job's ranks, links and numbers before a run: the checks of `python -m launch.verify`."""

from base import share_comm

share_comm()
