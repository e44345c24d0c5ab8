"""Computes log-probabilities under a linear head, divergences from a teacher, and gradients."""

from kernels.cross_entropy import reference
from kernels.cross_entropy.reference import linear_distillation as linear_distillation
from kernels.operation import operation

linear_cross_entropy = operation(reference.linear_cross_entropy, cuda="triton")
