"""Objectives besides cross-entropy: distillation, policy gradients, and pairs of answers."""
