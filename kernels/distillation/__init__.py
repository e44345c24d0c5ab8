"""Computes divergences of a linear head from a teacher, and their gradients, in plain PyTorch."""

from kernels.distillation.reference import linear_distillation as linear_distillation
