"""Evaluation on the ranks of a pipeline, and during training."""
