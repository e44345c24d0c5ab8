"""Rejection sampling: reads problems, samples and scores answers, and selects those that may be trained on."""
