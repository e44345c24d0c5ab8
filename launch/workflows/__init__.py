"""Workflows of several commands: their parts, progress and results."""
