"""Replays the sampler's choice of experts in training."""
