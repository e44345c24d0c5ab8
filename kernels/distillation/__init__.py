"""Computes divergences of a linear head from a teacher, and their gradients.

There is only the reference, on every device: its products are torch's, and the rest is bound by memory.
"""

from kernels.distillation.reference import linear_distillation as linear_distillation
