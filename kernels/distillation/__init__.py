"""Computes divergences of a linear head from a teacher, and their gradients, in plain PyTorch."""

from kernels.cross_entropy.reference import linear_distillation as linear_distillation
