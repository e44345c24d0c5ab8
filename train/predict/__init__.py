"""Predicts time and memory of a step on every rank before any process starts.

Imports torch only to measure new sizes. docs/memory.md says how.
"""
