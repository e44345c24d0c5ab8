"""Generates the samples that a finished run shows, and keeps its answers."""
