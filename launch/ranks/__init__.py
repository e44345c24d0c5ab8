"""Ranks of a job on this machine: their processes, and what the machine can run."""
