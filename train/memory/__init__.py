"""Predicts the memory of every rank before any process starts.

Imports torch only to measure new sizes. docs/memory.md says how.
"""

from train.memory.fit import fitted_config, gigabytes, memory_lines, parts, shortage, summary_line
from train.memory.predict import JobMemory, RankMemory, predict_memory

__all__ = [
    "JobMemory",
    "RankMemory",
    "fitted_config",
    "gigabytes",
    "memory_lines",
    "parts",
    "predict_memory",
    "shortage",
    "summary_line",
]
