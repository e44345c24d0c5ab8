"""Objectives over pairs of answers, and the log-probabilities that they need of a reference model."""
