"""Scores answers by rules: mathematics, programs, format, language, length and repetition.

No torch here.
"""
