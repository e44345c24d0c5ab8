"""Predicts the memory of every rank before any process starts.

Imports torch only to measure new sizes. docs/memory.md says how.
"""
