"""Evaluation of trained weights: tasks, requests, samples and results."""

from base import share_comm

share_comm()
